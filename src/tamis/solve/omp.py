"""Orthogonal matching pursuit with a ridge, from inner products alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tamis.solve.nnls import solve_ridge
from tamis.solve.solution import Solution, Status, as_gram

__all__ = ["match_orthogonally"]


def match_orthogonally(
    gram: npt.ArrayLike, target: npt.ArrayLike, *, count: int, ridge: float
) -> tuple[npt.NDArray[np.int64], Solution]:
    """Candidates in the order chosen, and their weights in that order, of either sign.

    Algorithm 2 of *Filter-then-Weight* (after GRAD-MATCH, Killamsetty et al., 2021): at every round take the candidate
    whose addition, with all weights solved for again as ``(G_S + ridge I)^{-1} b_S``, lowers ``-b_S^T w`` most, the
    part of the residual that depends on the set. The lowest index wins a tie.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, a ridge of 0 or less, or too many asked for.
    """
    matrix, b = as_gram(gram, target)
    if not ridge > 0:
        raise ValueError(f"matching needs a positive ridge, got {ridge}: sets of parallel gradients are singular")
    if not 0 <= count <= len(b):
        raise ValueError(f"cannot choose {count} of {len(b)} candidates")
    chosen: list[int] = []
    solution = Solution(value=np.zeros(0), status=Status.SOLVED, residual=0.0, steps=0)
    for _ in range(count):
        best, best_gain = -1, -np.inf
        for candidate in range(len(b)):
            if candidate in chosen:
                continue
            trial = [*chosen, candidate]
            found = solve_ridge(matrix[np.ix_(trial, trial)], b[trial], ridge=ridge)
            gain = float(b[trial] @ found.value) if found.status is Status.SOLVED else -np.inf
            if best < 0 or gain > best_gain:
                best, best_gain, solution = candidate, gain, found
        chosen.append(best)
    return np.array(chosen, dtype=np.int64), solution
