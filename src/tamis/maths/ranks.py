"""Ranks of numbers and how far two orders agree. SciPy has both, behind an import of half a second for every run."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["correlation_of_ranks", "mean_ranks", "rank_correlation"]


def mean_ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Ranks 1 .. n of ``n`` numbers, the lowest first; equal ones share the mean of their ranks.

    >>> mean_ranks(np.array([7, 3, 7])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return ranks


def rank_correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float | None:
    """Spearman's rank correlation of two vectors of equal length, ties at their mean rank; None if one is constant."""
    return correlation_of_ranks(mean_ranks(x), mean_ranks(y))


def correlation_of_ranks(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float | None:
    """The same of ranks that are known already; None if one vector is constant."""
    if not len(x):
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None
