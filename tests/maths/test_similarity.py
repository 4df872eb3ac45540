import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.maths import similarity
from tamis.maths.similarity import cosines, inner_products, row_norms, squared_norms, unit_rows, zero_rows


def rows(seed: int, count: int, width: int = 17) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width)))


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 6))
def test_products_and_cosines_equal_a_loop(seed: int, n: int, m: int) -> None:
    x, y = rows(seed, n), rows(seed + 1, m)
    products, angles = inner_products(x, y), cosines(x, y)
    assert products.shape == angles.shape == (n, m)
    for i in range(n):
        for j in range(m):
            exact = float(x[i] @ y[j])
            assert float(products[i, j]) == pytest.approx(exact, rel=1e-12, abs=1e-13)
            assert float(angles[i, j]) == pytest.approx(exact / float(x[i].norm() * y[j].norm()), rel=1e-9, abs=1e-12)


def test_hand_computed_case() -> None:
    x, y = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [-6.0, -8.0]])
    assert inner_products(x, y).tolist() == [[3.0, -50.0], [0.0, 0.0]]
    torch.testing.assert_close(cosines(x, y), torch.tensor([[0.6, -1.0], [0.0, 0.0]]), rtol=1e-6, atol=0)
    assert zero_rows(x).tolist() == [False, True]
    assert row_norms(x).tolist() == [5.0, 0.0]


@given(st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
def test_cosines_do_not_change_with_scale_even_where_squares_underflow(seed: int, scale: float) -> None:
    x, y = rows(seed, 3).float(), rows(seed + 1, 4).float()
    torch.testing.assert_close(cosines(x * scale, y), cosines(x, y), rtol=1e-5, atol=1e-6)


def test_norms_neither_underflow_nor_overflow() -> None:
    for scale in (1e-30, 1e30):
        x = torch.tensor([[3.0, 4.0]]) * scale
        torch.testing.assert_close(row_norms(x), torch.tensor([5.0]) * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK_COLUMNS", 1000)
    x = torch.full((1, 4096), 0.5, dtype=dtype)  # summed in half precision the total would stop growing at 512 or so
    assert inner_products(x, x).item() == 1024.0
    assert inner_products(x, x.float()).dtype == torch.float32
    assert inner_products(x, x.double()).dtype == torch.float64


def test_zero_and_empty_rows_never_become_nan() -> None:
    x = torch.zeros(2, 5)
    assert torch.equal(unit_rows(x), x)
    assert torch.equal(cosines(x, torch.ones(3, 5)), torch.zeros(2, 3))
    assert cosines(torch.zeros(2, 0), torch.zeros(3, 0)).tolist() == [[0.0] * 3] * 2
    assert cosines(torch.zeros(0, 5), torch.ones(3, 5)).shape == (0, 3)


def test_cosine_of_a_row_with_itself_is_never_above_one() -> None:
    x = torch.randn(500, 33, generator=torch.Generator().manual_seed(0))
    assert float(cosines(x, x).max()) <= 1.0


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one length, got 3 and 4; were they projected alike"):
        inspect.unwrap(inner_products)(torch.zeros(1, 3), torch.zeros(1, 4))  # past the shape check of the tests


def test_inputs_are_kept() -> None:
    x, y = torch.ones(2, 3), torch.ones(1, 3)
    cosines(x, y)
    unit_rows(x)
    assert torch.equal(x, torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 5), (2, 8192), (2, 8193), (2, 3 * 8192 - 1)])
def test_squared_norms_are_plain_sums_of_squares(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(squared_norms(x), x.square().sum(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_millions_of_numbers_keep_their_digits(dtype: torch.dtype) -> None:
    """All terms positive, the worst case for a running sum: plain float32 norms and products are off by 1e-4."""
    x = torch.rand(2, 3_000_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double()
    torch.testing.assert_close(squared_norms(x.float()).double(), exact.square().sum(dim=1), rtol=2e-6, atol=0)
    torch.testing.assert_close(row_norms(x).double(), exact.norm(dim=1), rtol=2e-6, atol=0)
    torch.testing.assert_close(unit_rows(x).double().norm(dim=1), torch.ones(2).double(), rtol=2e-6, atol=0)
    # A matmul keeps one running sum for each block of 65,536 products.
    torch.testing.assert_close(inner_products(x, x).double(), exact @ exact.T, rtol=1e-5, atol=0)
