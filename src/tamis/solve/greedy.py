"""The greedy residual filter: take the best candidate, take its effect off the others' scores, repeat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tamis.errors import InvalidInput
from tamis.solve.gram import as_gram

__all__ = ["greedy_residual", "top"]


def greedy_residual(gram: npt.ArrayLike, scores: npt.ArrayLike, *, count: int) -> npt.NDArray[np.int64]:
    """``count`` candidates in the order chosen; the lowest index wins a tie.

    Algorithm 1, lines 7-12, of *Filter-then-Weight* in Gram form: ``s = scores``, then repeatedly
    ``i* = argmax_{i not in S} s_i`` and ``s <- s - G[:, i*]``, which is what matching the residual ``r <- r - grad_i*``
    does to the inner products with ``r``.

    Raises:
        InvalidInput: the shapes do not fit, or more candidates are asked for than there are.
        NonFinite: a number is NaN or infinite.
    """
    matrix, gain = as_gram(gram, scores)
    _check_count(count, len(gain))
    chosen = np.empty(count, dtype=np.int64)
    for place in range(count):
        best = int(np.argmax(gain))
        chosen[place] = best
        gain = gain - matrix[:, best]
        gain[best] = -np.inf
    return chosen


def top(scores: npt.ArrayLike, *, count: int) -> npt.NDArray[np.int64]:
    """The ``count`` largest, best first; the lowest index wins a tie.

    Raises:
        InvalidInput: more candidates are asked for than there are.
    """
    values = np.asarray(scores, dtype=np.float64)
    _check_count(count, len(values))
    return np.argsort(-values, kind="stable")[:count].astype(np.int64)


def _check_count(count: int, candidates: int) -> None:
    if not 0 <= count <= candidates:
        raise InvalidInput(f"cannot choose {count} of {candidates} candidates")
