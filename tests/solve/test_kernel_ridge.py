import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.errors import InvalidInput, InvalidSettings, NonFinite
from tamis.solve.kernel_ridge import (
    damped_cholesky,
    fit_kernel_ridge,
    kernel_among,
    landmark_kernel,
    line_fit,
    mean_directions,
)
from tamis.solve.kernels import EmbeddingMap, Kernel, kernel_matrix

F64 = torch.float64
ANGLES = torch.arange(6, dtype=F64) / 2
CIRCLE = torch.stack([torch.cos(ANGLES), torch.sin(ANGLES)], dim=1)
LANDMARKS = torch.tensor([0, 2, 5])
KNOWN = torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def circle_fit():
    basis = landmark_kernel(CIRCLE[LANDMARKS], transform=EmbeddingMap(), kernel=Kernel(), damping=0.01)
    return fit_kernel_ridge(basis, KNOWN)


def test_published_predictions() -> None:
    expected = [
        0.9458287753356257,
        -0.232691968925611,
        -0.9195239896177185,
        -0.517949690689564,
        0.7176976157618049,
        1.9522200011128104,
    ]
    fit = circle_fit()
    assert fit.basis.median == pytest.approx(1.8585255966645944, rel=1e-15)
    # The kernel's condition number of 1e2 turns rounding of 2e-16 into 2e-14.
    np.testing.assert_allclose(fit.predict(CIRCLE)[:, 0], expected, rtol=0, atol=2e-14)


def test_one_landmark_by_hand() -> None:
    # k = 1 on the diagonal, δ = 1: A = 4 / 2, and an opposite row is at squared distance 4 with c·med = 2.
    basis = landmark_kernel(torch.tensor([[2.0, 0.0]]), transform=EmbeddingMap(), kernel=Kernel(), damping=1.0)
    fit = fit_kernel_ridge(basis, torch.tensor([[4.0]]))
    predicted = fit.predict(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))
    torch.testing.assert_close(predicted, torch.tensor([[2.0], [2 * float(np.exp(-2))]]))


@given(st.integers(1, 8), st.integers(1, 4), st.sampled_from(["rbf", "laplace", "linear"]), st.integers(0, 2**32 - 1))
def test_predictions_are_coefficients_times_scores(count: int, targets: int, name: str, seed: int) -> None:
    embeddings, pool, scores = normal(seed, count, 5), normal(seed + 1, 7, 5), normal(seed + 2, count, targets)
    transform = EmbeddingMap(mean=normal(seed + 3, 5))
    basis = landmark_kernel(embeddings, transform=transform, kernel=Kernel(name=name), damping=0.1)
    e, landmarks = transform.apply(pool), transform.apply(embeddings)
    among = kernel_among(landmarks, basis.kernel, basis.median) + 0.1 * torch.eye(count, dtype=F64)
    coefficients = kernel_matrix(e, landmarks, basis.kernel, basis.median) @ torch.linalg.inv(among)
    fit = fit_kernel_ridge(basis, scores)
    torch.testing.assert_close(fit.predict(pool), coefficients @ scores, rtol=1e-8, atol=1e-8)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.integers(2, 8))
