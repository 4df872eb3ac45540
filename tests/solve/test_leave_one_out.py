from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.errors import InvalidInput
from tamis.solve.kernel_ridge import damped_cholesky, fit_kernel_ridge, kernel_among, landmark_kernel, mean_directions
from tamis.solve.kernels import EmbeddingMap, Kernel, embedding_map, kernel_matrix, median_squared_distance
from tamis.solve.leave_one_out import (
    Candidate,
    candidate_basis,
    candidate_grid,
    foretelling,
    leave_one_out_coefficients,
    leave_one_out_scores,
    recovery_cosines,
    spearman,
    try_candidates,
)

F64 = torch.float64


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def recovery(factor: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    return recovery_cosines(leave_one_out_coefficients(factor), gram, gram, gram.diagonal().sqrt())


def test_published_recovery() -> None:
    angles = torch.arange(6, dtype=F64)[[0, 2, 5]]
    e = torch.stack([torch.cos(angles / 2), torch.sin(angles / 2)], dim=1)
    basis = landmark_kernel(e, transform=EmbeddingMap(), kernel=Kernel(), damping=0.01)
    gram = torch.cos(0.3 * (angles[:, None] - angles[None, :]))
    assert float(recovery(basis.factor, gram).mean()) == pytest.approx(0.8869696061812503, rel=1e-13)


def test_two_landmarks_by_hand() -> None:
    # Without the other, landmark 1 is k / (1 + δ) times it: K = [[1, .5], [.5, 1]], δ = 1 gives 0.25.
    kernel = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=F64)
    coefficients = leave_one_out_coefficients(damped_cholesky(kernel, 1.0)[0])
    torch.testing.assert_close(coefficients, torch.tensor([[0.0, 0.25], [0.25, 0.0]], dtype=F64))


@given(st.integers(2, 9), st.sampled_from(["rbf", "laplace", "linear"]), st.integers(0, 2**32 - 1))
def test_coefficients_are_those_of_a_fit_without_the_landmark(count: int, name: str, seed: int) -> None:
    e = torch.nn.functional.normalize(normal(seed, count, 4))
    kernel, median = Kernel(name=name), median_squared_distance(e)
    among = kernel_matrix(e, e, kernel, median)
    coefficients = leave_one_out_coefficients(damped_cholesky(among, 0.1)[0])
    for left in range(count):
        others = [i for i in range(count) if i != left]
        smaller = among[others][:, others] + 0.1 * torch.eye(count - 1, dtype=F64)
        expected = among[left, others] @ torch.linalg.inv(smaller)
        torch.testing.assert_close(coefficients[left, others], expected, rtol=1e-8, atol=1e-8)
        assert float(coefficients[left, left]) == 0


@settings(max_examples=25)
@given(st.integers(4, 9), st.integers(0, 2**32 - 1), st.floats(-100, 100))
def test_scores_in_residual_form_are_those_of_refitting_line_and_kernel(count: int, seed: int, offset: float) -> None:
    e = normal(seed, count, 4)
    scores = normal(seed + 1, count, 2) + offset
    directions = mean_directions(EmbeddingMap(), [normal(seed + 2, 3, 4), normal(seed + 3, 2, 4)])
    whole = landmark_kernel(e, transform=EmbeddingMap(), kernel=Kernel())
    among, direct = kernel_among(whole.landmarks, whole.kernel, whole.median), whole.landmarks @ directions.T
    found = leave_one_out_scores(leave_one_out_coefficients(whole.factor), scores, direct)
    plain = leave_one_out_scores(leave_one_out_coefficients(whole.factor), scores)
    for left in range(count):
        others = [i for i in range(count) if i != left]
        smaller = replace(
            whole, landmarks=whole.landmarks[others], factor=damped_cholesky(among[others][:, others], 0.1)[0]
        )
        for values, wanted in ((found, directions), (plain, None)):
            refitted = fit_kernel_ridge(smaller, scores[others], directions=wanted).predict(e[left : left + 1])[0]
            torch.testing.assert_close(values[left], refitted, rtol=1e-6, atol=1e-6)


def test_a_direct_score_that_is_constant_without_one_landmark_has_no_slope_there() -> None:
    direct = torch.tensor([[5.0], [1.0], [1.0], [1.0]], dtype=F64)
    scores = torch.tensor([[9.0], [1.0], [2.0], [3.0]], dtype=F64)
    found = leave_one_out_scores(torch.zeros(4, 4, dtype=F64), scores, direct)
    assert float(found[0]) == pytest.approx(2.0)  # the mean of the others, not a line through one point


