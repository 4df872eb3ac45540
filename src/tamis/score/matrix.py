"""The score matrix of a method: where a large one lies, and the two shapes of it that ignore single target rows."""

from __future__ import annotations

import tempfile

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from tamis.collect import Task
from tamis.store.reader import StageReader
from tamis.types import FloatArray, IntArray, TargetScores

__all__ = ["empty_scores", "fill_columns", "scores_of_targets", "scores_without_target", "with_columns"]

_BLOCK_NUMBERS = 1 << 22  # scores moved at once
_IN_MEMORY = 1 << 30  # bytes; a larger matrix lives in an unnamed file and is paged in as it is read


def empty_scores(task: Task, num_columns: int) -> FloatArray:
    """A ``(n, num_columns)`` float32 matrix to be filled, on disk beside the store if it is large.

    The file has no name: it disappears with the last reference, or with the process if that is killed.
    """
    shape = (len(task.rows), num_columns)
    if shape[0] * shape[1] * 4 <= _IN_MEMORY:
        return np.empty(shape, np.float32)
    task.store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=task.store) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def fill_columns(values: FloatArray, reader: StageReader, name: str) -> None:
    """Copy a stored column ``(n, m)`` into ``values`` (a part of a score matrix), some rows at a time."""
    for start, block in reader.blocks(name, max(1, _BLOCK_NUMBERS // max(1, values.shape[1]))):
        values[start : start + len(block)] = block


def with_columns(task: Task, values: FloatArray, kept: IntArray) -> FloatArray:
    """``values[:, kept]`` for ascending ``kept``: the matrix itself if no column goes."""
    if len(kept) == values.shape[1]:
        return values
    smaller = empty_scores(task, len(kept))
    rows = max(1, _BLOCK_NUMBERS // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        smaller[start : start + rows] = values[start : start + rows, kept]
    return smaller


def scores_of_targets(
    task: Task,
    columns: Float[np.ndarray, "n G"],
    *,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
    notes: tuple[str, ...] = (),
) -> TargetScores:
    """Scores of a method that sees each target as a whole: one column per target."""
    return TargetScores(
        rows=task.rows,
        values=np.ascontiguousarray(columns, dtype=np.float32),
        group=np.arange(len(task.target_names)),
        target_names=task.target_names,
        extra=extra or {},
        notes=notes,
    )


def scores_without_target(
    task: Task,
    score: Float[np.ndarray, " n"],
    *,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
) -> TargetScores:
    """Scores of a method that ignores the target: the same column for every target."""
    columns = np.repeat(np.asarray(score, np.float32)[:, None], len(task.target_names), axis=1)
    return scores_of_targets(task, columns, extra=extra)
