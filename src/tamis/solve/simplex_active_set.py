"""Active sets for the robust weights: the plain one of the paper, which can cycle, and the primal one, which cannot.

    minimise  -p·w + w·(Q + λI)w / 2   over  w >= 0, Σw = n

On a set B of free rows the minimum is ``w_B = R_BB^{-1} (p_B + τ 1)`` with τ such that it sums to n; every other row
has the multiplier ``α_i = (R w)_i - p_i - τ``. ``w_B >= 0`` and ``α >= 0`` together make it the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic
from tamis.solve.simplex_projection import Iterate, relative_gap

__all__ = ["Subspace", "minimise_on", "plain_active_set", "plain_step", "primal_active_set", "sign_tolerance"]


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """The minimum on the free rows, where weights may still be negative, and the multipliers of the other rows."""

    w: Tensor  # (N,), zero off the free rows
    qw: Tensor  # (N,) Q w
    alpha: Tensor  # (N,), zero on the free rows


def sign_tolerance(dtype: torch.dtype) -> float:
    """What counts as negative, relative to the largest entry of its vector: 1e-12 in float64, 1e-6 in float32."""
    return 1e-12 if dtype == torch.float64 else 1e-6


def minimise_on(
    free: Bool[Tensor, " N"], p: Float[Tensor, " N"], quadratic: DenseQuadratic | LowRankQuadratic, lam: float
) -> Subspace:
    """Equations 49-51 of Influence Distillation: the minimum with only the ``free`` rows (at least one) in play."""
    total = float(p.shape[0])
    own = p[free]
    # Only differences of p matter: without its mean, R^{-1} p is not the difference of two large vectors.
    offset = own.double().mean().to(p.dtype)
    solved = quadratic.solve(free, torch.stack([own - offset, torch.ones_like(own)], dim=1), lam)
    sums = solved.double().sum(0)
    tau = (total - float(sums[0])) / float(sums[1])
    on_free = solved[:, 0].double() + tau * solved[:, 1].double()
    # A weight of rounding size is none: it would count as a selected row.
    on_free[on_free.abs() <= sign_tolerance(p.dtype) * on_free.abs().max()] = 0
    on_free *= total / on_free.sum()  # the last digits, which the certificate would otherwise miss
    w = torch.zeros_like(p)
    w[free] = on_free.to(p.dtype)
    qw = quadratic.apply(w)
    alpha = (qw.double() - p.double() - (tau - float(offset))).to(p.dtype)
    alpha[free] = 0
    return Subspace(w=w, qw=qw, alpha=alpha)


def plain_step(free: Bool[Tensor, " N"], found: Subspace) -> Bool[Tensor, " N"]:
    """The next free set of the paper's algorithm: all negative weights out, all negative multipliers in."""
    tolerance = sign_tolerance(found.w.dtype)
    leaving = free & (found.w < -tolerance * found.w.abs().max())
    entering = ~free & (found.alpha < -tolerance * _alpha_scale(found))
    return (free & ~leaving) | entering


def plain_active_set(
    p: Float[Tensor, " N"],
    quadratic: DenseQuadratic | LowRankQuadratic,
    lam: float,
    start: Bool[Tensor, " N"],
    *,
    max_solves: int = 60,
    tolerance: float = 0.0,
) -> tuple[Iterate, bool]:
    """The paper's active set (appendix G) from the free set ``start``, with an eye on sets seen before.

    Returns the last point, made feasible, and whether it is settled: no sign is wrong, or its relative gap is at most
    ``tolerance``. Not settled means that a set came back or ``max_solves`` were spent; steps count solves.
    """
    free = start
    seen = set()
    for solves in range(1, max_solves + 1):
        found = minimise_on(free, p, quadratic, lam)
        following = plain_step(free, found)
        settled = bool((following == free).all())
        if settled or not bool((free & ~following).any()):  # no weight is negative: the point is feasible
            iterate = feasible(found, p, quadratic, lam, solves)
            if settled or iterate.gap <= tolerance:
                return iterate, True
        seen.add(_key(free))
        if _key(following) in seen:
            break
        free = following
    return feasible(found, p, quadratic, lam, solves), False


def primal_active_set(
    p: Float[Tensor, " N"],
    quadratic: DenseQuadratic | LowRankQuadratic,
    lam: float,
    start: Float[Tensor, " N"],
    *,
    max_solves: int,
    tolerance: float = 0.0,
) -> tuple[Iterate, bool]:
    """The active set that keeps ``w`` feasible, from a feasible ``start``: finite, since minima only get lower.

    Solve on the free rows; walk towards the solution until a weight hits zero and drop what hits; only where the whole
    way is open, and this is the minimum of the subspace, add the row with the most negative multiplier.

    Returns the last subspace minimum and whether it is settled as in ``plain_active_set``. Not settled means that
    ``max_solves`` were spent, or that rounding keeps the objective from falling any further.
    """
    w, free = start, start > 0
    best: Iterate | None = None
    solves = 0
    while solves < max_solves:
        found = minimise_on(free, p, quadratic, lam)
        solves += 1
        size = sign_tolerance(p.dtype) * found.w.abs().max()
        blocking = free & (found.w < -size)
        if bool(blocking.any()):
            room = w[blocking] / (w[blocking] - found.w[blocking])
            share = room.min()
            w = w + share * (found.w - w)
            hit = torch.zeros_like(free)
            hit[blocking] = room <= share
            free = free & ~hit
            w = torch.where(free, w, torch.zeros_like(w)).clamp_(min=0)
            continue
        iterate = feasible(found, p, quadratic, lam, solves)
        entering = ~free & (found.alpha < -sign_tolerance(p.dtype) * _alpha_scale(found))
        if iterate.gap <= tolerance or not bool(entering.any()):
            return iterate, True
        if best is not None and iterate.objective >= best.objective:
            return best, False
        best = iterate
        w = iterate.w
        free = free.clone()
        free[found.alpha.argmin()] = True
    return best if best is not None else _at(w, p, quadratic, lam, solves), False


def feasible(
    found: Subspace, p: Tensor, quadratic: DenseQuadratic | LowRankQuadratic, lam: float, steps: int
) -> Iterate:
    """The point with its negative weights (rounding, or a set not yet right) at zero and its sum restored."""
    if bool((found.w >= 0).all()):
        gap, objective, gradient = relative_gap(p, found.qw, found.w, lam)
        return Iterate(w=found.w, gradient=gradient, gap=gap, objective=objective, steps=steps)
    w = found.w.double().clamp(min=0)
    return _at((w * (len(p) / w.sum())).to(p.dtype), p, quadratic, lam, steps)


def _at(w: Tensor, p: Tensor, quadratic: DenseQuadratic | LowRankQuadratic, lam: float, steps: int) -> Iterate:
    gap, objective, gradient = relative_gap(p, quadratic.apply(w), w, lam)
    return Iterate(w=w, gradient=gradient, gap=gap, objective=objective, steps=steps)


def _alpha_scale(found: Subspace) -> Tensor:
    """Multipliers are differences of products and scores: rounding is relative to the largest of these."""
    return torch.maximum(found.qw.abs().max(), found.alpha.abs().max())


def _key(free: Tensor) -> bytes:
    """The free set as bytes, one bit a row."""
    bits = torch.nn.functional.pad(free.to(torch.uint8), (0, -len(free) % 8)).view(-1, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8, device=free.device)).sum(1).to(torch.uint8)
    return bytes(packed.cpu().numpy())
