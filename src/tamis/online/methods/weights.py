"""Weights and scales of one online step, from inner products alone. ``b`` are alignments, ``gram`` interactions.

All in float64 numpy: a step has a few dozen candidates. Every ridge is a multiple of the mean diagonal of the Gram
matrix of the set solved on, so that nothing here depends on the unit of the loss.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tamis.errors import InvalidSettings
from tamis.online.methods.choice import Lengths, Vector
from tamis.solve.nnls import solve_nnls, solve_ridge
from tamis.solve.solution import Solution

__all__ = [
    "LEAST_RIDGE",
    "anchored_weights",
    "check_ridge",
    "matching_weights",
    "positive_scale",
    "target_scale",
    "tilted_weights",
]

LEAST_RIDGE = 1e-3  # below it, rounding and projection decide what the weights are


def target_scale(b: Vector, gram: Vector, rows: npt.NDArray[np.int64]) -> float | None:
    """``c = (1_T^T G 1_T) / (1_T^T b)`` over ``rows`` = T: the length the target must have to be matched by T's sum.

    Without it a sum of noisy gradients never has the length of one mean gradient, and the filter's choice depends on
    the unit of the loss: a loss times κ multiplies the published ``b`` by κ, since ``D`` takes one κ away, and its raw
    ``G`` by κ². None where numerator or denominator is not positive: no scale makes that target look like that sum.
    """
    return _ratio(float(gram[np.ix_(rows, rows)].sum()), float(b[rows].sum()))


def positive_scale(b: Vector, known: Vector | Lengths) -> float | None:
    """``c_P``: the same over ``P = {b_i > 0}``, from ``G`` or from lengths; None if that set is empty or has no length.

    Of ``G`` only ``1_P^T G 1_P`` takes part, the squared length of the sum of P's gradients.
    """
    if isinstance(known, Lengths):
        return _ratio(known.aligned, float(b[b > 0].sum()))
    return target_scale(b, known, np.flatnonzero(b > 0).astype(np.int64))


def matching_weights(b: Vector, gram: Vector, *, scale: float, ridge: float, bounded: bool) -> Solution[Vector]:
    """``argmin w^T (G + λI) w - 2 c b^T w`` with ``λ = ridge · mean diag G``; over ``w >= 0`` if ``bounded``.

    Equation 6 of *Filter-then-Weight* in Gram form. The weights as they come, not normalised.
    """
    unit = _mean(np.diag(gram))
    solve = solve_nnls if bounded else solve_ridge
    return solve(gram / unit, scale * b / unit, ridge=ridge)


def anchored_weights(b: Vector, gram: Vector, *, scale: float, ridge: float) -> Solution[Vector]:
    """``argmin_{w >= 0} w^T (G + λI) w - 2 (c b + λ 1)^T w``, ``λ = ridge · mean diag G``: a ridge towards 1.

    ``scale`` is ``c_P``. Large ridges leave every candidate near weight 1, small ones approach plain matching.
    """
    unit = _mean(np.diag(gram))
    return solve_nnls(gram / unit, scale * b / unit + ridge, ridge=ridge)


def tilted_weights(b: Vector, squares: Vector, *, scale: float, ridge: float) -> Vector:
    """``w_i = max(0, 1 + c b_i / λ)``, ``λ = ridge · mean of squares``: anchored weights without the interactions.

    ``scale`` is ``c_P``, ``squares`` the diagonal of ``G``.
    """
    weights: Vector = np.maximum(0.0, 1 + scale * b / (ridge * _mean(squares)))
    return weights


def check_ridge(ridge: float | None) -> None:
    """Refuse ridges that leave weights to rounding.

    Raises:
        InvalidSettings: with the least that is accepted.
    """
    if ridge is not None and not LEAST_RIDGE <= ridge < float("inf"):
        raise InvalidSettings(f"ridge must be at least {LEAST_RIDGE} (times the mean diagonal), got {ridge}")


def _ratio(curvature: float, gain: float) -> float | None:
    return curvature / gain if curvature > 0 and gain > 0 else None


def _mean(squares: Vector) -> float:
    mean = float(squares.mean()) if len(squares) else 0.0
    return mean if mean > 0 else 1.0  # all gradients zero: nothing to scale
