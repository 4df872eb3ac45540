from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solver_oracles import (
    PROBLEM_KINDS,
    enumerated_weights,
    kkt_violation,
    objective,
    random_problem,
    slsqp_objective,
    weights_at_lambda,
)
from tamis.errors import InvalidInput, NonFinite
from tamis.solve import simplex_qp
from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic
from tamis.solve.simplex_active_set import primal_active_set
from tamis.solve.simplex_closed_form import weights_for_count
from tamis.solve.simplex_qp import solve_simplex_qp, solve_simplex_qp_for_count
from tamis.solve.solution import Status

F64 = torch.float64
INDEX = torch.arange(6, dtype=F64)
COSINES = torch.cos(INDEX[:, None] - INDEX[None, :])
CYCLE_U = torch.tensor([[0.0, -1.0], [-3.0, 3.0], [3.0, -3.0], [-1.0, 0.0]], dtype=F64)
CYCLE_P = torch.tensor([6.0, 1.0, -6.0, 6.0], dtype=F64)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (3.0, [2.790118611055, 2.733510640082, 0.476370748863, 0, 0, 0]),
        (1.0, [1.577322178369, 1.517188339663, 0.995506352873, 0.491908230793, 0.469399764403, 0.948675133898]),
        (10.0, [2.211043108749, 3.788956891251, 0, 0, 0, 0]),
    ],
)
def test_published_weights(factor: float, expected: list[float]) -> None:
    solution = solve_simplex_qp(factor * torch.sin(INDEX + 1), DenseQuadratic(0.5 * COSINES), 0.2)
    np.testing.assert_allclose(solution.value, expected, rtol=0, atol=1e-12)
    assert solution.status is Status.OPTIMAL


def test_published_gradient() -> None:
    p, q = 3 * torch.sin(INDEX + 1), 0.5 * COSINES
    w = solve_simplex_qp(p, DenseQuadratic(q), 0.2).value
    gradient = q @ w + 0.2 * w - p
    expected = [0.068011034] * 3 + [0.449230445, 0.512703607, 0.104799436]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("quadratic", [DenseQuadratic(CYCLE_U @ CYCLE_U.T), LowRankQuadratic(CYCLE_U)])
def test_the_case_that_cycles_is_solved_from_every_start(quadratic: DenseQuadratic | LowRankQuadratic) -> None:
    paths = set()
    for bits in range(1, 16):
        start = torch.tensor([bool(bits >> row & 1) for row in range(4)])
        solution = solve_simplex_qp(CYCLE_P, quadratic, 0.01, start=start)
        np.testing.assert_allclose(solution.value, [2, 0, 0, 2], rtol=0, atol=1e-12)
        assert solution.status is Status.OPTIMAL and solution.stats["gap"] <= 1e-14
        paths.add(solution.stats["path"])
    assert paths == {"plain", "primal"}


@pytest.mark.parametrize("kind", PROBLEM_KINDS)
def test_random_problems_satisfy_the_optimality_conditions_dense_and_low_rank(kind: str) -> None:
    for seed in range(12):
        p, u, lam = random_problem(kind, seed)
        r = u @ u.T + lam * np.eye(len(p))
        start = torch.ones(len(p), dtype=torch.bool) if seed % 2 else None
        dense, low = (
            solve_simplex_qp(torch.from_numpy(p), quadratic, lam, start=start)
            for quadratic in (
                DenseQuadratic(torch.from_numpy(u @ u.T)),
                LowRankQuadratic(torch.from_numpy(u)),
            )
        )
        for solution in (dense, low):
            assert solution.status is Status.OPTIMAL
            assert solution.stats["gap"] <= 1e-8  # what the specification measured by Woodbury
            assert kkt_violation(solution.value.numpy(), p, r) <= 1e-8
            assert solution.stats["objective"] == pytest.approx(objective(solution.value.numpy(), p, r), rel=1e-9)
        np.testing.assert_allclose(low.value, dense.value, rtol=0, atol=1e-8 * len(p))


@pytest.mark.parametrize("kind", PROBLEM_KINDS)
def test_small_problems_equal_the_best_over_all_supports(kind: str) -> None:
    for seed in range(6):
        p, u, lam = random_problem(kind, seed, max_rows=6)
        expected = enumerated_weights(p, u @ u.T + lam * np.eye(len(p)))
        found = solve_simplex_qp(torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u)), lam)
        np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-7 * len(p))


@pytest.mark.parametrize("kind", PROBLEM_KINDS)
def test_no_objective_is_above_that_of_sequential_quadratic_programming(kind: str) -> None:
    for seed in range(100, 106):
        p, u, lam = random_problem(kind, seed)
        r = u @ u.T + lam * np.eye(len(p))
        found = float(
            solve_simplex_qp(torch.from_numpy(p), DenseQuadratic(torch.from_numpy(u @ u.T)), lam).stats["objective"]
        )
        reference = slsqp_objective(p, r)
        # The reference stops early now and then; it must never be lower.
        assert found <= reference + 1e-9 * (abs(reference) + np.abs(p).sum())


