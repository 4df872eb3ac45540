"""First-order robust weights of Influence Distillation, in closed form from one sort (or none).

    minimise  -p·w + (λ/2) ‖w‖²   over  w >= 0, Σw = n

Positive ``p_i`` means that training on row i lowers the target loss. Only differences of ``p`` matter. With ``p``
descending, ``S_k`` the sum of the k largest and ``L_k = S_k - k p_(k)`` (never decreasing, ``L_1 = 0``,
``L_(n+1) = ∞``), exactly k weights are positive if and only if ``L_k / n < λ <= L_(k+1) / n``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from tamis.errors import InvalidInput, NonFinite
from tamis.solve.solution import Solution, Status

__all__ = ["lambda_interval", "weights_for_count"]

_F64 = npt.NDArray[np.float64]


def weights_for_count(
    p: Float[np.ndarray, " N"], k: int, *, break_ties: bool = False
) -> Solution[Float[np.ndarray, " N"]]:
    """Weights (float64, sum n) of which exactly ``k`` are positive, at the largest λ that leaves so many.

    At that λ they are the margins over the best rejected row, scaled, and λ itself is not needed::

        w_i = n (p_i - p_(k+1))_+ / Σ_j (p_j - p_(k+1))_+

    ``k = n`` has no rejected row: ``w ∝ p - min p + (max p - min p)``, so that the largest weight is at most twice the
    smallest. If all margins are zero, the first k of the tied rows by index get equal weights.

    Where ``p_(k) = p_(k+1)``, no λ leaves k. The optimum at ``λ = L_k / n`` is returned then, in which fewer than k
    weights are positive (status ``TIED``); with ``break_ties`` the tied rows beyond the k-th by index count as absent,
    so that k are (status ``TIES_BROKEN``; the gap is that of the problem without them).

    Stats: ``lambda`` and its interval ``lambda_low`` (excluded) to ``lambda_high`` (included; infinite for k = n);
    ``nonzero``; ``tied_rows``, how many rows have the boundary's score if they do not all fit, else 0; ``gap``, the
    certified distance from the optimum relative to ``|p·w| + λ w·w``.

    One partial sort; beside the input it holds a copy and a few float64 vectors of its length.

    Raises:
        InvalidInput: there are no rows, or ``k`` is not between 1 and n.
        NonFinite: ``p`` has a NaN or an infinite entry.
    """
    n = _check(p, k)
    if k == n:
        return _weights_of_all(p, total=n, status=Status.OPTIMAL, tied_rows=0)
    ordered = np.partition(p, (n - k - 1, n - k))  # ascending around the two places that matter
    rejected, kept = ordered[n - k - 1], ordered[n - k]
    tied = kept == rejected
    if tied and break_ties:
        del ordered
        return _without_later_ties(p, k, kept)
    low, high = (_sum_above(ordered[n - k :], bound) / n for bound in (kept, rejected))
    del ordered
    tied_rows = int(np.count_nonzero(p == kept)) if tied else 0
    if high > 0:
        weights = _scaled_margins(p, rejected, total=n)
        optimum = high
    else:  # the k best rows and the next one all have the same score
        weights = np.zeros(n)
        weights[np.flatnonzero(p == kept)[:k]] = n / k
        optimum = 0.0
    status = Status.TIED if tied else Status.OPTIMAL
    stats = _stats(p, weights, optimum, (low, high), total=n, tied_rows=tied_rows)
    return Solution(value=weights, status=status, stats=stats)


def lambda_interval(p: Float[np.ndarray, " N"], k: int) -> tuple[float, float]:
    """``(L_k / n, L_(k+1) / n)``: every λ above the first and up to the second leaves exactly k positive weights.

    The two are equal, and no λ leaves k, where rows k and k + 1 tie. The second is infinite for k = n.

    Raises:
        InvalidInput: there are no rows, or ``k`` is not between 1 and n.
        NonFinite: ``p`` has a NaN or an infinite entry.
    """
    n = _check(p, k)
    if k == n:
        return _sum_above(p, p.min()) / n, np.inf
    ordered = np.partition(p, (n - k - 1, n - k))
    top = ordered[n - k :]
    return _sum_above(top, ordered[n - k]) / n, _sum_above(top, ordered[n - k - 1]) / n


def _check(p: npt.NDArray[np.floating], k: int) -> int:
    n = len(p)
    if n == 0:
        raise InvalidInput("there are no rows to weigh; the pool is empty")
    if not 1 <= k <= n:
        raise InvalidInput(f"the number of positive weights must be between 1 and the {n} rows of the pool, got {k}")
    if not np.isfinite(p).all():
        rows = np.flatnonzero(~np.isfinite(p))
        raise NonFinite(
            f"{len(rows)} of {n} scores are NaN or infinite, the first in row {rows[0]}; leave such rows out",
            rows=tuple(int(row) for row in rows[:10]),
        )
    return n


def _sum_above(values: npt.NDArray[np.floating], bound: np.floating) -> float:
    """``Σ (v - bound)`` in float64, the differences first: sums of large equal parts would lose the digits."""
    return float((values.astype(np.float64) - float(bound)).sum())


def _scaled_margins(p: npt.NDArray[np.floating], bound: np.floating, *, total: int) -> _F64:
    weights = p.astype(np.float64)
    weights -= float(bound)
    np.maximum(weights, 0, out=weights)
    weights /= weights.sum()  # before the factor: n divided by a subnormal sum would overflow
    weights *= total
    return weights


def _weights_of_all(
    p: npt.NDArray[np.floating], *, total: int, status: Status, tied_rows: int
) -> Solution[npt.NDArray[np.float64]]:
    """All weights positive: any λ above ``L_n / n``; here the one at which the largest is twice the smallest."""
    smallest, spread = float(p.min()), float(p.max()) - float(p.min())
    # Divided by the spread first, which may be so small that its inverse overflows.
    weights = (p.astype(np.float64) - smallest) / spread + 1 if spread > 0 else np.ones(len(p))
    units = float(weights.sum())
    lam = spread * units / total if spread > 0 else 1.0  # equal scores: weights are equal at every λ
    weights *= total / units
    low = _sum_above(p, p.min()) / total
    stats = _stats(p, weights, lam, (low, np.inf), total=total, tied_rows=tied_rows)
    return Solution(value=weights, status=status, stats=stats)


def _without_later_ties(p: npt.NDArray[np.floating], k: int, kept: np.floating) -> Solution[npt.NDArray[np.float64]]:
    """As if the rows with score ``kept`` that no longer fit, the last ones by index, were not there."""
    n = len(p)
    ties = np.flatnonzero(p == kept)
    fitting = k - int(np.count_nonzero(p > kept))
    there = np.ones(n, dtype=np.bool_)
    there[ties[fitting:]] = False
    rest = p[there]
    lower = rest[rest < kept]
    if len(lower) == 0:
        inner = _weights_of_all(rest, total=n, status=Status.TIES_BROKEN, tied_rows=len(ties))
        values, stats = inner.value, inner.stats
    else:
        top = rest[rest >= kept]
        low, high = (_sum_above(top, bound) / n for bound in (kept, lower.max()))
        values = _scaled_margins(rest, lower.max(), total=n)
        stats = _stats(rest, values, high, (low, high), total=n, tied_rows=len(ties))
    weights = np.zeros(n)
    weights[there] = values
    return Solution(value=weights, status=Status.TIES_BROKEN, stats=stats)


def _stats(
    p: npt.NDArray[np.floating],
    weights: _F64,
    lam: float,
    interval: tuple[float, float],
    *,
    total: int,
    tied_rows: int,
) -> dict[str, float | int | str]:
    """The certificate: ``∇f·w - total · min ∇f`` bounds ``f(w) - f*`` for every feasible w."""
    q = p.astype(np.float64)
    best = float(q.max())
    scale = abs(float(q @ weights)) + lam * float(weights @ weights)
    np.subtract(lam * weights, q - best, out=q)  # the gradient, shifted by a constant that cancels in the gap
    gap = max(0.0, float(q @ weights) - total * float(q.min()))
    return {
        "lambda": float(lam),
        "lambda_low": float(interval[0]),
        "lambda_high": float(interval[1]),
        "nonzero": int(np.count_nonzero(weights)),
        "tied_rows": tied_rows,
        "gap": gap / scale if gap > 0 else 0.0,
    }
