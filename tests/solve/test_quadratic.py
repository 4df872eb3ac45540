import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput, InvalidSettings
from tamis.solve import quadratic as module
from tamis.solve.quadratic import DenseQuadratic, LowRankQuadratic, clip_negative, landmark_root, require_convex

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


def test_clipping_takes_out_the_negative_part_alone() -> None:
    vectors = torch.linalg.qr(normal(0, 4, 4)).Q
    values = torch.tensor([3.0, 1.0, -0.5, -1.5], dtype=F64)
    clipped, share = clip_negative((vectors * values) @ vectors.T)
    torch.testing.assert_close(clipped, (vectors * values.clamp(min=0)) @ vectors.T, rtol=1e-12, atol=1e-12)
    assert share == pytest.approx(2 / 6, rel=1e-12)
    assert clip_negative(torch.eye(3))[1] == 0.0
    assert clip_negative(-torch.eye(3, dtype=F64))[1] == 1.0
    assert clip_negative(torch.zeros(2, 2))[1] == 0.0


def test_only_the_symmetric_part_acts() -> None:
    q = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    assert DenseQuadratic(q).apply(torch.tensor([1.0, 0.0])).tolist() == [2.0, 0.5]
    torch.testing.assert_close(clip_negative(q)[0], torch.tensor([[2.0, 0.5], [0.5, 2.0]]))


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_landmark_root_rebuilds_equation_11(n: int, landmarks: int, seed: int) -> None:
    coefficients, half = normal(seed, n, landmarks), normal(seed + 1, landmarks, landmarks)
    eta = 0.3
    positive = half @ half.T
    made = landmark_root(positive, eta=eta, pool_size=n)
    u = coefficients @ made.root
    expected = eta * landmarks / n * coefficients @ positive @ coefficients.T
    torch.testing.assert_close(u @ u.T, expected, rtol=1e-9, atol=1e-9)
    assert made.clipped_share == 0 and bool((made.signs == 1).all())

    indefinite = half + half.T
    kept = landmark_root(indefinite, eta=eta, pool_size=n, indefinite="refuse")
    u = coefficients @ kept.root
    expected = eta * landmarks / n * coefficients @ indefinite @ coefficients.T
    torch.testing.assert_close((u * kept.signs) @ u.T, expected, rtol=1e-9, atol=1e-9)
    clipped = landmark_root(indefinite, eta=eta, pool_size=n)
    u = coefficients @ clipped.root
    matrix, share = clip_negative(indefinite)
    expected = eta * landmarks / n * coefficients @ matrix @ coefficients.T
    torch.testing.assert_close(u @ u.T, expected, rtol=1e-9, atol=1e-9)
    assert clipped.clipped_share == pytest.approx(share, abs=1e-12)


def test_directions_without_curvature_cost_no_column() -> None:
    q = torch.diag(torch.tensor([2.0, 0.0, -1.0], dtype=F64))
    assert landmark_root(q, eta=1.0, pool_size=3).root.shape == (3, 1)
    assert landmark_root(q, eta=1.0, pool_size=3, indefinite="refuse").root.shape == (3, 2)
    assert landmark_root(torch.zeros(3, 3), eta=1.0, pool_size=3).root.shape == (3, 0)


@pytest.mark.parametrize("seed", range(5))
def test_convexity_is_judged_by_the_smallest_eigenvalue_of_the_whole_matrix(seed: int) -> None:
    u = normal(seed, 9, 4)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)
    low = LowRankQuadratic(u, signs)
    smallest = float(torch.linalg.eigvalsh((u * signs) @ u.T).min())
    assert require_convex(low, -smallest + 1e-6) == pytest.approx(smallest, rel=1e-9)
    with pytest.raises(InvalidInput, match=r"indefinite: its smallest eigenvalue -.* clip the negative eigenvalues"):
        require_convex(low, -smallest - 1e-6)
    assert require_convex(LowRankQuadratic(u), 1e-9) == 0.0


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
    with pytest.raises(InvalidSettings, match="indefinite='keep' is unknown; choose one of clip, refuse"):
        # Where tests check types, these would refuse the word first.
        inspect.unwrap(landmark_root)(torch.zeros(2, 2), eta=1.0, pool_size=2, indefinite="keep")
