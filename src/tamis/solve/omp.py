"""Orthogonal matching pursuit with a ridge, from inner products alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tamis.errors import InvalidInput, InvalidSettings
from tamis.solve.gram import Vector, as_gram
from tamis.solve.nnls import solve_ridge
from tamis.solve.solution import Solution, Status

__all__ = ["match_orthogonally"]


def match_orthogonally(
    gram: npt.ArrayLike, target: npt.ArrayLike, *, count: int, ridge: float
) -> tuple[npt.NDArray[np.int64], Solution[Vector]]:
    """Candidates in the order chosen, and their weights in that order, of either sign.

    Algorithm 2 of *Filter-then-Weight* (after GRAD-MATCH, Killamsetty et al., 2021): at every round take the candidate
    whose addition, with all weights solved for again as ``(G_S + ridge I)^{-1} b_S``, lowers ``-b_S^T w`` most, the
    part of the residual that depends on the set. The lowest index wins a tie. Stats are those of ``solve_ridge`` on the
    set, all zero if it is empty.

    Raises:
        InvalidInput: the shapes do not fit, or more candidates are asked for than there are.
        InvalidSettings: the ridge is 0 or less.
        NonFinite: a number is NaN or infinite.
    """
    matrix, b = as_gram(gram, target)
    if not ridge > 0:
        raise InvalidSettings(f"matching needs a positive ridge, got {ridge}: sets of parallel gradients are singular")
    if not 0 <= count <= len(b):
        raise InvalidInput(f"cannot choose {count} of {len(b)} candidates")
    chosen: list[int] = []
    solution = Solution(value=np.zeros(0), status=Status.OPTIMAL, stats={"residual": 0.0, "solves": 0})
    for _ in range(count):
        best, best_gain = -1, -np.inf
        for candidate in range(len(b)):
            if candidate in chosen:
                continue
            trial = [*chosen, candidate]
            found = solve_ridge(matrix[np.ix_(trial, trial)], b[trial], ridge=ridge)
            gain = float(b[trial] @ found.value) if found.status is Status.OPTIMAL else -np.inf
            if best < 0 or gain > best_gain:
                best, best_gain, solution = candidate, gain, found
        chosen.append(best)
    return np.array(chosen, dtype=np.int64), solution
