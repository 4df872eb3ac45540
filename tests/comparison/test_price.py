"""Training is said to cost what PyTorch counts while a model trains, and what online runs count of themselves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tamis.comparison.cells import Price, Seen
from tamis.gradients.parameters import param_matrices
from tamis.model.flops import ModelShape, TrainedMatrices
from tamis.model.loss import evaluation_mode, per_sample_losses
from tamis.model.trainable import trainable_layers
from tamis.online.cost import Counter, token_sums
from tamis.training.lora import add_lora
from tamis.types import Batch
from tiny_models import random_batch, tiny_model

RANK = 3
# Keys, queries and values of the first block: 16 hidden, 4 heads of 4, 2 of them for keys and values.
FIRST_READERS = 16 * 16 + 2 * 8 * 16
FIRST_DOWN = 3 * RANK * 16  # their factors A


def rows() -> Batch:
    """Three rows of one length, so that nothing is padded."""
    return random_batch([12, 12, 12], seed=4)


def trained_model(kind: str) -> Any:
    model: Any = tiny_model("llama", dtype=torch.float32, tied=kind == "tied")
    if kind == "lora":
        model = add_lora(model, rank=RANK, alpha=6, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_attn_implementation("eager")  # the counter knows plain products on every build
    return model


def counted_in_training(model: Any, batch: Batch) -> float:
    with FlopCounterMode(display=False) as counter, evaluation_mode(model):
        per_sample_losses(model, batch).sum().backward()
    return float(counter.get_total_flops())


def said(model: Any, batch: Batch) -> float:
    tokens, supervised, squared = token_sums([batch])
    seen = Seen(
        rows=len(batch.rows), tokens=int(tokens), supervised_tokens=int(supervised), squared_tokens=int(squared)
    )
    price = Price(shape=ModelShape.from_model(model), trained=TrainedMatrices.of(model))
    return price.tflops(seen) * 1e12


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_training_every_weight_costs_what_pytorch_counts(kind: str) -> None:
    model, batch = trained_model(kind), rows()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
    assert said(model, batch) == pytest.approx(counted_in_training(model, batch), rel=1e-12)


def test_training_an_adapter_costs_what_pytorch_counts_but_for_what_the_first_block_spares() -> None:
    """Nothing below the first block's factors is trained, so no gradient flows into their input: 2 operations each."""
    model, batch = trained_model("lora"), rows()
    spared = 2 * (FIRST_READERS + FIRST_DOWN) * 36
    assert said(model, batch) - spared == pytest.approx(counted_in_training(model, batch), rel=1e-12)


@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
def test_online_runs_count_the_same(kind: str) -> None:
    model, batch = trained_model(kind), random_batch([5, 12, 9], seed=2)
    counter = Counter(model, param_matrices(model, trainable_layers(model)))
    assert said(model, batch) == pytest.approx(counter.flops("gradient", token_sums([batch])), rel=1e-12)


def test_only_what_is_trained_has_weight_gradients() -> None:
    block = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24
    whole = TrainedMatrices.of(trained_model("untied"))
    assert (whole.body, whole.head) == (2 * block, 16 * 64)
    factors = [p.numel() for name, p in trained_model("lora").named_parameters() if "lora_" in name]
    adapter = TrainedMatrices.of(trained_model("lora"))
    assert (adapter.body, adapter.head) == (sum(factors), 0) and len(factors) == 2 * 2 * 7
    model = trained_model("untied").requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(True)
    assert TrainedMatrices.of(model) == TrainedMatrices(body=16.0 * 24, head=0.0)
