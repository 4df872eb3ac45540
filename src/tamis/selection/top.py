"""The best rows of every score column, read in blocks, so that scores larger than memory (a memmap) are fine.

Order everywhere in this room: higher score first, equal scores by the lower row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from tamis.types import IntArray

__all__ = ["BLOCK_VALUES", "best_rows", "block_length"]

BLOCK_VALUES = 4_000_000  # score values held at a time; a block and its transpose are then 32 MB


def block_length(num_columns: int, block_values: int = BLOCK_VALUES) -> int:
    """Rows read at a time so that a block holds about ``block_values`` numbers."""
    return max(1, block_values // max(1, num_columns))


def best_rows(
    values: Float[np.ndarray, "n M"],
    available: Bool[np.ndarray, " n"],
    counts: Int[np.ndarray, " M"],
    *,
    block_values: int = BLOCK_VALUES,
) -> list[IntArray]:
    """For each column ``j``, its ``counts[j]`` best available rows (fewer if fewer are available), best first.

    One pass over ``values`` whatever the number of columns. Beside a block it holds at most twice the rows asked for
    (and one block's), with their scores: 16 bytes each.
    """
    n, num_columns = values.shape
    index_type = np.int32 if n < 2**31 else np.int64
    found = [_Best(int(count), index_type) for count in counts]
    step = block_length(num_columns, block_values)
    for start in range(0, n, step):
        rows = np.flatnonzero(available[start : start + step])
        if not len(rows):
            continue
        block = np.asarray(values[start : start + step])
        columns = np.ascontiguousarray((block if len(rows) == len(block) else block[rows]).T)  # (M, rows)
        rows = (rows + start).astype(index_type)
        for best, column in zip(found, columns, strict=True):
            best.add(column, rows)
    return [best.ordered() for best in found]


class _Best:
    """The largest ``count`` of a stream of scores; rows arrive in ascending order and are kept in it."""

    def __init__(self, count: int, index_type: type[np.signedinteger[Any]]) -> None:
        self.count = count
        self.above = -np.inf  # a later row must beat this: an equal score loses to the rows already kept
        self.scores: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self.rows: npt.NDArray[Any] = np.empty(0, index_type)

    def add(self, scores: npt.NDArray[np.float32], rows: npt.NDArray[Any]) -> None:
        better = np.flatnonzero(scores > self.above)
        if not len(better):
            return
        self.scores = np.concatenate([self.scores, scores[better]])
        self.rows = np.concatenate([self.rows, rows[better]])
        if len(self.scores) > 2 * self.count:  # not at every block: cutting costs a pass over what is kept
            self._cut()

    def _cut(self) -> None:
        if len(self.scores) <= self.count:
            return
        if self.count == 0:
            self.scores, self.rows, self.above = self.scores[:0], self.rows[:0], np.inf
            return
        place = len(self.scores) - self.count
        self.above = float(np.partition(self.scores, place)[place])  # the last score that still counts
        keep = self.scores > self.above
        ties = np.flatnonzero(self.scores == self.above)
        keep[ties[: self.count - int(keep.sum())]] = True  # the lowest rows of those that tie for the last places
        self.scores, self.rows = self.scores[keep], self.rows[keep]

    def ordered(self) -> IntArray:
        self._cut()
        return self.rows[np.argsort(-self.scores, kind="stable")]
