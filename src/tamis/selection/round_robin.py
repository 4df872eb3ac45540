"""Targets take turns, and within a target its rows take turns, each taking its best row that is still free.

Per-target selection of Ivison et al. (2025) and of influence distillation (section 5): every target row gets its own
best rows, so that no target row, and no target, is drowned by the ones that score high everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from tamis.selection.top import BLOCK_VALUES, best_rows
from tamis.types import IntArray

__all__ = ["Copies", "Picks", "TokenTurns", "take_turns", "turns"]

_HEADROOM = 4  # a column first gets this many times its fair share of picks, since columns want the same rows
_KEPT_VALUES = 32_000_000  # rows listed over all columns at a time, about half a gigabyte while they are gathered


@dataclass(frozen=True, kw_only=True)
class Picks:
    """What was taken, in order."""

    rows: IntArray  # (k,) row of the score matrix
    target: IntArray  # (k,) whose turn it was
    column: IntArray  # (k,) the column that took it
    tokens: int  # their tokens together, 0 if tokens were not given
    was_stopped: bool  # the next row would have exceeded the tokens


class Copies:
    """Groups of rows that are copies of each other: taking one makes the others unavailable."""

    def __init__(self, first_of: IntArray) -> None:
        _, self.group, sizes = np.unique(first_of, return_inverse=True, return_counts=True)
        self.members = np.argsort(self.group, kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.has_copy = sizes[self.group] > 1
        self.num_spare = int((sizes - 1).sum())  # rows that can vanish without being taken

    def of(self, row: int) -> IntArray:
        """Every row of ``row``'s group, itself included."""
        g = self.group[row]
        return self.members[self.starts[g] : self.starts[g + 1]]


def turns(shares: Sequence[float]) -> Iterator[int]:
    """Endless target indices, each target coming up in proportion to its share and as evenly as possible.

    Smooth weighted round robin: every target gains its share, the one that has gained most takes the turn (ties: the
    lowest index) and pays the sum of all shares. No target is ever a whole turn ahead of its due; equal shares give
    0, 1, 2, ... in order. Shares are taken as fractions with denominators up to a million, in exact arithmetic, since
    a rounding error in a running sum would in the end change whose turn it is.

    >>> it = turns([0.5, 0.25, 0.25]); [next(it) for _ in range(8)]
    [0, 1, 2, 0, 0, 1, 2, 0]
    """
    gains = _whole_shares(shares)
    total, gained = sum(gains), [0] * len(gains)
    while True:
        gained = [have + gain for have, gain in zip(gained, gains, strict=True)]
        target = max(range(len(gained)), key=lambda i: gained[i])  # max keeps the first of equals
        gained[target] -= total
        yield target