@pytest.mark.parametrize("seed", range(3))
def test_recovery_is_the_cosine_of_rebuilt_and_true_gradients(seed: int) -> None:
    gradients, coefficients = normal(seed, 6, 30), normal(seed + 9, 8, 6)
    own = normal(seed + 5, 8, 30)
    found = recovery_cosines(coefficients, gradients @ gradients.T, own @ gradients.T, own.norm(dim=1))
    expected = torch.nn.functional.cosine_similarity(coefficients @ gradients, own)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_rebuilt_has_recovery_zero() -> None:
    gram = torch.eye(2)
    assert recovery_cosines(torch.zeros(1, 2), gram, torch.ones(1, 2), torch.ones(1)).tolist() == [0.0]
    assert recovery_cosines(torch.ones(1, 2), gram, torch.zeros(1, 2), torch.zeros(1)).tolist() == [0.0]


def test_left_out_recovery_foretells_that_of_unseen_rows() -> None:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((600, 12))
    gradients = torch.from_numpy(factors @ rng.standard_normal((12, 200)) + 2 * rng.standard_normal((600, 200)))
    gradients = torch.nn.functional.normalize(gradients)
    embeddings = torch.from_numpy(factors + 0.3 * rng.standard_normal((600, 12)))
    known, unseen = slice(0, 150), slice(150, 600)
    basis = landmark_kernel(embeddings[known], transform=EmbeddingMap(), kernel=Kernel())
    gram = gradients[known] @ gradients[known].T
    foretold = float(recovery(basis.factor, gram).mean())
    kernel = kernel_matrix(basis.transform.apply(embeddings[unseen]), basis.landmarks, basis.kernel, basis.median)
    coefficients = torch.cholesky_solve(kernel.T.contiguous(), basis.factor).T
    products = gradients[unseen] @ gradients[known].T
    cosines = recovery_cosines(coefficients, gram, products, torch.ones(450, dtype=F64))
    # Means over 150 and 450 rows whose cosines spread by about 0.1: one standard error is below 0.01.
    assert float(cosines.std()) < 0.15
    assert foretold == pytest.approx(float(cosines.mean()), abs=0.03) and foretold > 0.3


def flattery(landmarks: int, *, half_whitened: bool, numbers: int = 100) -> float:
    """By how much leave-one-out promises a higher recovery than 600 unseen rows keep; mean of three draws."""
    promised = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = torch.from_numpy(rng.standard_normal((landmarks + 600, numbers)) / np.arange(1, numbers + 1))
        noise = torch.from_numpy(rng.standard_normal((len(rows), 40)))
        gradients = rows @ torch.from_numpy(rng.standard_normal((numbers, 40))) + 0.5 * noise
        gradients = torch.nn.functional.normalize(gradients)
        known, unseen = slice(0, landmarks), slice(landmarks, None)
        candidate, gram = Candidate(half_whitened=half_whitened), gradients[known] @ gradients[known].T
        foretold = try_candidates(rows[known], gram=gram, grid=[candidate])[0].recovery
        basis = candidate_basis(candidate, rows[known])
        kernel = kernel_matrix(basis.transform.apply(rows[unseen]), basis.landmarks, basis.kernel, basis.median)
        coefficients = torch.cholesky_solve(kernel.T.contiguous(), basis.factor).T
        products = gradients[unseen] @ gradients[known].T
        kept = recovery_cosines(coefficients, gram, products, torch.ones(600, dtype=F64)).mean()
        promised.append(foretold - float(kept))
    return sum(promised) / len(promised)


def test_whitening_is_judged_only_where_leave_one_out_does_not_flatter_it() -> None:
    grid = candidate_grid(half_whitening=True)
    assert foretelling(grid, landmarks=199, numbers=100) == candidate_grid()
    assert foretelling(grid, landmarks=200, numbers=100) == grid
    assert flattery(100, half_whitened=True) > 0.025
    assert abs(flattery(100, half_whitened=False)) < 0.015
    assert abs(flattery(200, half_whitened=True)) < 0.02


@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_rank_correlation_is_scipys(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, (count, 2)).astype(float), rng.standard_normal((count, 2))
    x[0], x[1] = 0, 1  # not constant
    found = spearman(torch.from_numpy(x), torch.from_numpy(y))
    for column in range(2):
        expected = scipy.stats.spearmanr(x[:, column], y[:, column]).statistic
        assert found[column] == pytest.approx(float(expected), abs=1e-12)


def test_a_constant_column_has_no_order_to_agree_with() -> None:
    assert spearman(torch.ones(4, 1), torch.arange(4.0)[:, None]) == (0.0,)


