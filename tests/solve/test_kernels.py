import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput, InvalidSettings
from tamis.solve.kernels import EmbeddingMap, Kernel, embedding_map, kernel_matrix, median_squared_distance


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("name", ["rbf", "laplace", "linear"])
def test_kernels_equal_their_formula_pair_by_pair(name: str) -> None:
    x, y = normal(0, 4, 3), normal(1, 5, 3)
    found = kernel_matrix(x, y, Kernel(name=name, scale=0.5), 1.7)
    for i in range(4):
        for j in range(5):
            distance = float((x[i] - y[j]).norm())
            expected = {
                "rbf": np.exp(-(distance**2) / (0.5 * 1.7)),
                "laplace": np.exp(-distance / (0.5 * 1.7**0.5)),
                "linear": float(x[i] @ y[j]),
            }[name]
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_copies_of_a_row_are_alike_to_a_laplace_kernel_of_float32_rows() -> None:
    x = torch.nn.functional.normalize(normal(0, 50, 64).float())
    copies = kernel_matrix(x, x.clone(), Kernel(name="laplace"), 2.0).diagonal()
    torch.testing.assert_close(copies, torch.ones(50), rtol=0, atol=1e-6)  # 3e-4 with distances in float32


def test_median_is_that_of_all_pairs() -> None:
    i = torch.arange(6, dtype=torch.float64)
    e = torch.stack([torch.cos(i / 2), torch.sin(i / 2)], dim=1)
    assert median_squared_distance(e[[0, 2, 5]]) == pytest.approx(1.8585255966645944, rel=1e-14)
    x = normal(3, 9, 4)  # 36 pairs: the median lies between two of them
    pairs = [float((x[a] - x[b]).square().sum()) for a in range(9) for b in range(a)]
    assert median_squared_distance(x) == pytest.approx(float(np.median(pairs)), rel=1e-12)


def test_median_of_many_rows_is_that_of_a_fixed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.nn.functional.normalize(normal(3, 400, 20))
    whole = median_squared_distance(x)
    monkeypatch.setattr("tamis.solve.kernels._MEDIAN_ROWS", 100)
    sampled = median_squared_distance(x)
    assert sampled == median_squared_distance(x) != whole
    # Squared distances of random directions in 20 dimensions: 2 ± 0.45, so their median over 100 rows is near 2.
    assert sampled == pytest.approx(whole, rel=0.05)


def test_copies_have_median_one() -> None:
    assert median_squared_distance(torch.ones(5, 3) / 3**0.5) == 1.0
    assert median_squared_distance(torch.ones(1, 3)) == 1.0


def test_the_map_centres_then_scales_to_unit_length() -> None:
    made = EmbeddingMap(mean=torch.tensor([1.0, 1.0]))
    mapped = made.apply(torch.tensor([[4.0, 5.0], [1.0, 1.0], [1.0, -1.0]]))
    torch.testing.assert_close(mapped, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))
    assert EmbeddingMap().apply(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(InvalidInput, match="3 numbers a row but their mean has 2; embed pool and target alike"):
        made.apply(torch.zeros(1, 3))


@given(st.integers(3, 12), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_half_whitening_takes_the_root_of_every_singular_value(n: int, e: int, seed: int, centred: bool) -> None:
    sample = normal(seed, n, e) * torch.arange(1, e + 1)
    mean = sample.mean(0) if centred else None
    mapped = embedding_map(sample, mean=mean, half_whitened=True).apply(sample)
    u, s, v = np.linalg.svd((sample - mean if mean is not None else sample).numpy(), full_matrices=False)
    halved = (u * np.where(s > 1e-6 * s[0], np.sqrt(s), 0)) @ v
    expected = halved / np.maximum(np.linalg.norm(halved, axis=1, keepdims=True), 1e-300)
    np.testing.assert_allclose(mapped, expected, rtol=0, atol=1e-8)


def test_directions_the_sample_lacks_are_scaled_like_its_weakest() -> None:
    sample = torch.diag(torch.tensor([9.0, 4.0, 0.0], dtype=torch.float64))[:2]
    made = embedding_map(sample, mean=None, half_whitened=True)
    # Gains √(4/9), 1 and 1 along the axes.
    mapped = made.apply(torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(mapped, torch.tensor([[2.0, 2.0, 1.0]], dtype=torch.float64) / 3)


def test_a_sample_of_copies_changes_nothing() -> None:
    sample = torch.ones(4, 3)
    x = torch.tensor([[2.0, 1.0, 1.0]])
    made = embedding_map(sample, mean=sample.mean(0), half_whitened=True)
    assert made.apply(x).tolist() == [[1.0, 0.0, 0.0]]


def test_settings_that_do_not_exist_are_refused() -> None:
    unchecked = object.__new__(Kernel)  # where tests check types, the constructor would refuse the word first
    object.__setattr__(unchecked, "name", "cubic")
    with pytest.raises(InvalidSettings, match="'cubic' is unknown; choose one of rbf, laplace, linear"):
        unchecked.__post_init__()
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(InvalidSettings, match=f"scale must be a positive number, got {scale}"):
            Kernel(scale=scale)
