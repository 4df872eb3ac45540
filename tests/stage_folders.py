"""Stages made from nothing but a row's number, so that any process can compute any shard of them again.

Run as a script it writes one stage, shard by shard, slowly enough to be killed: see ``test_kill_and_resume.py``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tamis.store.writer import StageWriter

NUM_ROWS = 230
SHARD_ROWS = 16
SPEC: dict[str, Any] = {"model": {"dtype": "float32", "name": "none"}, "seed": 3, "projection": ["factorized", 16]}


def columns(start: int, stop: int) -> dict[str, Any]:
    import torch  # not needed by the script, which is started often

    rows = torch.arange(start, stop)
    feature = torch.sin(rows[:, None] * torch.arange(1, 8)[None, :].double()).float()
    return {
        "feature": feature,
        "half": feature.to(torch.bfloat16),
        "loss": feature[:, 0].double(),
        "flag": rows % 3 == 0,
        "tokens": [np.arange(row % 5, dtype=np.int32) + row for row in range(start, stop)],
    }


def array_columns(start: int, stop: int) -> dict[str, Any]:
    rows = np.arange(start, stop)
    return {"feature": np.sin(rows[:, None] * np.arange(1.0, 8.0)), "tokens": [np.arange(row % 5) for row in rows]}


def open_writer(root: Path, *, spec: dict[str, Any] | None = None, num_rows: int = NUM_ROWS) -> StageWriter:
    return StageWriter(root, "features", spec or SPEC, num_rows=num_rows, shard_rows=SHARD_ROWS, fixed={"batch": 7})


def write_missing(
    writer: StageWriter,
    *,
    rank: int = 0,
    world_size: int = 1,
    pause_s: float = 0.0,
    make: Callable[[int, int], dict[str, Any]] = columns,
) -> None:
    for shard in writer.missing_shards():
        if shard % world_size == rank:
            writer.write_shard(shard, make(*writer.shard_range(shard)))
            time.sleep(pause_s)


def finished_stage(
    root: Path, *, num_rows: int = NUM_ROWS, make: Callable[[int, int], dict[str, Any]] = columns
) -> Path:
    writer = open_writer(root, num_rows=num_rows)
    write_missing(writer, make=make)
    writer.finish()
    return writer.path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    root, rank, world_size, pause_s, may_finish = sys.argv[1:]
    opened = open_writer(Path(root))
    sys.stdout.write("open\n")
    sys.stdout.flush()
    write_missing(opened, rank=int(rank), world_size=int(world_size), pause_s=float(pause_s), make=array_columns)
    if may_finish == "finish":
        opened.finish()
