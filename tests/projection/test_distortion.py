import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradient_layers import LAYERS, layer, low_rank_gradient, random_gradients
from sketch_variance import dense_variance, factorized_sd, factorized_variance
from tamis.errors import InvalidInput
from tamis.projection import make_projector, project_gradients
from tamis.projection.distortion import measure_distortion
from tamis.projection.factorized import FactorizedProjector


def every_sign_matrix(rows: int, columns: int) -> list[torch.Tensor]:
    signs = itertools.product([-1.0, 1.0], repeat=rows * columns)
    return [torch.tensor(s, dtype=torch.float64).view(rows, columns) / columns**0.5 for s in signs]


@pytest.mark.parametrize(("k_out", "k_in"), [(1, 1), (2, 1), (1, 2), (2, None), (None, 2), (None, None)])
@pytest.mark.parametrize("transposed", [False, True])
def test_variance_of_signs_is_exact_over_all_sign_matrices(
    k_out: int | None, k_in: int | None, transposed: bool
) -> None:
    x, y = random_gradients(2, numel=6).view(2, 3, 2)
    if transposed:
        x, y, k_out, k_in = x.T, y.T, k_in, k_out
    outs = [torch.eye(x.shape[0]).double()] if k_out is None else every_sign_matrix(x.shape[0], k_out)
    ins = [torch.eye(x.shape[1]).double()] if k_in is None else every_sign_matrix(x.shape[1], k_in)
    left = torch.stack(outs)
    products = [(((left.mT @ x @ p) * (left.mT @ y @ p)).sum((1, 2))) for p in ins]
    estimates = torch.cat(products)
    torch.testing.assert_close(estimates.mean(), (x * y).sum(), rtol=1e-10, atol=1e-10)
    exact = float(estimates.var(unbiased=False))
    assert factorized_variance(x, y, k_out=k_out, k_in=k_in) == pytest.approx(exact, rel=1e-9, abs=1e-10)


def test_gaussian_variance_is_the_formula_of_the_specification() -> None:
    # Written out once more from section 9, with W = X^T Y formed and nothing simplified; and by 40,000 draws.
    x, y = random_gradients(2, numel=20).view(2, 5, 4)
    w, k_in, k_out = x.T @ y, 3, 2
    trace, w2, z2 = float(torch.trace(w @ w)), float(w.norm() ** 2), float((x @ y.T).norm() ** 2)
    product, norms = float((x * y).sum()), float(x.norm() ** 2 * y.norm() ** 2)
    expected = (trace + w2) / k_in + (trace + z2) / k_out + (w2 + z2 + product**2 + norms) / (k_in * k_out)
    assert factorized_variance(x, y, k_out=k_out, k_in=k_in, gaussian=True) == pytest.approx(expected, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(40_000, 5, k_out, dtype=torch.float64, generator=generator) / k_out**0.5
    right = torch.randn(40_000, 4, k_in, dtype=torch.float64, generator=generator) / k_in**0.5
    draws = ((left.mT @ x @ right) * (left.mT @ y @ right)).sum((1, 2))
    assert float(draws.var()) == pytest.approx(expected, rel=0.08)  # heavy tails: 3 standard errors are about 6 %


def test_rank_one_gradients_by_hand() -> None:
    # x = y = e1 e1^T: the projected entry has |value| 1 for signs, whatever the draw; Gaussian: 3·3 - 1 at k = 1.
    x = torch.zeros(3, 2)
    x[0, 0] = 1
    assert factorized_variance(x, x, k_out=1, k_in=1) == pytest.approx(0, abs=1e-12)
    assert factorized_variance(x, x, k_out=1, k_in=1, gaussian=True) == pytest.approx(8)


def test_dense_variance_is_exact_over_all_sign_matrices() -> None:
    x, y = random_gradients(2, numel=5)
    estimates = torch.stack([(s @ x) @ (s @ y) for s in (m.T * 2**0.5 for m in every_sign_matrix(5, 2))]) / 2
    assert dense_variance(x, y, dim=2) == pytest.approx(float(estimates.var(unbiased=False)), rel=1e-9)
    expected = float(x @ x * (y @ y) + (x @ y) ** 2) / 2
    assert dense_variance(x, y, dim=2, gaussian=True) == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [1, 30])
