"""A target that has to do without held-out rows of its own: half of its rows measure, the other half selects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tamis.corpora import Sources
from tamis.data.examples import Examples
from tamis.disk import make_folder, replace_atomically
from tamis.errors import InvalidInput
from tamis.report.wording import counted
from tamis.seeds import child_seed, random_subset
from tamis.types import IntArray

__all__ = ["half_files", "halves_of", "said_of_halves", "write_halves"]

TARGET, HELD_OUT = "target.jsonl", "held-out.jsonl"
Halves = Sequence[tuple[str, IntArray, IntArray]]  # a target's name, the rows that select, the rows that measure


def halves_of(sources: Sources, *, seed: int) -> Halves:
    """Of every target its name, the rows that select and, a random half rounded down, those that measure.

    Raises:
        InvalidInput: a target has fewer than two rows.
    """
    found: list[tuple[str, IntArray, IntArray]] = []
    for number, name in enumerate(sources.target_names):
        rows = np.flatnonzero(sources.target_group == number).astype(np.int64)
        if len(rows) < 2:
            raise InvalidInput(
                f"target '{name}' has {len(rows)} row, of which none can be held out; pass --eval (rows of the task "
                "that nothing else sees), or more target rows"
            )
        measure = rows[random_subset(child_seed(seed, "held out", name), len(rows), len(rows) // 2)]
        found.append((name, np.setdiff1d(rows, measure), np.sort(measure)))
    return found


def half_files(folder: Path, halves: Halves) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to give as target, and what as held-out rows, once ``write_halves`` has written them."""
    targets = tuple(f"{name}={folder / str(number) / TARGET}" for number, (name, _, _) in enumerate(halves))
    return targets, tuple(f"{name}={folder / str(number) / HELD_OUT}" for number, (name, _, _) in enumerate(halves))


def write_halves(folder: Path, examples: Examples, halves: Halves) -> None:
    """The halves as files, the rows untouched."""
    for number, (_, select, measure) in enumerate(halves):
        make_folder(folder / str(number))
        for file, rows in ((TARGET, select), (HELD_OUT, measure)):
            lines = (f"{examples.raw_json(int(row)).strip()}\n".encode() for row in rows)
            replace_atomically(folder / str(number) / file, lines)


def said_of_halves(halves: Halves) -> str:
    """What a reader of the verdict has to know."""
    parts = [
        f"'{name}': {counted(len(select), 'row')} selected, {counted(len(measure), 'row')} measured"
        for name, select, measure in halves
    ]
    return (
        f"No held-out rows were given, so each target was divided ({'; '.join(parts)}). Rows of your own for --eval "
        "leave more to select with, and say more."
    )
