"""Projection onto the scaled simplex, and projected gradient for the robust weights: finds the support, not the digits.

Used where the active set goes in circles, and at very high rank, where one solve costs more than many gradient steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic

__all__ = ["Iterate", "project_to_simplex", "projected_gradient", "relative_gap"]

# Steps between two looks at the gap, and of the power iteration that starts the step length.
_CHECK_EVERY = 10
_POWER_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """A feasible point with its gradient and certificate."""

    w: Tensor  # (N,) >= 0, sum n
    gradient: Tensor  # (N,) of the objective at w
    gap: float  # relative
    objective: float
    steps: int


def project_to_simplex(v: Float[Tensor, " N"], total: float) -> Float[Tensor, " N"]:
    """The nearest point to ``v`` with entries >= 0 and sum ``total`` > 0: ``(v - θ)_+``, θ from one float64 sort."""
    ordered = v.double().sort(descending=True).values
    counts = torch.arange(1, len(v) + 1, dtype=torch.float64, device=v.device)
    thetas = (ordered.cumsum(0) - total) / counts
    support = int((ordered > thetas).sum())  # a prefix; never empty, since the first is v_max - total < v_max
    return (v.double() - thetas[max(support, 1) - 1]).clamp_(min=0).to(v.dtype)


def relative_gap(
    p: Float[Tensor, " N"], qw: Float[Tensor, " N"], w: Float[Tensor, " N"], lam: float
) -> tuple[float, float, Tensor]:
    """Certificate, objective and gradient at a feasible ``w`` whose product ``Q w`` is ``qw``.

    ``gap = ∇f·w - n min ∇f >= f(w) - f*``, divided by ``|p·w| + w·(Q + λI)w``; sums in float64.
    """
    weights, linear = w.double(), p.double()
    curved = qw.double() + lam * weights
    gradient = curved - linear
    least = gradient.min()
    gap = float(((gradient - least) * weights).sum())  # the n of n·min is the sum of w: nothing large to cancel
    first, second = float(linear @ weights), float(curved @ weights)
    scale = abs(first) + abs(second)
    return (gap / scale if gap > 0 and scale > 0 else 0.0), second / 2 - first, gradient.to(p.dtype)


def projected_gradient(
    p: Float[Tensor, " N"],
    quadratic: DenseQuadratic | LowRankQuadratic,
    lam: float,
    start: Float[Tensor, " N"],
    *,
    max_steps: int = 300,
    tolerance: float = 0.0,
) -> Iterate:
    """Accelerated projected gradient from a feasible ``start``, restarted when momentum points uphill.

    Stops after ``max_steps`` steps, or once the relative gap is at most ``tolerance``. One step costs one product with
    Q (two if the step length must shrink).
    """
    total = float(p.shape[0])
    x, qx = start, quadratic.apply(start)
    y, qy = x, qx
    curvature = _largest_eigenvalue(quadratic, p) * 1.02 + lam
    momentum = 1.0
    best = _iterate(p, qx, x, lam, 0)
    for step in range(1, max_steps + 1):
        gradient = qy + lam * y - p
        while True:
            x_new = project_to_simplex(y - gradient / curvature, total)
            q_new = quadratic.apply(x_new)
            moved = x_new - y
            # For a quadratic the step is safe exactly if the curvature along it is no more than assumed.
            square = float(moved.double() @ moved.double())
            along = float(moved.double() @ (q_new - qy).double()) + lam * square
            rounding = 8 * torch.finfo(p.dtype).eps * float(q_new.double().norm()) * square**0.5
            if along <= curvature * square * (1 + 1e-6) + rounding:
                break
            curvature *= 1.5
        if float((y - x_new).double() @ (x_new - x).double()) > 0:
            momentum, y, qy = 1.0, x_new, q_new
        else:
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            share = (momentum - 1) / following
            y, qy = x_new + share * (x_new - x), q_new + share * (q_new - qx)
            momentum = following
        x, qx = x_new, q_new
        if step % _CHECK_EVERY == 0 or step == max_steps:
            current = _iterate(p, qx, x, lam, step)
            best = current if current.objective <= best.objective else best
            if current.gap <= tolerance:
                return current
    return best


def _iterate(p: Tensor, qw: Tensor, w: Tensor, lam: float, steps: int) -> Iterate:
    gap, objective, gradient = relative_gap(p, qw, w, lam)
    return Iterate(w=w, gradient=gradient, gap=gap, objective=objective, steps=steps)


def _largest_eigenvalue(quadratic: DenseQuadratic | LowRankQuadratic, p: Tensor) -> float:
    """From below, by power iteration; the step length is checked at every step anyway."""
    # A fixed start that is neither constant nor along p, which may both be eigenvectors of other eigenvalues.
    vector = torch.cos(torch.arange(1, len(p) + 1, dtype=torch.float64, device=p.device) ** 2).to(p.dtype)
    size = 0.0
    for _ in range(_POWER_STEPS):
        vector = vector / vector.norm()
        vector = quadratic.apply(vector)
        size = float(vector.norm())
        if size == 0:
            return 0.0
    return size
