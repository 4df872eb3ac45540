"""Weights and scales of one online step, from inner products alone. ``b`` are alignments, ``gram`` interactions.

All in float64 numpy: a step has a few dozen candidates. Every ridge is a multiple of the mean diagonal of the Gram
matrix of the set solved on, so that nothing here depends on the unit of the loss.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tamis.online.choice import Vector
from tamis.solve.nnls import solve_nnls, solve_ridge
from tamis.solve.solution import Solution

__all__ = ["anchored_weights", "matching_weights", "positive_scale", "target_scale", "tilted_weights"]


def target_scale(b: Vector, gram: Vector, rows: npt.NDArray[np.int64]) -> float | None:
    """``c = (1_T^T G 1_T) / (1_T^T b)`` over ``rows`` = T: the length the target must have to be matched by T's sum.

    Without it a sum of noisy gradients never has the length of one mean gradient, and the filter's choice depends on
    the unit of the loss (specification of the method, section 4). None where numerator or denominator is not
    positive: no scale makes that target look like that sum.
    """
    curvature = float(gram[np.ix_(rows, rows)].sum())
    gain = float(b[rows].sum())
    return curvature / gain if curvature > 0 and gain > 0 else None


def positive_scale(b: Vector, gram: Vector) -> float | None:
    """``c_P``: the same over ``P = {b_i > 0}``; None if that set is empty or has no length."""
    return target_scale(b, gram, np.flatnonzero(b > 0).astype(np.int64))


def matching_weights(b: Vector, gram: Vector, *, scale: float, ridge: float, bounded: bool) -> Solution[Vector]:
    """``argmin w^T (G + λI) w - 2 c b^T w`` with ``λ = ridge · mean diag G``; over ``w >= 0`` if ``bounded``.

    Equation 6 of *Filter-then-Weight* in Gram form. The weights as they come, not normalised.
    """
    unit = _mean_diagonal(gram)
    solve = solve_nnls if bounded else solve_ridge
    return solve(gram / unit, scale * b / unit, ridge=ridge)


def anchored_weights(b: Vector, gram: Vector, *, ridge: float) -> Solution[Vector] | None:
    """``argmin_{w >= 0} w^T (G + λI) w - 2 (c_P b + λ 1)^T w``, ``λ = ridge · mean diag G``: a ridge towards 1.

    Large ridges leave every candidate near weight 1, small ones approach plain matching. None where ``c_P`` is not
    defined: then no candidate is aligned, and all weights are 1.
    """
    scale = positive_scale(b, gram)
    if scale is None:
        return None
    unit = _mean_diagonal(gram)
    return solve_nnls(gram / unit, scale * b / unit + ridge, ridge=ridge)


def tilted_weights(b: Vector, gram: Vector, *, ridge: float) -> Vector | None:
    """``w_i = max(0, 1 + c_P b_i / λ)``, ``λ = ridge · mean diag G``: anchored weights without the interactions.

    None where ``c_P`` is not defined: then all weights are 1.
    """
    scale = positive_scale(b, gram)
    if scale is None:
        return None
    weights: Vector = np.maximum(0.0, 1 + scale * b / (ridge * _mean_diagonal(gram)))
    return weights


def _mean_diagonal(gram: Vector) -> float:
    mean = float(np.diag(gram).mean()) if len(gram) else 0.0
    return mean if mean > 0 else 1.0  # all gradients zero: nothing to scale
