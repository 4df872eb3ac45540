"""Several processes: gloo on one machine. One process: nothing to wait for, and nothing loaded that is not needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fake_task import random_tokens
from score_task import file_bytes
from tamis.training.loop import TrainSettings, fine_tune
from tamis.training.lora import add_lora
from tamis.training.warmup import warmup
from tiny_models import tiny_model

TOKENS = random_tokens([9, 5, 12, 7, 4, 10, 6], seed=1)
ROWS = np.arange(7)
SETTINGS = TrainSettings(epochs=2, update_rows=4, learning_rate=5e-3)


def open_model() -> nn.Module:
    return add_lora(tiny_model("llama", dtype=torch.float32), rank=2, alpha=4, seed=7)


def run(folder: Path, opened: Callable[[], nn.Module] = open_model, told: list[int] | None = None) -> list[int]:
    steps: list[int] = [] if told is None else told
    warmup(opened, TOKENS, ROWS, SETTINGS, seed=0, folder=folder, name_of=str, advance=steps.append)
    return steps


def test_a_finished_warmup_loads_no_model(tmp_path: Path) -> None:
    assert sum(run(tmp_path)) == 4
    written = file_bytes(tmp_path)

    def never() -> nn.Module:
        raise AssertionError("the model was loaded again")

    assert sum(run(tmp_path, never)) == 4
    assert file_bytes(tmp_path) == written


def test_one_process_equals_plain_fine_tuning(tmp_path: Path) -> None:
    run(tmp_path / "warm-up")
    fine_tune(open_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path / "plain")
    assert file_bytes(tmp_path / "warm-up") == file_bytes(tmp_path / "plain")


_SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_warmup import open_model, run
from tamis.model.processes import is_main, world_size

assert world_size() == 2
told, loads = [], []
def opened():
    loads.append(1)
    return open_model()
run(Path(sys.argv[1]), opened, told)
print(is_main(), sum(told), len(loads))
"""


def _two_processes(folder: Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, "-c", _SCRIPT, str(folder), str(Path(__file__).parent)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=240)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return said


def test_two_processes_resume_and_end_with_the_checkpoints_of_one(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two")
    last = sorted((tmp_path / "two").glob("step-*"))[-1]
    last.rename(last.with_suffix(".partial"))  # as a run that was killed in its second epoch leaves it
    assert _two_processes(tmp_path / "two") == ["True 4 1", "False 4 0"]
    assert file_bytes(tmp_path / "two") == file_bytes(tmp_path / "one")