def test_an_indefinite_term_that_lambda_outweighs_is_solved_exactly() -> None:
    rng = np.random.default_rng(0)
    u, signs = rng.standard_normal((7, 3)), np.array([1.0, -1.0, -1.0])
    q = (u * signs) @ u.T
    lam = 1.5 - np.linalg.eigvalsh(q).min()
    p = rng.standard_normal(7) * 4
    expected = enumerated_weights(p, q + lam * np.eye(7))
    for quadratic in (
        LowRankQuadratic(torch.from_numpy(u), torch.from_numpy(signs)),
        DenseQuadratic(torch.from_numpy(q)),
    ):
        found = solve_simplex_qp(torch.from_numpy(p), quadratic, float(lam))
        np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-9)


@settings(max_examples=40)
@given(st.sampled_from(PROBLEM_KINDS), st.integers(0, 2**31), st.floats(-50, 50), st.floats(0.01, 100))
def test_order_shift_and_scale_do_not_matter(kind: str, seed: int, shift: float, scale: float) -> None:
    scores, root, lam = random_problem(kind, seed, max_rows=10)
    lam = max(lam, 0.01)  # below it a shift of 50 costs more digits than are compared
    p, u = torch.from_numpy(scores), torch.from_numpy(root)
    w = solve_simplex_qp(p, LowRankQuadratic(u), lam).value
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(p)))
    close = {"rtol": 0, "atol": 1e-6 * len(p)}
    torch.testing.assert_close(solve_simplex_qp(p[order], LowRankQuadratic(u[order]), lam).value, w[order], **close)
    torch.testing.assert_close(solve_simplex_qp(p + shift, LowRankQuadratic(u), lam).value, w, **close)
    scaled = solve_simplex_qp(p * scale, LowRankQuadratic(u * scale**0.5), lam * scale)
    torch.testing.assert_close(scaled.value, w, **close)


@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(0.01, 10))
def test_without_curvature_the_weights_are_those_of_first_order(n: int, seed: int, lam: float) -> None:
    p = np.random.default_rng(seed).standard_normal(n)
    expected = weights_at_lambda(p, lam)
    for quadratic in (DenseQuadratic(torch.zeros(n, n, dtype=F64)), LowRankQuadratic(torch.zeros(n, 1, dtype=F64))):
        found = solve_simplex_qp(torch.from_numpy(p), quadratic, lam)
        np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-10 * n)
        counted = solve_simplex_qp_for_count(torch.from_numpy(p), quadratic, (n + 1) // 2)
        np.testing.assert_allclose(counted.value, weights_for_count(p, (n + 1) // 2).value, rtol=0, atol=1e-9 * n)


@pytest.mark.parametrize("kind", ["rank-deficient", "full-rank", "all-negative", "correlated"])
def test_bisection_finds_lambda_for_every_count(kind: str) -> None:
    for seed in range(3):
        p, u, _ = random_problem(kind, seed, max_rows=14)
        n = len(p)
        quadratic = LowRankQuadratic(torch.from_numpy(0.1 * u))
        for k in range(1, n + 1):
            solution = solve_simplex_qp_for_count(torch.from_numpy(p), quadratic, k)
            assert np.count_nonzero(solution.value) == solution.stats["nonzero"] == k
            assert float(solution.value.sum()) == pytest.approx(n, rel=1e-12)
            if solution.status is Status.OPTIMAL:
                r = 0.01 * u @ u.T + float(solution.stats["lambda"]) * np.eye(n)
                assert kkt_violation(solution.value.numpy(), p, r) <= 1e-7
                assert solution.stats["trimmed"] == 0
            else:
                assert solution.status is Status.COUNT_MISSED and int(solution.stats["trimmed"]) > 0


def test_a_count_that_no_lambda_leaves_is_cut_to_the_largest_weights_and_said() -> None:
    # Two rows that undo each other's curvature: together they are better than either alone, whatever λ.
    u = torch.tensor([[10.0], [-10.0], [0.0]], dtype=F64)
    p = torch.tensor([1.0, 1.1, -50.0], dtype=F64)
    solution = solve_simplex_qp_for_count(p, LowRankQuadratic(u), 1)
    assert solution.status is Status.COUNT_MISSED and "no lambda tried" in str(solution.status)
    assert solution.value.tolist() == pytest.approx([0, 3, 0], rel=1e-12)
    assert solution.stats["trimmed"] == 1 and float(solution.stats["gap"]) > 0.1


def test_equal_scores_and_rows_are_cut_by_index() -> None:
    p, u = torch.zeros(5, dtype=F64), torch.ones(5, 1, dtype=F64)
    solution = solve_simplex_qp_for_count(p, LowRankQuadratic(u), 2)
    assert solution.value.tolist() == [2.5, 2.5, 0, 0, 0] and solution.stats["trimmed"] == 3
    assert solve_simplex_qp_for_count(p, LowRankQuadratic(u), 5).value.tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("score", [0.0, 2.0, -1e-6])
def test_equal_scores_without_a_second_order_are_cut_by_index_too(score: float) -> None:
    p, none = torch.full((5,), score, dtype=F64), torch.zeros(5, 1, dtype=F64)
    for quadratic in (LowRankQuadratic(none), DenseQuadratic(none @ none.T)):
        solution = solve_simplex_qp_for_count(p, quadratic, 2)
        assert solution.status is Status.COUNT_MISSED
        assert solution.value.tolist() == [2.5, 2.5, 0, 0, 0] and float(solution.stats["lambda"]) > 0


def test_float32_is_certified_to_its_own_digits() -> None:
    rng = np.random.default_rng(0)
    u, p = rng.standard_normal((800, 20)) * 0.05, rng.standard_normal(800)
    lam = float(weights_for_count(p, 40).stats["lambda"])
    exact = solve_simplex_qp(torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u)), lam)
    found = solve_simplex_qp(torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u).float()), lam)
    assert found.value.dtype == torch.float32 and found.status is Status.OPTIMAL
    assert float(found.stats["gap"]) <= 1e-5
    assert abs(int(found.stats["nonzero"]) - int(exact.stats["nonzero"])) <= 1
    torch.testing.assert_close(found.value.double(), exact.value, rtol=0, atol=1e-3 * float(exact.value.max()))


