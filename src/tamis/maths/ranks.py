"""Ranks of numbers. SciPy has them too, behind an import of half a second that every run would wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["mean_ranks"]


def mean_ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Ranks 1 .. n of ``n`` numbers, the lowest first; equal ones share the mean of their ranks.

    >>> mean_ranks(np.array([7, 3, 7])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return ranks