def test_order_of_landmarks_and_scale_of_embeddings_do_not_matter(seed: int, scale: float, count: int) -> None:
    embeddings, pool, scores = normal(seed, count, 4), normal(seed + 1, 5, 4), normal(seed + 2, count, 2)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))

    def predicted(landmarks: torch.Tensor, known: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        basis = landmark_kernel(landmarks, transform=EmbeddingMap(), kernel=Kernel())
        return fit_kernel_ridge(basis, known, directions=mean_directions(EmbeddingMap(), [rows, rows[:2]])).predict(
            rows
        )

    expected = predicted(embeddings, scores, pool)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(predicted(embeddings[order], scores[order], pool), expected, **close)
    torch.testing.assert_close(predicted(embeddings * scale, scores, pool * scale), expected, **close)
    torch.testing.assert_close(predicted(embeddings, scores * 3 + 0.0, pool), 3 * expected, **close)


def test_residual_form_is_its_definition() -> None:
    embeddings, pool, scores = normal(0, 9, 4), normal(1, 6, 4), normal(2, 9, 2)
    targets = [normal(3, 3, 4), normal(4, 5, 4)]
    transform = EmbeddingMap(mean=normal(5, 4))
    basis = landmark_kernel(embeddings, transform=transform, kernel=Kernel(), damping=0.1)
    fit = fit_kernel_ridge(basis, scores, directions=mean_directions(transform, targets))
    for column, rows in enumerate(targets):
        mean = torch.stack([transform.apply(row[None])[0] for row in rows]).mean(0)
        direct, direct_pool = transform.apply(embeddings) @ mean, transform.apply(pool) @ mean
        slope, intercept = np.polyfit(direct.numpy(), scores[:, column].numpy(), 1)
        rest = scores[:, column] - intercept - slope * direct
        expected = intercept + slope * direct_pool + fit_kernel_ridge(basis, rest[:, None]).predict(pool)[:, 0]
        torch.testing.assert_close(fit.predict(pool)[:, column], expected, rtol=1e-10, atol=1e-10)


def test_residual_form_is_exact_where_the_direct_score_is_right_up_to_a_line() -> None:
    embeddings, pool = normal(0, 9, 4), normal(1, 6, 4)
    directions = mean_directions(EmbeddingMap(), [normal(3, 3, 4)])
    basis = landmark_kernel(embeddings, transform=EmbeddingMap(), kernel=Kernel(), damping=1.0)

    def truth(rows: torch.Tensor) -> torch.Tensor:
        return 3 - 2 * EmbeddingMap().apply(rows) @ directions.T

    fit = fit_kernel_ridge(basis, truth(embeddings), directions=directions)
    torch.testing.assert_close(fit.predict(pool), truth(pool), rtol=1e-10, atol=1e-10)
    plain = fit_kernel_ridge(basis, truth(embeddings))
    assert float((plain.predict(pool) - truth(pool)).abs().max()) > 0.1


def test_a_constant_direct_score_has_slope_zero() -> None:
    intercepts, slopes = line_fit(torch.full((3, 1), 0.7), torch.tensor([[1.0], [2.0], [6.0]]))
    assert intercepts.tolist() == [3.0] and slopes.tolist() == [0.0]


def test_float32_pools_are_predicted_in_float32_from_a_float64_solve() -> None:
    embeddings, pool, scores = normal(0, 60, 30).float(), normal(1, 40, 30).float(), normal(2, 60, 3).float()
    basis = landmark_kernel(embeddings, transform=EmbeddingMap(), kernel=Kernel(), damping=0.01)
    fit = fit_kernel_ridge(basis, scores)
    assert fit.coefficients.dtype == F64 and fit.predict(pool).dtype == torch.float32
    exact_basis = landmark_kernel(embeddings.double(), transform=EmbeddingMap(), kernel=Kernel(), damping=0.01)
    exact = fit_kernel_ridge(exact_basis, scores.double()).predict(pool.double())
    torch.testing.assert_close(fit.predict(pool).double(), exact, rtol=0, atol=1e-4)


def test_damping_is_raised_tenfold_until_copies_can_be_told_apart_and_reported() -> None:
    copies = torch.ones(6, 6, dtype=F64)
    factor, used, raised = damped_cholesky(copies, 1e-20)
    assert raised >= 1 and used == pytest.approx(1e-20 * 10**raised, rel=1e-12)
    torch.testing.assert_close(factor @ factor.T, copies + used * torch.eye(6, dtype=F64), rtol=1e-14, atol=1e-14)
    assert damped_cholesky(copies, 0.1)[1:] == (0.1, 0)
    basis = landmark_kernel(torch.ones(6, 3), transform=EmbeddingMap(), kernel=Kernel(), damping=1e-20)
    assert basis.times_raised == raised and basis.damping == used
    assert bool(torch.isfinite(fit_kernel_ridge(basis, torch.ones(6, 1)).predict(torch.ones(2, 3))).all())


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one landmark, got none"):
        landmark_kernel(torch.zeros(0, 3), transform=EmbeddingMap(), kernel=Kernel())
    with pytest.raises(NonFinite, match="an embedding of a landmark is NaN"):
        landmark_kernel(torch.full((2, 3), float("nan")), transform=EmbeddingMap(), kernel=Kernel())
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidSettings, match=f"damping must be a positive number, got {damping}"):
            damped_cholesky(torch.eye(2), damping)
    with pytest.raises(NonFinite, match="cannot be factorised"):
        damped_cholesky(torch.full((2, 2), float("nan")), 0.1)
    basis = landmark_kernel(torch.eye(3), transform=EmbeddingMap(), kernel=Kernel())
    with pytest.raises(InvalidInput, match="3 landmarks need as many rows of scores, got 2"):
        fit_kernel_ridge(basis, torch.zeros(2, 1))
    with pytest.raises(NonFinite, match="1 landmarks have scores that are NaN or infinite, the first is number 2"):
        fit_kernel_ridge(basis, torch.tensor([[0.0], [0.0], [float("inf")]]))
    with pytest.raises(InvalidInput, match="2 targets need one mean embedding of 3 numbers each, got 1 of 3"):
        fit_kernel_ridge(basis, torch.zeros(3, 2), directions=torch.zeros(1, 3))
