"""Non-negative least squares from inner products alone, and the same problem without the bound."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import linalg

from tamis.errors import InvalidSettings
from tamis.solve.gram import Vector, as_gram
from tamis.solve.solution import Solution, Status

__all__ = ["solve_nnls", "solve_ridge"]

_TOLERANCE = 1e-12  # of the linear term's largest entry: float64 with a few digits to spare


def solve_nnls(gram: npt.ArrayLike, target: npt.ArrayLike, *, ridge: float = 0.0) -> Solution[Vector]:
    """``argmin_{w >= 0} w^T (G + ridge I) w - 2 b^T w``, by the active-set method of Lawson and Hanson (1974, ch. 23).

    With ``G = X X^T`` and ``b = X y`` this is ``min ||y - X^T w||^2 + ridge ||w||^2``, the weights of
    *Filter-then-Weight*, equation 6. ``gram`` is used as its symmetric part and should be positive definite together
    with the ridge.

    Stats: ``residual``, the largest violation of the conditions of the optimum, ``w >= 0``,
    ``(G + ridge I) w - b >= 0``, and their product zero, relative to ``max |b|``; ``solves`` of linear systems that
    took a candidate in.

    Raises:
        InvalidInput: the shapes do not fit.
        InvalidSettings: the ridge is negative.
        NonFinite: a number is NaN or infinite.
    """
    matrix, b = _problem(gram, target, ridge)
    n = len(b)
    weights, passive, blocked = np.zeros(n), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    tolerance = _TOLERANCE * float(np.abs(b).max(initial=0.0))
    status, solves = Status.OPTIMAL, 0
    while True:
        slope = b - matrix @ weights  # minus half the gradient of the objective
        open_ = ~passive & ~blocked
        if not open_.any() or float(slope[open_].max()) <= tolerance:
            break
        if solves >= 10 * n:
            status = Status.MAX_STEPS
            break
        solves += 1
        entering = int(np.argmax(np.where(open_, slope, -np.inf)))
        passive[entering] = True
        found = _solve_on(matrix, b, passive)
        if found is None or found[entering] <= 0:
            # The column depends on those inside, up to rounding: it cannot lower the objective.
            passive[entering], blocked[entering] = False, True
            if found is None:
                status = Status.SINGULAR
            continue
        last = weights
        while found is not None and (found[passive] <= 0).any():
            leaving = passive & (found <= 0)
            share = float((weights[leaving] / (weights[leaving] - found[leaving])).min())
            weights = weights + share * (found - weights)
            passive &= weights > 1e-15 * float(weights.max(initial=0.0))
            weights[~passive] = 0.0
            found = _solve_on(matrix, b, passive)
        if found is None:  # on a subset of a set that could be solved on: possible only at the edge of rounding
            weights, status = last, Status.INDEFINITE
            break
        weights = found
        if status is Status.OPTIMAL:
            blocked[:] = False
    stats = {"residual": _violation(matrix, b, weights), "solves": solves}
    return Solution(value=weights, status=status, stats=stats)


def solve_ridge(gram: npt.ArrayLike, target: npt.ArrayLike, *, ridge: float = 0.0) -> Solution[Vector]:
    """``(G + ridge I)^{-1} b``: the same objective with weights of either sign, zero if there is no single optimum.

    Stats: ``residual``, the largest entry of ``(G + ridge I) w - b`` relative to ``max |b|``; ``solves``, 1.

    Raises:
        InvalidInput: the shapes do not fit.
        InvalidSettings: the ridge is negative.
        NonFinite: a number is NaN or infinite.
    """
    matrix, b = _problem(gram, target, ridge)
    found = _solve_on(matrix, b, np.ones(len(b), dtype=bool))
    if found is None:
        return Solution(value=np.zeros(len(b)), status=Status.SINGULAR, stats={"residual": 1.0, "solves": 1})
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    residual = float(np.abs(matrix @ found - b).max(initial=0.0)) / scale
    return Solution(value=found, status=Status.OPTIMAL, stats={"residual": residual, "solves": 1})


def _problem(gram: npt.ArrayLike, target: npt.ArrayLike, ridge: float) -> tuple[Vector, Vector]:
    if not ridge >= 0:
        raise InvalidSettings(f"the ridge must be 0 or more, got {ridge}")
    matrix, b = as_gram(gram, target)
    return matrix + ridge * np.eye(len(b)), b


def _solve_on(matrix: Vector, b: Vector, inside: npt.NDArray[np.bool_]) -> Vector | None:
    """The unbounded optimum over the coordinates ``inside``, zero elsewhere; None if it is not unique."""
    found = np.zeros(len(b))
    if not inside.any():
        return found
    part = matrix[np.ix_(inside, inside)]
    try:
        factor = linalg.cholesky(part, lower=True, check_finite=False)
    except linalg.LinAlgError:
        return None
    pivots = np.diag(factor)
    if pivots.min() ** 2 <= len(part) * np.finfo(np.float64).eps * np.diag(part).max():
        return None  # rounding alone makes it positive definite
    found[inside] = linalg.cho_solve((factor, True), b[inside], check_finite=False)
    return found


def _violation(matrix: Vector, b: Vector, weights: Vector) -> float:
    if not len(b):
        return 0.0
    slope = matrix @ weights - b
    inside = weights > 0
    worst = max(
        float((-weights).max()),
        float((-slope[~inside]).max(initial=0.0)),
        float(np.abs(slope[inside]).max(initial=0.0)),
    )
    return max(worst, 0.0) / (float(np.abs(b).max()) or 1.0)
