import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solver_oracles import PROBLEM_KINDS, kkt_violation, objective, random_problem, weights_at_lambda
from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic
from tamis.solve.simplex_projection import project_to_simplex, projected_gradient, relative_gap
from tamis.solve.simplex_qp import solve_simplex_qp


def test_hand_computed_projection() -> None:
    # (3, 1, 0) onto sum 2: 2 + 0 + 0 after taking 1 off.
    assert project_to_simplex(torch.tensor([3.0, 1.0, 0.0]), 2.0).tolist() == [2.0, 0.0, 0.0]
    assert project_to_simplex(torch.tensor([0.5, 0.5]), 2.0).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_projection_is_the_first_order_solution_at_lambda_one(values: list[float]) -> None:
    v = np.array(values)
    expected = weights_at_lambda(v, 1.0)
    projected = project_to_simplex(torch.from_numpy(v), float(len(v)))
    np.testing.assert_allclose(projected, expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(project_to_simplex(projected, float(len(v))), projected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", PROBLEM_KINDS)
def test_projected_gradient_comes_near_the_optimum_and_its_gap_bounds_the_rest(kind: str) -> None:
    for seed in range(300, 302):
        p, u, lam = random_problem(kind, seed)
        lam = max(lam, 0.1)
        n, r = len(p), u @ u.T + lam * np.eye(len(p))
        quadratic = LowRankQuadratic(torch.from_numpy(u))
        start = torch.ones(n, dtype=torch.float64)
        found = projected_gradient(torch.from_numpy(p), quadratic, lam, start, max_steps=1000)
        best = objective(solve_simplex_qp(torch.from_numpy(p), quadratic, lam).value.numpy(), p, r)
        w = found.w.numpy()
        scale = abs(p @ w) + w @ r @ w
        assert -1e-12 * scale <= objective(w, p, r) - best <= found.gap * scale + 1e-12 * scale
        assert found.gap <= 1e-5 and kkt_violation(w, p, r) <= 1e-2
        np.testing.assert_allclose(found.gradient, r @ w - p, rtol=0, atol=1e-9 * np.abs(r @ w).max())


def test_it_stops_at_the_wanted_gap() -> None:
    p, u, _ = random_problem("full-rank", 1)
    quadratic, start = LowRankQuadratic(torch.from_numpy(u)), torch.ones(len(p), dtype=torch.float64)
    rough = projected_gradient(torch.from_numpy(p), quadratic, 1.0, start, max_steps=2000, tolerance=1e-3)
    fine = projected_gradient(torch.from_numpy(p), quadratic, 1.0, start, max_steps=2000, tolerance=1e-9)
    assert fine.gap <= 1e-9 < rough.gap <= 1e-3 and rough.steps < fine.steps < 2000


def test_a_step_length_from_too_small_a_curvature_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    p, u, _ = random_problem("full-rank", 2)
    monkeypatch.setattr("tamis.solve.simplex_projection._largest_eigenvalue", lambda quadratic, p: 1e-6)
    start = torch.ones(len(p), dtype=torch.float64)
    found = projected_gradient(
        torch.from_numpy(p), DenseQuadratic(torch.from_numpy(u @ u.T)), 1.0, start, max_steps=3000, tolerance=1e-8
    )
    assert found.gap <= 1e-8


def test_gap_is_zero_at_the_optimum_and_the_certificate_elsewhere() -> None:
    # n = 2, Q = 0, λ = 1, p = (2, 0): the optimum is (2, 0); at (1, 1) ∇f = (-1, 1), gap 0 + 2, scale 2 + 2.
    p, zero = torch.tensor([2.0, 0.0]), torch.zeros(2)
    assert relative_gap(p, zero, torch.tensor([2.0, 0.0]), 1.0)[0] == 0.0
    gap, value, gradient = relative_gap(p, zero, torch.tensor([1.0, 1.0]), 1.0)
    assert gap == 0.5 and value == -1.0 and gradient.tolist() == [-1.0, 1.0]
