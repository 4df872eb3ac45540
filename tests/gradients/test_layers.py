"""The short functions of one linear layer, against einsum on explicit inputs."""

from __future__ import annotations

import pytest
import torch

from tamis.gradients.layers import (
    inner_products,
    per_sample_gradient,
    project_side,
    weighted_gradient,
    with_bias_column,
)


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def case(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, bool]:
    torch.manual_seed(0)
    act = torch.randn(3, 5, 4, dtype=torch.float64)
    return act, torch.randn(3, 5, 2, dtype=torch.float64), request.param


def test_per_sample_gradient_sums_over_positions(case: tuple[torch.Tensor, torch.Tensor, bool]) -> None:
    act, grad_out, has_bias = case
    inputs = with_bias_column(act, has_bias=has_bias)
    expected = torch.einsum("bto,bti->boi", grad_out, inputs)
    torch.testing.assert_close(per_sample_gradient(act, grad_out, has_bias=has_bias), expected, rtol=1e-13, atol=1e-13)


def test_weighted_gradient_is_the_weighted_sum_of_per_sample_gradients(
    case: tuple[torch.Tensor, torch.Tensor, bool],
) -> None:
    act, grad_out, has_bias = case
    example_weights = torch.tensor([0.3, -1.0, 2.5], dtype=torch.float64)
    grads = per_sample_gradient(act, grad_out, has_bias=has_bias)
    expected = torch.einsum("b,boi->oi", example_weights, grads)
    got = weighted_gradient(act, grad_out, example_weights, has_bias=has_bias)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_projecting_the_factors_is_projecting_the_gradient(case: tuple[torch.Tensor, torch.Tensor, bool]) -> None:
    act, grad_out, has_bias = case
    p_in = torch.randn(4 + has_bias, 3, dtype=torch.float64)
    p_out = torch.randn(2, 2, dtype=torch.float64)
    left = project_side(grad_out, p_out, has_bias=False)
    right = project_side(act, p_in, has_bias=has_bias)
    whole = per_sample_gradient(act, grad_out, has_bias=has_bias)
    expected = p_out.T @ whole @ p_in
    torch.testing.assert_close(per_sample_gradient(right, left, has_bias=False), expected, rtol=1e-12, atol=1e-12)


def test_absent_side_is_the_identity(case: tuple[torch.Tensor, torch.Tensor, bool]) -> None:
    act, _, has_bias = case
    whole = project_side(act, None, has_bias=has_bias)
    assert whole.shape == (3, 5, 4 + has_bias)
    assert torch.equal(whole[..., :4], act)
    assert not has_bias or torch.equal(whole[..., 4], torch.ones(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 8191, 8192, 30_000])
def test_long_rows_have_the_products_of_plain_sums(length: int) -> None:
    torch.manual_seed(0)
    x, directions = torch.randn(3, length, dtype=torch.float64), torch.randn(2, length, dtype=torch.float64)
    torch.testing.assert_close(inner_products(x, directions), x @ directions.T, rtol=1e-9, atol=1e-9)


def test_float32_products_of_millions_of_numbers_keep_their_digits() -> None:
    """All terms positive, the worst case for a running sum: a plain float32 product of these rows is off by 1e-4."""
    torch.manual_seed(0)
    x = torch.rand(2, 3_000_000)
    exact = x.double() @ x.double().T
    torch.testing.assert_close(inner_products(x, x).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_no_weights_are_weights_of_one(dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    act, grad_out = (torch.randn(3, 5, size, generator=generator).to(dtype) for size in (4, 6))
    none, ones = (weighted_gradient(act, grad_out, w, has_bias=has_bias) for w in (None, torch.ones(3)))
    assert none.dtype == torch.float32
    assert torch.equal(none, ones)