def test_the_grid_is_the_documented_one_with_the_default_first() -> None:
    grid = candidate_grid()
    assert grid[0] == Candidate() == Candidate(kernel=Kernel(name="rbf", scale=2.0), damping=0.1)
    assert len(grid) == len(set(grid)) == 12 and len(candidate_grid(half_whitening=True)) == 21
    rbf = {(c.kernel.scale, c.damping) for c in grid if c.kernel.name == "rbf"}
    assert rbf == {(c, d) for c in (0.5, 2.0, 8.0) for d in (0.01, 0.1, 1.0)}
    assert {(c.damping, c.centred) for c in grid if c.kernel.name == "linear"} == {(d, False) for d in (0.01, 0.1, 1.0)}
    assert str(grid[0]) == "rbf 2 x median, damping 0.1" and str(grid[-1]) == "linear, damping 1, not centred"
    assert str(candidate_grid(half_whitening=True)[-1]) == "rbf 8 x median, damping 1, half-whitened"


@pytest.mark.parametrize("with_targets", [False, True])
def test_every_row_of_the_table_is_what_a_fit_of_that_candidate_gives(with_targets: bool) -> None:
    embeddings, gradients = normal(0, 12, 5), normal(2, 12, 40)
    scores, targets = normal(3, 12, 2), [normal(4, 3, 5), normal(5, 4, 5)]
    sample, gram = normal(6, 30, 5), gradients @ gradients.T
    table = try_candidates(
        embeddings,
        gram=gram,
        scores=scores,
        targets=targets if with_targets else None,
        sample=sample,
        grid=candidate_grid(half_whitening=True),
    )
    assert [row.recovery for row in table] == sorted((row.recovery for row in table), reverse=True)
    assert {row.candidate for row in table} == set(candidate_grid(half_whitening=True))
    for row in table:
        tried = row.candidate
        mean = embeddings.mean(0) if tried.centred else None
        transform = embedding_map(sample, mean=mean, half_whitened=tried.half_whitened)
        basis = landmark_kernel(embeddings, transform=transform, kernel=tried.kernel, damping=tried.damping)
        assert (row.damping, row.times_raised) == (row.candidate.damping, 0)
        assert row.recovery == pytest.approx(float(recovery(basis.factor, gram).mean()), rel=1e-9)
        direct = basis.landmarks @ mean_directions(basis.transform, targets).T if with_targets else None
        left_out = leave_one_out_scores(leave_one_out_coefficients(basis.factor), scores, direct)
        assert row.spearman == pytest.approx(spearman(left_out, scores), rel=1e-9)
        assert row.mean_spearman == pytest.approx(sum(row.spearman) / 2)


def test_gradients_as_embeddings_choose_a_kernel_near_the_gradient_and_noise_is_told_apart() -> None:
    rng = np.random.default_rng(1)
    gradients = torch.from_numpy(rng.standard_normal((80, 10)) @ rng.standard_normal((10, 60)))
    gram, noise = gradients @ gradients.T, normal(3, 80, 60)
    best = try_candidates(gradients, grid=candidate_grid(), gram=gram)[0]
    assert best.recovery is not None and best.recovery > 0.9 and best.spearman == () and best.mean_spearman is None
    blind = try_candidates(noise, grid=candidate_grid(), gram=gram)[0]
    assert blind.recovery is not None and blind.recovery < 0.2


def test_without_a_gram_the_choice_is_by_rank_correlation_and_ties_keep_the_grids_order() -> None:
    embeddings, scores = normal(0, 15, 4), normal(1, 15, 2)
    table = try_candidates(embeddings, grid=candidate_grid(), scores=scores)
    means = [row.mean_spearman for row in table]
    assert means == sorted(means, reverse=True) and all(row.recovery is None for row in table)
    same = try_candidates(torch.ones(5, 3), grid=candidate_grid(), scores=torch.ones(5, 1))
    assert [row.candidate for row in same] == list(candidate_grid())


def test_what_cannot_be_tried_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least two landmarks, got 1"):
        try_candidates(torch.ones(1, 3), grid=candidate_grid(), gram=torch.ones(1, 1))
    with pytest.raises(InvalidInput, match="needs the landmarks' gradient inner products, their scores, or both"):
        try_candidates(torch.ones(3, 3), grid=candidate_grid())
    with pytest.raises(InvalidInput, match="3 landmarks need as many rows of gradient inner products, got 2"):
        try_candidates(torch.ones(3, 3), grid=candidate_grid(), gram=torch.ones(2, 2))
    with pytest.raises(InvalidInput, match="3 landmarks need as many rows of scores, got 4"):
        try_candidates(torch.ones(3, 3), grid=candidate_grid(), scores=torch.ones(4, 1))
    with pytest.raises(InvalidInput, match="targets must be as many as columns of scores"):
        try_candidates(torch.ones(3, 3), grid=candidate_grid(), scores=torch.ones(3, 2), targets=[torch.ones(1, 3)])
