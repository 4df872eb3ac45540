"""Slow and certain references for the solvers, and the random problems they are compared on."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

F64 = npt.NDArray[np.float64]

# What makes robust weights hard, each in its own way.
PROBLEM_KINDS = ("rank-deficient", "full-rank", "all-negative", "ties", "correlated", "repeated rows")


def objective(w: F64, p: F64, r: F64) -> float:
    """``-p·w + w·Rw/2``."""
    return float(-p @ w + w @ r @ w / 2)


def enumerated_weights(p: F64, r: F64) -> F64:
    """The minimum over the simplex with sum n, for n <= 10: the lowest feasible minimum over all free sets."""
    n = len(p)
    best, lowest = np.zeros(n), np.inf
    for size in range(1, n + 1):
        for chosen in combinations(range(n), size):
            rows = list(chosen)
            system = np.zeros((size + 1, size + 1))
            system[:size, :size] = r[np.ix_(rows, rows)]
            system[:size, size] = system[size, :size] = 1
            solved = np.linalg.solve(system, np.append(p[rows], n))[:size]
            if (solved < 0).any():
                continue
            w = np.zeros(n)
            w[rows] = solved
            if objective(w, p, r) < lowest:
                best, lowest = w, objective(w, p, r)
    return best


def weights_at_lambda(p: F64, lam: float) -> F64:
    """The first-order solution for a given λ: ``w = (p + τ)_+ / λ``, with as many positive weights as sum to n."""
    n = len(p)
    ordered = np.sort(p)[::-1]
    # L_(k+1) - L_k = k (p_(k) - p_(k+1)): a sum of terms >= 0, with no large sums to cancel.
    sums = np.concatenate([[0.0], np.cumsum(np.arange(1, n) * (ordered[:-1] - ordered[1:]))])
    k = int(np.searchsorted(sums, n * lam, side="left"))
    # p + τ = (p - p_(k)) + (nλ - L_k)/k, which stays positive for the k-th row in floating point too.
    weights = np.maximum(p - ordered[k - 1] + (n * lam - sums[k - 1]) / k, 0)
    return np.asarray(weights * (n / weights.sum()))


def slsqp_objective(p: F64, r: F64) -> float:
    """The minimum as sequential quadratic programming finds it, from equal weights."""
    n = len(p)
    found = minimize(
        objective,
        np.ones(n),
        args=(p, r),
        jac=lambda w, p, r: r @ w - p,
        bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - n, "jac": lambda w: np.ones(n)},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return float(found.fun)


def kkt_violation(w: F64, p: F64, r: F64) -> float:
    """How far ``w`` is from the optimality conditions, relative to the size of what they compare."""
    n = len(p)
    gradient = r @ w - p
    # Tau, the multiplier of the sum, as the weighted mean of the gradient: exact at the optimum.
    tau = gradient @ w / n
    size = max(np.abs(r @ w).max(), np.abs(p).max(), 1e-300)
    off_support = max(0.0, float((tau - gradient).max()))
    on_support = float((np.abs(gradient - tau) * w).sum() / n)
    return max(abs(w.sum() - n) / n, float(-w.min()) / n, off_support / size, on_support / size)


def random_problem(kind: str, seed: int, *, max_rows: int = 30) -> tuple[F64, F64, float]:
    """Scores, a root U of Q, and λ."""
    rng = np.random.default_rng([PROBLEM_KINDS.index(kind), seed])
    n = int(rng.integers(1, max_rows + 1))
    rank = int(rng.integers(1, min(n, 12) + 1))
    u, p = rng.standard_normal((n, rank)), 3 * rng.standard_normal(n)
    lam = 10 ** rng.uniform(-2, 1)
    if kind == "rank-deficient":
        lam = 10 ** rng.uniform(-4, -1)
    elif kind == "full-rank":
        u = rng.standard_normal((n, n))
    elif kind == "all-negative":
        p = -5 * np.abs(p)
    elif kind == "ties":
        u, p, lam = rng.integers(-3, 4, (n, rank)).astype(float), rng.integers(-6, 7, n).astype(float), 0.01
    elif kind == "correlated":
        u = rng.standard_normal((n, 1)) @ rng.standard_normal((1, rank)) + 0.1 * u
        p = u @ rng.standard_normal(rank) * 3
    else:
        rows = rng.integers(0, n, n)
        u, p = u[rows], p[rows]
    return p, u, float(lam)
