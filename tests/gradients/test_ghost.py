"""Both orders of every product against explicit gradients, and the rule that picks one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.gradients.ghost import alignments, direct_alignments, direct_is_cheaper, factored_alignments
from tamis.gradients.layers import per_sample_gradient


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    directions=st.integers(0, 3),
    has_bias=st.booleans(),
    norms=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_direct_and_factored_orders_give_the_products_of_the_explicit_gradients(
    sizes: tuple[int, int, int, int], directions: int, has_bias: bool, norms: bool, seed: int
) -> None:
    batch, tokens, out_features, in_features = sizes
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    act, grad_out = random(batch, tokens, in_features), random(batch, tokens, out_features)
    matrices = random(directions, out_features, in_features + has_bias) if directions else None
    inputs = torch.cat([act, torch.ones(batch, tokens, 1, dtype=torch.float64)], dim=2) if has_bias else act
    grads = torch.einsum("bto,bti->boi", grad_out, inputs)
    for order in (direct_alignments, factored_alignments, alignments):
        dots, squares = order(act, grad_out, matrices, has_bias=has_bias, norms=norms)
        if matrices is None:
            assert dots is None
        else:
            torch.testing.assert_close(dots, torch.einsum("boi,joi->bj", grads, matrices), rtol=1e-10, atol=1e-10)
        if norms:
            torch.testing.assert_close(squares, grads.square().sum(dim=(1, 2)), rtol=1e-10, atol=1e-10)
        else:
            assert squares is None


def test_hand_case() -> None:
    """One sample, two tokens: grads = 1*[1,2] + 3*[0,1] = [1,5] in one output; with the bias column [1, 5, 4]."""
    act = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
    grad_out = torch.tensor([[[1.0], [3.0]]])
    assert per_sample_gradient(act, grad_out, has_bias=True).tolist() == [[[1.0, 5.0, 4.0]]]
    for order in (direct_alignments, factored_alignments):
        dots, squares = order(act, grad_out, torch.tensor([[[1.0, 1.0, 0.5]]]), has_bias=True, norms=True)
        assert dots is not None
        assert squares is not None
        assert dots.tolist() == [[8.0]]
        assert squares.tolist() == pytest.approx([42.0], rel=1e-6)


def test_direct_order_splits_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tamis.gradients.ghost._CHUNK", 7)
    torch.manual_seed(0)
    act, grad_out = torch.randn(5, 3, 2, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    _, few = direct_alignments(act, grad_out, None, has_bias=False, norms=True)
    monkeypatch.undo()
    _, whole = direct_alignments(act, grad_out, None, has_bias=False, norms=True)
    torch.testing.assert_close(few, whole, rtol=1e-14, atol=0)


def test_order_follows_the_operation_count() -> None:
    # Long texts: pairs of positions are many, the gradient is formed. Short texts and wide layers: never formed.
    assert direct_is_cheaper(tokens=2048, out_features=576, in_features=576, directions=1, norms=True)
    assert not direct_is_cheaper(tokens=16, out_features=4096, in_features=4096, directions=1, norms=True)
    assert not direct_is_cheaper(tokens=64, out_features=4096, in_features=4096, directions=0, norms=True)
    # Every further direction costs the factored order a matmul, the direct order one reading.
    assert direct_is_cheaper(tokens=256, out_features=576, in_features=576, directions=100, norms=False)


def test_half_precision_factors_are_combined_in_float32() -> None:
    torch.manual_seed(0)
    act, grad_out = torch.randn(2, 64, 8).bfloat16(), torch.randn(2, 64, 8).bfloat16()
    exact = torch.einsum("bto,bti->boi", grad_out.double(), act.double())
    grads = per_sample_gradient(act, grad_out, has_bias=False)
    assert grads.dtype == torch.float32
    torch.testing.assert_close(grads.double(), exact, rtol=0, atol=1e-4)  # bf16 products would be off by 0.05
    for order in (direct_alignments, factored_alignments):
        _, squares = order(act, grad_out, None, has_bias=False, norms=True)
        assert squares is not None
        torch.testing.assert_close(squares.double(), exact.square().sum(dim=(1, 2)), rtol=1e-5, atol=0)