def test_predicted_sd_over_all_layers_is_the_one_measured(tokens: int) -> None:
    pair = [{e.name: low_rank_gradient(e, tokens, seed=s + i)[0] for i, e in enumerate(LAYERS)} for s in (0, 100)]
    x, y = (torch.cat([g[e.name].flatten() for e in LAYERS]) for g in pair)
    predicted = factorized_sd(FactorizedProjector(dim=4, seed=0), LAYERS, *pair)
    trials = 500
    errors = []
    for seed in range(trials):
        fx, fy = project_gradients(FactorizedProjector(dim=4, seed=seed), torch.stack([x, y]), LAYERS)
        errors.append(float((fx @ fy - x @ y) / (x.norm() * y.norm())))
    measured = torch.tensor(errors).std().item()
    assert measured == pytest.approx(predicted, rel=0.15)  # an sd over 500 draws is known to 3 %, less with heavy tails


def test_factorized_noise_falls_with_the_rank_of_the_gradients_at_equal_k() -> None:
    entry = layer("x", 60, 60)
    projector = FactorizedProjector(dim=8, seed=0)
    sds = []
    for tokens in (1, 4, 60):
        pair = [{"x": low_rank_gradient(entry, tokens, seed=s)[0]} for s in (0, 1)]
        sds.append(factorized_sd(projector, [entry], pair[0], pair[0]))
    assert sds[0] > sds[1] > sds[2]


@pytest.mark.parametrize(("name", "dim"), [("none", None), ("factorized", 4), ("hadamard", 64), ("mask", 64)])
def test_measured_errors_are_differences_of_cosines(name: str, dim: int | None) -> None:
    grads = random_gradients(6)
    features = project_gradients(make_projector(name, dim=dim, seed=0), grads, LAYERS)
    errors = measure_distortion(grads @ grads.T, features)
    assert len(errors.error) == 15
    for (i, j), cosine, error in zip(itertools.combinations(range(6), 2), errors.cosine, errors.error, strict=True):
        exact, projected = (float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for x in (grads, features))
        assert float(cosine) == pytest.approx(exact, abs=1e-12)
        assert float(error) == pytest.approx(projected - exact, abs=1e-12)
    assert errors.rms == pytest.approx(float(errors.error.norm()) / 15**0.5)
    assert (errors.rms < 1e-9) == (name == "none")


def test_the_cosine_of_two_vectors_by_hand() -> None:
    # 45 degrees apart; a projection on the first axis makes them parallel.
    grads = torch.tensor([[2.0, 0.0], [3.0, 3.0]])
    errors = measure_distortion(grads @ grads.T, grads[:, :1])
    assert errors.cosine.tolist() == pytest.approx([0.5**0.5])
    assert errors.error.tolist() == pytest.approx([1 - 0.5**0.5])


@given(st.integers(2, 6), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_neither_the_length_of_gradients_nor_the_unit_of_features_matters(rows: int, scale: float, seed: int) -> None:
    grads = random_gradients(rows, seed=seed)
    features = project_gradients(make_projector("hadamard", dim=32, seed=seed), grads, LAYERS)
    lengths = torch.logspace(-2, 2, rows, dtype=torch.float64)[:, None]
    plain = measure_distortion(grads @ grads.T, features)
    other = measure_distortion((lengths * grads) @ (lengths * grads).T, scale * lengths * features)
    torch.testing.assert_close(other.cosine, plain.cosine, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other.error, plain.error, rtol=1e-9, atol=1e-12)


def test_zero_gradients_are_refused_and_not_divided_by() -> None:
    grads = random_gradients(3)
    grads[1] = 0
    with pytest.raises(InvalidInput, match="leave rows without a gradient out"):
        measure_distortion(grads @ grads.T, grads)


def test_one_row_has_no_pairs() -> None:
    with pytest.raises(InvalidInput, match="at least two rows, got 1"):
        measure_distortion(torch.ones(1, 1), torch.ones(1, 3))
