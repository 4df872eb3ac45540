"""The same calls alone and in a launched run of two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tamis.model.processes import barrier, counts_of_all, is_main, local_rank, rank, world_size

_SCRIPT = """
from tamis.model.processes import barrier, counts_of_all, is_main, local_rank, rank, world_size
import sys, time
import torch.distributed as dist
from datetime import timedelta
begin = dist.init_process_group
def init_process_group(*args, timeout=timedelta(minutes=10), **kwargs):  # a backend's own is no longer than 30
    assert timeout > timedelta(days=1), "one process may work alone for hours while the others wait"
    begin(*args, timeout=timeout, **kwargs)
dist.init_process_group = init_process_group
from pathlib import Path
here = Path(sys.argv[1])
time.sleep(rank())  # the second comes late, and the first has to wait for it
(here / f"came-{rank()}").touch()
barrier()
print(rank(), local_rank(), world_size(), is_main(), sorted(p.name for p in here.glob("came-*")), end=" ")
print(counts_of_all(7 + rank()), flush=True)
"""


def test_unlaunched_script_is_the_only_process() -> None:
    barrier()
    assert (rank(), local_rank(), world_size(), is_main()) == (0, 0, 1, True)
    assert counts_of_all(7) == [7]


def test_two_gloo_processes_wait_for_each_other(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    came = "['came-0', 'came-1']"
    assert outputs[0][0].strip() == f"0 0 2 True {came} [7, 8]"
    assert outputs[1][0].strip() == f"1 1 2 False {came} [7, 8]"
