"""The same calls alone and in a launched run of two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tamis.model.processes import barrier, gather_objects, is_main, local_rank, rank, world_size

_SCRIPT = """
from tamis.model.processes import barrier, gather_objects, is_main, local_rank, rank, world_size
barrier()
print(rank(), local_rank(), world_size(), is_main(), gather_objects({"rank": rank()}), flush=True)
"""


def test_unlaunched_script_is_the_only_process() -> None:
    barrier()
    assert (rank(), local_rank(), world_size(), is_main()) == (0, 0, 1, True)
    assert gather_objects("mine") == ["mine"]


def test_two_gloo_processes_see_each_other(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    running = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    gathered = "[{'rank': 0}, {'rank': 1}]"
    assert outputs[0][0].strip() == f"0 0 2 True {gathered}"
    assert outputs[1][0].strip() == f"1 1 2 False {gathered}"
