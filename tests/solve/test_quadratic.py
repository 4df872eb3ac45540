import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput, InvalidSettings
from tamis.solve import quadratic as module
from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic, landmark_root

F64 = torch.float64


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@given(st.integers(1, 25), st.integers(1, 8), st.integers(0, 2**32 - 1), st.booleans())
def test_low_rank_equals_dense(n: int, rank: int, seed: int, with_signs: bool) -> None:
    u = normal(seed, n, rank)
    signs = torch.where(normal(seed + 1, rank) > 0, 1.0, -1.0).double() if with_signs else None
    q = (u if signs is None else u * signs) @ u.T
    lam = 1.0 - min(0.0, float(torch.linalg.eigvalsh(q).min()))
    low, dense = LowRankQuadratic(u, signs), DenseQuadratic(q)
    w = normal(seed + 2, n)
    torch.testing.assert_close(low.apply(w), dense.apply(w), rtol=1e-11, atol=1e-11)
    assert low.mean_diagonal == pytest.approx(dense.mean_diagonal, rel=1e-10, abs=1e-12)
    rng = np.random.default_rng(seed)
    for _ in range(4):  # one after the other: the Gram matrix of the last set is changed, not made anew
        free = torch.from_numpy(rng.random(n) < rng.random())
        free[rng.integers(n)] = True
        rhs = normal(seed + 3, int(free.sum()), 2)
        expected = torch.linalg.solve(q[free][:, free] + lam * torch.eye(len(rhs), dtype=F64), rhs)
        for solver in (low, dense):
            # Condition numbers here stay below 1e4.
            torch.testing.assert_close(solver.solve(free, rhs, lam), expected, rtol=1e-9, atol=1e-9)


def test_gram_updated_by_rows_is_the_gram_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    u, rng = normal(0, 50, 4), np.random.default_rng(1)
    low = LowRankQuadratic(u)
    free = torch.ones(50, dtype=torch.bool)
    for _ in range(20):
        low.solve(free, torch.ones(int(free.sum()), 1, dtype=F64), 0.5)
        torch.testing.assert_close(low._gram, u[free].T @ u[free], rtol=1e-12, atol=1e-12)
        free = free ^ torch.from_numpy(rng.random(50) < 0.1)


def test_float32_woodbury_is_near_float64_where_lambda_is_not_tiny() -> None:
    u, free = normal(0, 400, 12), torch.ones(400, dtype=torch.bool)
    rhs = normal(1, 400, 1)
    found = LowRankQuadratic(u.float()).solve(free, rhs.float(), 0.1)
    exact = LowRankQuadratic(u).solve(free, rhs, 0.1)
    # Condition 5e3 times the rounding of float32, 6e-8.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-4 * float(exact.abs().max()))
    assert found.dtype == torch.float32


def test_only_the_symmetric_part_acts() -> None:
    q = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    assert DenseQuadratic(q).apply(torch.tensor([1.0, 0.0])).tolist() == [2.0, 0.5]


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_landmark_root_rebuilds_equation_11_without_negative_curvature(n: int, landmarks: int, seed: int) -> None:
    coefficients, half = normal(seed, n, landmarks), normal(seed + 1, landmarks, landmarks)
    eta = 0.3
    for q in (half @ half.T, half + half.T, half):
        values, vectors = torch.linalg.eigh((q + q.T) / 2)
        clipped = (vectors * values.clamp(min=0)) @ vectors.T
        made = landmark_root(q, eta=eta, pool_size=n)
        u = coefficients @ made.root
        expected = eta * landmarks / n * coefficients @ clipped @ coefficients.T
        torch.testing.assert_close(u @ u.T, expected, rtol=1e-9, atol=1e-9)
        share = float(-values.clamp(max=0).sum() / values.abs().sum())
        assert made.clipped_share == pytest.approx(share, abs=1e-9)


def test_only_directions_of_positive_curvature_cost_a_column() -> None:
    made = landmark_root(torch.diag(torch.tensor([2.0, 0.0, -1.0], dtype=F64)), eta=1.0, pool_size=3)
    assert made.root.shape == (3, 1) and made.clipped_share == pytest.approx(1 / 3)
    none = landmark_root(torch.zeros(3, 3), eta=1.0, pool_size=3)
    assert none.root.shape == (3, 0) and none.clipped_share == 0
    assert landmark_root(-torch.eye(2), eta=1.0, pool_size=2).clipped_share == 1


@pytest.mark.parametrize("low_rank", [True, False])
def test_a_problem_that_is_not_convex_stops_with_advice(low_rank: bool) -> None:
    u = torch.tensor([[2.0], [1.0], [0.0]], dtype=F64)
    signs = -torch.ones(1, dtype=F64)
    quadratic = LowRankQuadratic(u, signs) if low_rank else DenseQuadratic(-u @ u.T)
    free = torch.tensor([True, False, False])
    with pytest.raises(InvalidInput, match="not convex on its free rows"):
        quadratic.solve(free, torch.ones(1, 1, dtype=F64), 0.5)


def test_wrong_shapes_numbers_and_words_are_refused() -> None:
    with pytest.raises(InvalidInput, match="Q must be square, got 2 x 3"):
        DenseQuadratic(torch.zeros(2, 3))
    with pytest.raises(InvalidInput, match="Q of the second-order term has entries that are NaN"):
        DenseQuadratic(torch.full((2, 2), float("nan")))
    with pytest.raises(InvalidInput, match="signs must be 2 numbers, each 1 or -1"):
        LowRankQuadratic(torch.zeros(3, 2), torch.tensor([1.0, 0.5]))
    with pytest.raises(InvalidInput, match="U of the second-order term"):
        LowRankQuadratic(torch.full((2, 1), float("inf")))
    with pytest.raises(InvalidInput, match="must be square, got 2 x 3"):
        landmark_root(torch.zeros(2, 3), eta=1.0, pool_size=2)
    with pytest.raises(InvalidSettings, match=r"eta must be 0 or more, got -1"):
        landmark_root(torch.zeros(2, 2), eta=-1.0, pool_size=2)
