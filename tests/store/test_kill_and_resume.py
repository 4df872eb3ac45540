"""Real processes and real SIGKILL: whatever the instant, the same command again ends in the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stage_folders
from stage_folders import array_columns, contents, finished_stage, open_writer


def start(root: Path, *, rank: int = 0, world_size: int = 1, pause_s: float = 0.0, finish: bool = True):  # type: ignore[no-untyped-def]
    arguments = [str(root), str(rank), str(world_size), str(pause_s), "finish" if finish else "stop"]
    return subprocess.Popen(
        [sys.executable, stage_folders.__file__, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_at_random_moments_the_stage_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = contents(finished_stage(tmp_path / "whole", make=array_columns))
    chance = random.Random(5)
    root = tmp_path / "killed"
    kills = 0
    for _ in range(8):
        process = start(root, pause_s=0.01)
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        time.sleep(chance.uniform(0.0, 0.06))
        kills += process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        open_writer(root).missing_shards()  # what is there is whole: this would raise otherwise
    assert kills >= 4
    process = start(root)
    process.communicate()
    assert process.returncode == 0
    assert contents(open_writer(root).path) == whole


def test_two_processes_write_different_shards_of_one_stage(tmp_path: Path) -> None:
    whole = contents(finished_stage(tmp_path / "whole", make=array_columns))
    root = tmp_path / "two"
    processes = [start(root, rank=rank, world_size=2, finish=False) for rank in range(2)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    writer = open_writer(root)
    assert writer.missing_shards() == []
    writer.finish()
    assert contents(writer.path) == whole


def test_a_dead_process_loses_only_its_unwritten_shards(tmp_path: Path) -> None:
    root = tmp_path / "dead"
    dying = start(root, rank=1, world_size=2, pause_s=5.0, finish=False)
    assert dying.stdout is not None and dying.stdout.readline() == "open\n"
    process = start(root, rank=0, world_size=2, finish=False)
    process.communicate()
    dying.kill()
    dying.wait()
    dying.stdout.close()
    writer = open_writer(root)
    missing = writer.missing_shards()
    assert set(missing) <= {1, 3, 5, 7, 9, 11, 13} and len(missing) >= 6
