"""What chance leaves of a rank correlation: the percentile bootstrap over rows (Efron, 1979), ranked anew in each draw.

A row that was drawn ``c`` times is ``c`` equal rows, so draws are kept as counts and no row is written out twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tamis.maths.ranks import rank_correlation
from tamis.seeds import child_seed, raw_words

__all__ = ["DRAWS", "FEWEST_ROWS", "RankAgreement", "draw_rows", "middle", "rank_agreement", "resampled_correlation"]

DRAWS = 1000
# Below so many rows the draws repeat the same few pairs: of three, every interval would be a single number.
FEWEST_ROWS = 8
_FEWEST_DRAWS = DRAWS // 2  # if most draws have no ranking, the others say nothing of chance

Counts = npt.NDArray[np.int64]
Middle = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class RankAgreement:
    """Spearman's correlation of the columns of two tables, and the middle 95 % of their mean over draws of the rows."""

    columns: tuple[float | None, ...]  # None where one side is constant
    mean: float | None  # over the columns that have one
    middle: Middle  # None below eight rows, or if fewer than half of the draws are left
    draws: int  # left after those in which a column of the mean has become constant


def rank_agreement(x: npt.NDArray[Any], y: npt.NDArray[Any], *, seed: int) -> RankAgreement:
    """Of two tables of ``(n, G)`` numbers without NaN; ties share the mean of their ranks."""
    columns = tuple(rank_correlation(x[:, j], y[:, j]) for j in range(x.shape[1]))
    ranked = [j for j, found in enumerate(columns) if found is not None]
    if not ranked:
        return RankAgreement(columns=columns, mean=None, middle=None, draws=0)
    counts = draw_rows(len(x), seed)
    # Of the same columns in every draw: a mean over fewer of them would be of something else.
    drawn = np.mean([resampled_correlation(x[:, j], y[:, j], counts) for j in ranked], axis=0)
    left = drawn[~np.isnan(drawn)]
    mean = float(np.mean([found for found in columns if found is not None]))
    return RankAgreement(columns=columns, mean=mean, middle=middle(left, rows=len(x)), draws=len(left))


def draw_rows(rows: int, seed: int) -> Counts:
    """How often each of the rows is drawn, with replacement, in every draw: (R, n)."""
    drawn = (raw_words(child_seed(seed, "resampled rows"), DRAWS * rows) % np.uint64(rows)).astype(np.int64)
    return np.stack([np.bincount(draw, minlength=rows) for draw in drawn.reshape(DRAWS, rows)])


def middle(values: npt.NDArray[np.float64], *, rows: int) -> Middle:
    """The middle 95 % of what draws of ``rows`` rows gave; None where that says nothing."""
    if rows < FEWEST_ROWS or len(values) < _FEWEST_DRAWS:
        return None
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return low, high


def resampled_correlation(x: npt.NDArray[Any], y: npt.NDArray[Any], counts: Counts) -> npt.NDArray[np.float64]:
    """Spearman's correlation of the rows as often as ``counts`` (R, n) has them: (R,); NaN where one is constant."""
    ranks = [_resampled_ranks(values, counts) for values in (x, y)]
    total = counts.sum(axis=1, keepdims=True)
    centred = [rank - (counts * rank).sum(axis=1, keepdims=True) / total for rank in ranks]
    of_both, of_x, of_y = ((counts * centred[a] * centred[b]).sum(axis=1) for a, b in ((0, 1), (0, 0), (1, 1)))
    scale = np.sqrt(of_x * of_y)
    found: npt.NDArray[np.float64] = np.divide(of_both, scale, out=np.full_like(scale, np.nan), where=scale > 0)
    return found


def _resampled_ranks(values: npt.NDArray[Any], counts: Counts) -> npt.NDArray[np.float64]:
    """Mean ranks of the rows among all that were drawn: (R, n). They follow from how many rows are below."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    together = np.add.reduceat(counts[:, order], np.flatnonzero(np.diff(place[order], prepend=-1)), axis=1)
    ranks: npt.NDArray[np.float64] = (np.cumsum(together, axis=1) - (together - 1) / 2)[:, place]
    return ranks
