"""Second-order robust weights of Influence Distillation, certified by their gap.

    minimise  -p·w + w·Qw/2 + (λ/2) ‖w‖²   over  w >= 0, Σw = n      (equation 7, η inside Q)

The active set of the paper's appendix G is fast, usually 3 to 7 solves, but it can go in circles: "each move strictly
decreases the objective" does not hold. So every free set is remembered; if one comes back, projected gradient finds a
support and the primal active set, which is finite, ends the work. First order, without Q, is ``simplex_closed_form``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tamis.errors import InvalidInput, NonFinite
from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic
from tamis.solve.simplex_active_set import plain_active_set, primal_active_set
from tamis.solve.simplex_closed_form import lambda_interval
from tamis.solve.simplex_projection import Iterate, project_to_simplex, projected_gradient, relative_gap
from tamis.solve.solution import Solution, Status

__all__ = ["gap_tolerance", "solve_simplex_qp", "solve_simplex_qp_for_count"]

_PLAIN_SOLVES = 60
_GRADIENT_STEPS = 300
_EVALUATIONS = 100
# λ below this share of Q's mean diagonal is not tried: the solves would have no digits left.
_FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5}
_LARGEST = 1e30


def _stop_gap(dtype: torch.dtype) -> float:
    """Once a feasible point is this close, signs of weights and multipliers are rounding."""
    return 1e-14 if dtype == torch.float64 else 1e-7


def gap_tolerance(dtype: torch.dtype) -> float:
    """Largest relative gap that is called optimal: 1e-7 in float64 (small λ costs digits), 1e-5 in float32."""
    return 1e-7 if dtype == torch.float64 else 1e-5


def solve_simplex_qp(
    p: Float[Tensor, " N"],
    quadratic: DenseQuadratic | LowRankQuadratic,
    lam: float,
    *,
    start: Bool[Tensor, " N"] | None = None,
) -> Solution[Float[Tensor, " N"]]:
    """Weights (sum n, dtype of Q) for a given λ > 0.

    Args:
        p: scores, positive = helps; converted to the dtype and device of ``quadratic``.
        quadratic: Q with η in it.
        lam: λ.
        start: the free rows to begin with; by default the support of the solution without Q at this λ.

    Stats: ``lambda``; ``nonzero``; ``gap``, relative to ``|p·w| + w·(Q + λI)w``; ``objective``; ``solves`` of linear
    systems; ``gradient_steps``; ``path``, ``"plain"`` or, where that went in circles, ``"primal"``.

    Raises:
        InvalidInput: no rows, sizes that differ, λ not positive, an empty ``start``, or ``Q + λI`` not positive
            definite on the free rows met (clip Q).
        NonFinite: ``p`` has a NaN or an infinite entry.
    """
    p = _checked(p, quadratic)
    if not 0 < lam < math.inf:
        raise InvalidInput(f"lambda must be a positive number, got {lam}; it makes the weights unique")
    if start is None:
        start = project_to_simplex(p / lam, float(len(p))) > 0  # the first-order weights
    elif start.shape != p.shape or not bool(start.any()):
        raise InvalidInput(f"start must mark at least one of the {len(p)} rows, and have an entry for each")
    stop = _stop_gap(p.dtype)
    iterate, settled = plain_active_set(p, quadratic, lam, start.to(p.device), max_solves=_PLAIN_SOLVES, tolerance=stop)
    if settled and iterate.gap <= gap_tolerance(p.dtype):
        return _solution(iterate, lam, solves=iterate.steps, gradient_steps=0, path="plain")
    solves = iterate.steps
    near = projected_gradient(p, quadratic, lam, iterate.w, max_steps=_GRADIENT_STEPS, tolerance=stop)
    most = 4 * len(p) + 100  # it hardly ever needs more than 40
    last, _ = primal_active_set(p, quadratic, lam, near.w, max_solves=most, tolerance=stop)
    solves += last.steps
    best = min((iterate, near, last), key=lambda point: point.gap)
    return _solution(best, lam, solves=solves, gradient_steps=near.steps, path="primal")


def solve_simplex_qp_for_count(
    p: Float[Tensor, " N"], quadratic: DenseQuadratic | LowRankQuadratic, k: int
) -> Solution[Float[Tensor, " N"]]:
    """Weights (sum n) of which exactly ``k`` are positive: λ by bisection of its logarithm, each solve warm-started.

    Begins at the λ that leaves k without Q (the largest such), so that a vanishing Q gives the first-order weights.
    The number of positive weights need not grow with λ everywhere, and k may not occur: then the solution with the
    least count above k is cut to its k largest weights (ties by index), rescaled to sum n (status ``COUNT_MISSED``).

    Stats: those of ``solve_simplex_qp`` (``solves`` and ``gradient_steps`` over all λ, ``gap`` of the weights
    returned), ``evaluations`` of different λ, ``trimmed``, the number of positive weights that were cut.

    Raises:
        InvalidInput: as ``solve_simplex_qp``, or ``k`` is not between 1 and n.
        NonFinite: ``p`` has a NaN or an infinite entry.
    """
    p = _checked(p, quadratic)
    n = len(p)
    if not 1 <= k <= n:
        raise InvalidInput(f"the number of positive weights must be between 1 and the {n} rows of the pool, got {k}")
    lam = _first_lambda(p, quadratic, k)
    # Without Q, and scores all equal, nothing but the first λ has a size to hold it against.
    floor = _FLOOR[p.dtype] * (quadratic.mean_diagonal or lam)
    below, above = 0.0, math.inf  # λ with fewer than k, with more than k
    step = 1.1  # squared at each: a small Q is done after one or two, any size is reached soon
    least: Solution[Tensor] | None = None
    free: Tensor | None = None
    solves = gradient_steps = evaluations = 0
    while evaluations < _EVALUATIONS:
        found = solve_simplex_qp(p, quadratic, lam, start=free)
        evaluations += 1
        solves += int(found.stats["solves"])
        gradient_steps += int(found.stats["gradient_steps"])
        free = found.value > 0
        count = int(found.stats["nonzero"])
        if count >= k and (least is None or count <= int(least.stats["nonzero"])):
            least = found
        if count == k:
            break
        below, above = (lam, above) if count < k else (below, min(above, lam))
        if (below == 0 and lam <= floor) or below >= _LARGEST or above <= below * (1 + 4 * torch.finfo(p.dtype).eps):
            break
        if below == 0 or above == math.inf:
            lam = min(lam * step, _LARGEST) if below > 0 else max(lam / step, floor)
            step = min(step**2, _LARGEST)
        else:
            lam = math.sqrt(below * above)
    if least is None:  # every weight tends to 1 as λ grows, so only numbers beyond reach come here
        raise InvalidInput(f"no lambda up to {lam:.3g} leaves {k} positive weights; scale p and Q down together")
    spent: dict[str, float | int | str] = {
        "solves": solves,
        "gradient_steps": gradient_steps,
        "evaluations": evaluations,
    }
    return _cut(least, p, quadratic, k, spent)


def _first_lambda(p: Tensor, quadratic: DenseQuadratic | LowRankQuadratic, k: int) -> float:
    """The λ of the first-order weights, or one of Q's size if scores that are all equal give none."""
    scores = p.double().cpu().numpy()
    low, high = lambda_interval(scores, k)
    lam = high if k < len(p) else low + float(scores.max() - scores.min())
    return lam or quadratic.mean_diagonal or 1.0


