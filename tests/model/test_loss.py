"""The loss convention: mean over supervised tokens, one row at a time, from logits at those positions only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oracles import reference_loss
from tamis.errors import InvalidInput, NonFinite, Unsupported
from tamis.model.loss import evaluation_mode, per_sample_losses, require_finite, supervised_positions
from tamis.types import Batch
from tiny_models import FAMILIES, one_row, padded_by, permuted, random_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_losses_equal_cross_entropy_of_full_logits(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(family, dtype=dtype)
    batch = random_batch([5, 9, 12, 3])
    with torch.no_grad():
        losses = per_sample_losses(model, batch)
        for row, length in enumerate([5, 9, 12, 3]):
            expected = reference_loss(model, batch.input_ids[row, :length], batch.supervised[row, :length])
            torch.testing.assert_close(losses[row], expected, rtol=tolerance, atol=0)
    assert losses.dtype == dtype


def test_logits_are_formed_at_supervised_positions_only() -> None:
    model = tiny_model("llama")
    batch = random_batch([9, 12], supervised_share=0.3)
    seen: list[tuple[int, ...]] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, a, output: seen.append(tuple(output.shape)))
    per_sample_losses(model, batch)
    handle.remove()
    assert seen == [(1, int(batch.supervised[:, 1:].sum()), 64)]


def test_uniform_logits_cost_log_of_the_vocabulary() -> None:
    """By hand: with a zero head every token has probability 1/64, whatever is supervised."""
    model = tiny_model("llama", tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        losses = per_sample_losses(model, random_batch([4, 7]))
    torch.testing.assert_close(losses, torch.full((2,), math.log(64), dtype=torch.float64), rtol=1e-14, atol=0)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4), seed=st.integers(0, 99), extra=st.integers(0, 5))
def test_losses_do_not_depend_on_padding_or_order(lengths: list[int], seed: int, extra: int) -> None:
    model = tiny_model("gpt2")
    batch = random_batch(lengths, seed=seed)
    order = list(range(len(lengths)))[::-1]
    with torch.no_grad():
        losses = per_sample_losses(model, batch)
        other = per_sample_losses(model, padded_by(permuted(batch, order), extra))
    torch.testing.assert_close(other, losses[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_the_loss_equals_that_of_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also across several blocks of logits, and for losses that are not just summed."""
    monkeypatch.setattr("tamis.model.loss._CPU_CHUNK", 3 * 11)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 5), nn.Linear(5, 11)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Tensor, **_: object) -> object:
            return type("Output", (), {"logits": self.head(self.embedding(input_ids))})

    torch.manual_seed(0)
    model = Model().to(dtype)
    batch = random_batch([6, 9, 4], vocab=11)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (per_sample_losses(model, batch).double() * scales).sum().backward()
    got = model.head.weight.grad
    model.zero_grad()
    logits = model.head(model.embedding(batch.input_ids))
    rows = []
    for row in range(3):
        at = batch.supervised[row, 1:].nonzero()[:, 0]
        rows.append(nn.functional.cross_entropy(logits[row, at].to(torch.float64), batch.input_ids[row, at + 1]))
    (torch.stack(rows) * scales).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, model.head.weight.grad, rtol=tolerance, atol=tolerance)


def test_extreme_logits_give_finite_exact_losses() -> None:
    """A label 500 nats below the top has probability 0 in float32; its loss is still 500, and its neighbour's exact."""
    model = tiny_model("llama", tied=False, dtype=torch.float32)
    head = nn.Linear(16, 64).float()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[0] = 500.0
    model.set_output_embeddings(head)
    with torch.no_grad():
        losses = per_sample_losses(model, random_batch([5]))
        likely = one_row(random_batch([5]), 0)
        likely.input_ids[0, 2:] = 0  # the token that the head is sure of
        likely.supervised[0] = torch.tensor([False, False, True, True, True])
        certain = per_sample_losses(model, likely)
    torch.testing.assert_close(losses, torch.tensor([500.0]), rtol=1e-6, atol=0)
    assert certain.tolist() == [0.0]


def test_first_token_never_counts() -> None:
    batch = random_batch([4])
    batch.supervised[0] = torch.tensor([True, False, True, False])
    positions = supervised_positions(batch)
    assert positions.flat.tolist() == [1]
    assert positions.labels.tolist() == [int(batch.input_ids[0, 2])]
    assert positions.counts.tolist() == [1]


def test_positions_of_several_rows_by_hand() -> None:
    batch = Batch(
        rows=torch.tensor([7, 9]),
        input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]),
        attention_mask=torch.ones(2, 3, dtype=torch.int64),
        supervised=torch.tensor([[False, True, True], [True, False, True]]),
    )
    positions = supervised_positions(batch)
    assert positions.row.tolist() == [0, 0, 1]
    assert positions.slot.tolist() == [0, 1, 0]
    assert positions.flat.tolist() == [0, 1, 4]
    assert positions.labels.tolist() == [4, 5, 8]
    assert positions.width == 2


def test_rows_without_supervised_tokens_are_refused_by_number() -> None:
    batch = random_batch([4, 5])
    batch.supervised[1] = False
    batch.supervised[1, 0] = True  # the first token alone is nothing to predict
    with pytest.raises(InvalidInput, match="rows 1 have no supervised token"):
        per_sample_losses(tiny_model("llama"), batch)


def test_non_finite_losses_are_named() -> None:
    batch = random_batch([3] * 8)
    losses = torch.tensor([1.0, float("nan"), float("inf"), 1, float("nan"), float("nan"), float("nan"), float("nan")])
    with pytest.raises(NonFinite, match="rows 1, 2, 4, 5, 6 and 1 more is NaN or infinite") as error:
        require_finite(losses, batch)
    assert error.value.rows == (1, 2, 4, 5, 6, 7)


def test_head_that_is_not_fed_tokens_is_refused() -> None:
    """A model that keeps its last position only, say for a reward, gives no logits to learn tokens from."""
    model = tiny_model("llama")

    def keep_last(module: nn.Module, args: object, output: Any) -> Any:
        return type(output)(last_hidden_state=output.last_hidden_state[:, -1:])

    model.model.register_forward_hook(keep_last)
    with pytest.raises(Unsupported, match=r"LM head of LlamaForCausalLM is fed \(2, 1, 16\); expected \(2, 4\) tokens"):
        per_sample_losses(model, random_batch([4, 4]))


def test_evaluation_mode_keeps_checkpointed_blocks_and_zeroes_their_rates() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gradient_checkpointing = True
            self.dropout = 0.3
            self.inner = nn.Dropout(0.5)

    model = nn.Sequential(Block(), nn.Dropout(0.1)).train()
    with evaluation_mode(model):
        assert model[0].training
        assert model[0].dropout == 0.0
        assert not model[0].inner.training
        assert not model[1].training
    assert all(module.training for module in model.modules())
    assert model[0].dropout == 0.3
    with evaluation_mode(model, checkpointing=False):
        assert not model[0].training
    with torch.no_grad(), evaluation_mode(model):
        assert not model[0].training