class TokenTurns:
    """Whose turn it is where a turn may take a short row or a long one: the target furthest behind its share of tokens.

    Behind by its share of all tokens taken so far, less those it took itself (ties: the lowest index). No target is
    ever ahead of its share by as much as the longest row that it took. Exact arithmetic, as in `turns`.

    >>> order = TokenTurns([0.5, 0.5]); order.next()
    0
    >>> order.pay(0, 300); order.next()
    1
    >>> order.pay(1, 100); order.next()
    1
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._gains = _whole_shares(shares)
        self._total = sum(self._gains)
        self._behind = [0] * len(self._gains)

    def next(self) -> int:
        """The target whose turn it is; it stays the same until something is paid."""
        open_targets = [target for target, gain in enumerate(self._gains) if gain]
        return max(open_targets, key=lambda target: self._behind[target])  # max keeps the first of equals

    def pay(self, target: int, tokens: int) -> None:
        """``target`` took a row of ``tokens``."""
        for other, gain in enumerate(self._gains):
            self._behind[other] += gain * tokens
        self._behind[target] -= self._total * tokens


def _whole_shares(shares: Sequence[float]) -> list[int]:
    fractions = [Fraction(share).limit_denominator(1_000_000) for share in shares]
    scale = lcm(*(f.denominator for f in fractions))
    whole = [int(f * scale) for f in fractions]
    if sum(whole) <= 0 or min(whole) < 0:
        raise ValueError(f"shares must be non-negative with at least one above zero, got {list(shares)}")
    return whole


def take_turns(
    values: Float[np.ndarray, "n M"],
    *,
    group: Int[np.ndarray, " M"],
    shares: Sequence[float],
    available: Bool[np.ndarray, " n"],
    max_rows: int,
    copies: Copies | None = None,
    tokens: Int[np.ndarray, " n"] | None = None,
    max_tokens: int | None = None,
    first_count: int | None = None,
    block_values: int = BLOCK_VALUES,
) -> Picks:
    """Rows in the order in which the targets' rows take them.

    ``group[j]`` is the target of column ``j``; each target with a share needs at least one column. A turn goes to a
    target by `turns`, or by `TokenTurns` if ``max_tokens`` limits the selection, so that ``shares`` divide what the
    limit counts; there to its next column in cyclic order, which takes its best row that is still free: available and
    neither taken nor a copy of one taken. Ends after ``max_rows`` rows, or before the first row with which the sum
    of ``tokens`` would exceed ``max_tokens``, or when no row is free.

    Columns are ranked lazily: each first gets a list a few times longer than its share of the picks; when one runs
    out, all are listed anew, twice as long, over the rows still free. ``first_count`` and ``block_values`` set that
    length and the size of the blocks read; the result does not depend on them.
    """
    n = len(values)
    free = np.array(available, dtype=bool)  # our own copy
    columns_of = [np.flatnonzero(group == target).tolist() for target in range(len(shares))]
    next_column = [0] * len(shares)
    counts = _first_counts(columns_of, shares, values.shape[1], _expected_picks(max_rows, free, tokens, max_tokens))
    if first_count is not None:
        counts[:] = first_count
    spare = copies.num_spare if copies is not None else 0

    rows: list[int] = []
    target_of: list[int] = []
    column_of: list[int] = []
    spent, was_stopped, num_free = 0, False, int(free.sum())
    lists: list[memoryview] = []
    at: list[int] = []
    is_free = free.data  # plain Python reads, several times faster than indexing an array one by one
    row_turns, token_turns = turns(shares), TokenTurns(shares)
    while len(rows) < max_rows and num_free:
        target = next(row_turns) if max_tokens is None else token_turns.next()
        own = columns_of[target]
        column = own[next_column[target] % len(own)]
        next_column[target] += 1

        row = _next_free(lists[column], at, column, is_free) if lists else None
        if row is None:  # ranked too short (or not yet): rank the free rows anew for all columns
            longest = min(num_free, max_rows - len(rows) + spare)
            counts = np.minimum(counts * 2 if lists else counts, min(longest, max(1, _KEPT_VALUES // len(counts))))
            lists = [best.data for best in best_rows(values, free, counts, block_values=block_values)]
            at = [0] * len(lists)
            row = _next_free(lists[column], at, column, is_free)
            assert row is not None, "a free row is in every column's ranking"

        if max_tokens is not None and tokens is not None:
            if spent + int(tokens[row]) > max_tokens:
                was_stopped = True
                break
            spent += int(tokens[row])
            token_turns.pay(target, int(tokens[row]))
        rows.append(row)
        target_of.append(target)
        column_of.append(column)
        if copies is not None and copies.has_copy[row]:
            together = copies.of(row)
            num_free -= int(free[together].sum())
            free[together] = False
        else:
            num_free -= 1
            free[row] = False
    if tokens is not None and max_tokens is None:
        spent = int(tokens[np.asarray(rows, np.int64)].sum()) if n else 0
    return Picks(
        rows=np.asarray(rows, np.int64),
        target=np.asarray(target_of, np.int64),
        column=np.asarray(column_of, np.int64),
        tokens=spent,
        was_stopped=was_stopped,
    )


def _next_free(ranked: memoryview, at: list[int], column: int, is_free: memoryview) -> int | None:
    """The column's best free row of its list, or None at the list's end; moves the column's place in it."""
    place = at[column]
    while place < len(ranked):
        row: int = ranked[place]
        if is_free[row]:
            at[column] = place
            return row
        place += 1
    at[column] = place
    return None


def _expected_picks(max_rows: int, free: npt.NDArray[np.bool_], tokens: IntArray | None, max_tokens: int | None) -> int:
    """About how many rows will be taken; only the speed depends on it."""
    if tokens is None or max_tokens is None or not free.any():
        return max_rows
    return min(max_rows, int(max_tokens / max(1.0, float(tokens[free].mean()))) + 1)


def _first_counts(
    columns_of: list[list[int]], shares: Sequence[float], num_columns: int, expected_picks: int
) -> IntArray:
    counts = np.zeros(num_columns, np.int64)
    for own, share in zip(columns_of, shares, strict=True):
        if share > 0 and not own:
            raise ValueError("a target with a share has no column")
        if own:
            counts[own] = _HEADROOM * -(-expected_picks * share // (sum(shares) * len(own))) + 64
    return counts
