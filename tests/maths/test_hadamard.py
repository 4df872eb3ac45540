import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.maths.hadamard import fwht, hadamard_matrix


@pytest.mark.parametrize("bits", range(12))
def test_transform_equals_multiplication_by_the_dense_matrix(bits: int) -> None:
    x = torch.from_numpy(np.random.default_rng(bits).standard_normal((3, 2**bits)))
    dense = torch.from_numpy(scipy.linalg.hadamard(2**bits).astype(np.float64))
    expected = x @ dense
    # Both sum 2^bits numbers of size 1 in float64, in another order.
    torch.testing.assert_close(fwht(x), expected, rtol=1e-13, atol=1e-13 * 2 ** (bits / 2 + 1))
    torch.testing.assert_close(fwht(x.float()), expected.float(), rtol=1e-5, atol=1e-5 * 2 ** (bits / 2))


def test_integers_are_transformed_exactly() -> None:
    x = torch.arange(-2048, 2048, dtype=torch.float64)
    assert torch.equal(fwht(x), x @ torch.from_numpy(scipy.linalg.hadamard(4096).astype(np.float64)))


def test_hand_computed_case() -> None:
    # H_4 = [[1,1,1,1],[1,-1,1,-1],[1,1,-1,-1],[1,-1,-1,1]]
    assert fwht(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [10.0, -2.0, -4.0, 0.0]


def test_sylvester_matrix_is_scipys() -> None:
    for size in (1, 2, 32, 64):
        assert hadamard_matrix(size, dtype=torch.float64).tolist() == scipy.linalg.hadamard(size).tolist()


@given(st.integers(0, 10), st.integers(0, 2**32 - 1))
def test_transforming_twice_multiplies_by_the_size(bits: int, seed: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 2**bits)))
    torch.testing.assert_close(fwht(fwht(x)), x * 2**bits, rtol=1e-12, atol=1e-12 * 2**bits)


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_transform_is_linear_and_keeps_lengths(seed: int, factor: float) -> None:
    x, y = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 128)))
    torch.testing.assert_close(fwht(x + factor * y), fwht(x) + factor * fwht(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fwht(x).norm(), x.norm() * 128**0.5, rtol=1e-12, atol=0)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x = torch.randn(2, 3, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = fwht(x)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(whole[i, j], fwht(x[i, j]), rtol=1e-13, atol=1e-13)


def test_input_is_kept_unless_its_memory_is_offered() -> None:
    x = torch.arange(64.0)
    expected = fwht(x)
    assert x.tolist() == list(range(64))
    assert torch.equal(fwht(x.clone(), overwrite=True), expected)


def test_a_strided_input_is_transformed_by_value() -> None:
    x = torch.arange(32.0).view(8, 4).T
    assert torch.equal(fwht(x), fwht(x.contiguous()))


def test_no_rows_give_no_rows() -> None:
    assert fwht(torch.zeros(0, 16)).shape == (0, 16)


@pytest.mark.parametrize(
    ("x", "overwrite", "sentence"),
    [
        (torch.zeros(3), False, "power of two long, got 3; pad with zeros"),
        (torch.zeros(2, 0), False, "power of two long, got 0"),
        (torch.zeros(4, dtype=torch.bfloat16), False, "needs float32 or float64, got torch.bfloat16"),
        (torch.zeros(4, 8).T, True, "needs a contiguous tensor"),
    ],
)
def test_what_cannot_be_transformed_is_refused(x: torch.Tensor, overwrite: bool, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fwht(x, overwrite=overwrite)


def test_matrix_sizes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="got 12"):
        hadamard_matrix(12, dtype=torch.float32)