def _cut(
    found: Solution[Tensor],
    p: Tensor,
    quadratic: DenseQuadratic | LowRankQuadratic,
    k: int,
    spent: dict[str, float | int | str],
) -> Solution[Tensor]:
    """The k largest weights, rescaled; the solution itself if there are no more."""
    trimmed = int(found.stats["nonzero"]) - k
    if not trimmed:
        return Solution(value=found.value, status=found.status, stats={**found.stats, **spent, "trimmed": 0})
    kept = found.value.sort(descending=True, stable=True).indices[:k]
    w = torch.zeros_like(p)
    w[kept] = (found.value[kept].double() * (len(p) / found.value[kept].double().sum())).to(p.dtype)
    gap, objective, _ = relative_gap(p, quadratic.apply(w), w, float(found.stats["lambda"]))
    changed = {"nonzero": k, "gap": gap, "objective": objective, "trimmed": trimmed}
    return Solution(value=w, status=Status.COUNT_MISSED, stats={**found.stats, **spent, **changed})


def _checked(p: Tensor, quadratic: DenseQuadratic | LowRankQuadratic) -> Tensor:
    if len(p) == 0:
        raise InvalidInput("there are no rows to weigh; the pool is empty")
    if len(p) != quadratic.size:
        raise InvalidInput(f"Q is for {quadratic.size} rows, but there are {len(p)} scores; give both for one pool")
    if not bool(torch.isfinite(p).all()):
        rows = (~torch.isfinite(p)).nonzero()[:, 0].tolist()
        raise NonFinite(
            f"{len(rows)} of {len(p)} scores are NaN or infinite, the first in row {rows[0]}; leave such rows out",
            rows=tuple(rows[:10]),
        )
    return p.to(dtype=quadratic.dtype, device=quadratic.device)


def _solution(iterate: Iterate, lam: float, *, solves: int, gradient_steps: int, path: str) -> Solution[Tensor]:
    certified = iterate.gap <= gap_tolerance(iterate.w.dtype)
    return Solution(
        value=iterate.w,
        status=Status.OPTIMAL if certified else Status.INACCURATE,
        stats={
            "lambda": lam,
            "nonzero": int((iterate.w > 0).sum()),
            "gap": iterate.gap,
            "objective": iterate.objective,
            "solves": solves,
            "gradient_steps": gradient_steps,
            "path": path,
        },
    )