def test_one_row_gets_the_whole_weight() -> None:
    for p in (-3.0, 0.0):
        one = torch.tensor([p], dtype=F64)
        assert solve_simplex_qp(one, DenseQuadratic(torch.ones(1, 1, dtype=F64)), 0.5).value.tolist() == [1.0]
        assert solve_simplex_qp_for_count(one, LowRankQuadratic(torch.ones(1, 1, dtype=F64)), 1).value.tolist() == [1.0]


def stopped_at_once(*problem: Any, max_solves: int, tolerance: float) -> Any:
    return primal_active_set(*problem, max_solves=0, tolerance=tolerance)


def test_what_is_stopped_too_early_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplex_qp, "_PLAIN_SOLVES", 1)
    monkeypatch.setattr(simplex_qp, "_GRADIENT_STEPS", 1)
    p, u, _ = random_problem("rank-deficient", 3)
    r = u @ u.T + 1e-4 * np.eye(len(p))
    start = torch.ones(len(p), dtype=torch.bool)
    with monkeypatch.context() as patch:
        patch.setattr(simplex_qp, "primal_active_set", stopped_at_once)
        solution = solve_simplex_qp(torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u)), 1e-4, start=start)
    assert solution.status is Status.INACCURATE and "the gap bounds what is missing" in str(solution.status)
    w = solution.value.numpy()
    best = objective(
        solve_simplex_qp(torch.from_numpy(p), LowRankQuadratic(torch.from_numpy(u)), 1e-4).value.numpy(), p, r
    )
    missing = objective(w, p, r) - best
    assert 0 < missing <= float(solution.stats["gap"]) * (abs(p @ w) + w @ r @ w) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("p", "size", "lam", "error", "sentence"),
    [
        ([], 0, 1.0, InvalidInput, "no rows to weigh"),
        ([1.0, 2.0], 3, 1.0, InvalidInput, "Q is for 3 rows, but there are 2 scores"),
        ([1.0, 2.0], 2, 0.0, InvalidInput, "lambda must be a positive number, got 0"),
        ([1.0, float("nan")], 2, 1.0, NonFinite, "1 of 2 scores are NaN or infinite, the first in row 1"),
    ],
)
def test_what_cannot_be_weighed_is_refused(
    p: list[float], size: int, lam: float, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        solve_simplex_qp(torch.tensor(p, dtype=F64), LowRankQuadratic(torch.ones(size, 1, dtype=F64)), lam)


def test_impossible_counts_and_empty_starts_are_refused() -> None:
    p, quadratic = torch.zeros(3, dtype=F64), LowRankQuadratic(torch.ones(3, 1, dtype=F64))
    for k in (0, 4):
        with pytest.raises(InvalidInput, match=f"between 1 and the 3 rows of the pool, got {k}"):
            solve_simplex_qp_for_count(p, quadratic, k)
    with pytest.raises(InvalidInput, match="start must mark at least one of the 3 rows"):
        solve_simplex_qp(p, quadratic, 1.0, start=torch.zeros(3, dtype=torch.bool))
