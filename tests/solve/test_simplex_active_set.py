from itertools import pairwise

import numpy as np
import pytest
import torch

from solver_oracles import PROBLEM_KINDS, kkt_violation, objective, random_problem
from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic
from tamis.solve.simplex_active_set import (
    minimise_on,
    plain_active_set,
    plain_step,
    primal_active_set,
    sign_tolerance,
)

F64 = torch.float64
CYCLE_U = torch.tensor([[0.0, -1.0], [-3.0, 3.0], [3.0, -3.0], [-1.0, 0.0]], dtype=F64)
CYCLE_P = torch.tensor([6.0, 1.0, -6.0, 6.0], dtype=F64)


@pytest.mark.parametrize("quadratic", [DenseQuadratic(CYCLE_U @ CYCLE_U.T), LowRankQuadratic(CYCLE_U)])
def test_the_papers_active_set_goes_in_circles_on_the_published_case(
    quadratic: DenseQuadratic | LowRankQuadratic,
) -> None:
    free, visited = torch.ones(4, dtype=torch.bool), []
    for _ in range(11):
        visited.append(free.nonzero()[:, 0].tolist())
        free = plain_step(free, minimise_on(free, CYCLE_P, quadratic, 0.01))
    circle = [[0, 1], [0, 1, 3], [3], [0, 2, 3]]
    assert visited == [[0, 1, 2, 3], *circle, *circle, *circle[:2]]
    iterate, settled = plain_active_set(CYCLE_P, quadratic, 0.01, torch.ones(4, dtype=torch.bool))
    assert not settled and iterate.steps == 5  # stopped as soon as a set came back
    assert float(iterate.w.sum()) == pytest.approx(4) and float(iterate.w.min()) >= 0 and iterate.gap > 0.1


def test_the_minimum_on_free_rows_solves_equation_50() -> None:
    rng = np.random.default_rng(0)
    u, p = rng.standard_normal((6, 2)), rng.standard_normal(6)
    r = u @ u.T + 0.3 * np.eye(6)
    rows = [0, 2, 5]
    free = torch.zeros(6, dtype=torch.bool)
    free[rows] = True
    found = minimise_on(free, torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u)), 0.3)
    inverse = np.linalg.inv(r[np.ix_(rows, rows)])
    tau = (6 - (inverse @ p[rows]).sum()) / inverse.sum()
    w = np.zeros(6)
    w[rows] = inverse @ (p[rows] + tau)
    np.testing.assert_allclose(found.w, w, rtol=0, atol=1e-12)
    alpha = r @ w - p - tau
    np.testing.assert_allclose(found.alpha, np.where(free, 0, alpha), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", PROBLEM_KINDS)
def test_the_primal_active_set_ends_at_the_optimum_without_help(kind: str) -> None:
    for seed in range(200, 212):
        p, u, lam = random_problem(kind, seed)
        n = len(p)
        first = torch.zeros(n, dtype=F64)
        first[int(np.argmin(p))] = n  # the worst feasible point there is, in first order
        iterate, _ = primal_active_set(
            torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u)), lam, first, max_solves=4 * n + 100
        )
        assert kkt_violation(iterate.w.numpy(), p, u @ u.T + lam * np.eye(n)) <= 1e-7
        assert iterate.steps <= 4 * n


def test_every_subspace_minimum_of_the_primal_active_set_is_lower_than_the_last() -> None:
    p, u, lam = random_problem("rank-deficient", 9)
    n, r = len(p), u @ u.T + lam * np.eye(len(p))
    start = torch.zeros(n, dtype=F64)
    start[0] = n
    reached = []
    for limit in range(1, 40):
        iterate, settled = primal_active_set(
            torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u)), lam, start, max_solves=limit
        )
        assert float(iterate.w.min()) >= 0 and float(iterate.w.sum()) == pytest.approx(n, rel=1e-12)
        reached.append(objective(iterate.w.numpy(), p, r))
        if settled:
            break
    assert settled and len(reached) > 3
    assert all(later <= earlier + 1e-12 * abs(earlier) for earlier, later in pairwise(reached))


def test_signs_are_judged_more_strictly_in_float64() -> None:
    assert sign_tolerance(F64) == 1e-12 and sign_tolerance(torch.float32) == 1e-6
