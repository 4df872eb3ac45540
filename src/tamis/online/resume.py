"""Which checkpoints of a run are whole, and the log that goes with them.

A trainer writes a checkpoint file by file, and several processes write to it. One that was written to the end gets a
mark, on the disk after all the rest; what has none is of a run that was killed while it wrote.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tamis.disk import disk_errors, replace_atomically
from tamis.errors import StoreCorrupted

__all__ = ["WholeCheckpoint", "append_log", "cut_log", "mark_whole", "read_log", "remove_after", "whole_checkpoints"]

_MARK = "tamis_whole.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class WholeCheckpoint:
    """A checkpoint from which a run can go on."""

    folder: Path
    step: int
    seconds: float  # spent up to it, by all runs that led there


def mark_whole(folder: Path, *, step: int, seconds: float) -> None:
    """Say that the checkpoint in ``folder`` was written to the end.

    Raises:
        InvalidInput: the disk is full or the folder read-only.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with disk_errors(folder):
        for path in files:  # without it, a power cut could keep the mark and lose what it vouches for
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files if path.name != _MARK}
    mark = {"step": step, "seconds": round(seconds, 3), "files": sizes}
    replace_atomically(folder / _MARK, (json.dumps(mark).encode(),))


def whole_checkpoints(root: Path) -> list[WholeCheckpoint]:
    """Those under ``root`` with a mark and every file at its size, by step."""
    found = []
    for folder in root.glob("checkpoint-*"):
        try:
            mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
            whole = all((folder / name).stat().st_size == size for name, size in mark["files"].items())
        except (OSError, ValueError):
            continue
        if whole:
            found.append(WholeCheckpoint(folder=folder, step=mark["step"], seconds=mark["seconds"]))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def remove_after(root: Path, step: int) -> None:
    """Remove checkpoints of later updates than ``step``: a run that goes on from there writes them again.

    Raises:
        InvalidInput: they cannot be removed.
    """
    for folder in root.glob("checkpoint-*"):
        match = _NAME.fullmatch(folder.name)
        if match and int(match[1]) > step:
            with disk_errors(folder, doing="remove"):
                shutil.rmtree(folder)


def append_log(path: Path, entry: Mapping[str, Any]) -> None:
    """One more line.

    Raises:
        InvalidInput: the disk is full or the folder read-only.
    """
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every entry, but for a last line that a killed run left unfinished; none if there is no file.

    Raises:
        StoreCorrupted: another line is damaged.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry.get("step"), int):
                raise ValueError("no step")
        except (ValueError, AttributeError) as error:
            if number < len(lines):
                raise StoreCorrupted(
                    f"line {number} of {path} is damaged; only a run from the start writes it again: train into "
                    "another folder, or delete this run's"
                ) from error
        else:
            found.append(entry)
    return found


def cut_log(path: Path, step: int) -> None:
    """Take back the entries of updates after ``step``, which are done again, and of the end; ``-1``: everything.

    Raises:
        InvalidInput: the disk is full or the folder read-only.
        StoreCorrupted: the log is damaged.
    """
    ends = ("train_runtime", "final_eval_loss")
    kept = [e for e in read_log(path) if e["step"] <= step and not any(name in e for name in ends)]
    replace_atomically(path, [(json.dumps(entry) + "\n").encode() for entry in kept])
