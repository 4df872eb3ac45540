"""Counted operations equal a hand count, and PyTorch's own counter on real passes of every model family."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig

from tamis.errors import InvalidSettings
from tamis.gradients.hessian import hessian_products
from tamis.gradients.hooks import frozen
from tamis.model.flops import (
    Matrix,
    ModelShape,
    activation_backward_flops,
    feature_dim,
    feature_flops,
    forward_flops,
    hessian_flops,
    stage_flops,
    stage_tflops,
    weight_gradient_flops,
)
from tamis.model.loss import per_sample_losses
from tamis.model.targets import gradient_layers, input_embeddings
from tamis.projection import make_projector
from tamis.types import Batch
from tiny_models import FAMILIES, random_batch, tiny_model

# One block: a 3x2 matrix and a 2x3 matrix; width 2, head 5x2.
SHAPE = ModelShape(
    name="by hand",
    blocks=1,
    hidden=2,
    vocabulary=5,
    params=30,
    matrices=(Matrix(out_features=2, in_features=3, count=1), Matrix(out_features=3, in_features=2, count=1)),
    gradient_matrices=(Matrix(out_features=2, in_features=3, count=1), Matrix(out_features=3, in_features=2, count=1)),
    attention_width=2,
)


def test_the_hand_count() -> None:
    # Rows of 3 and 4 tokens, 2 supervised ones: matrices 2*12*7, attention 4*2*(9+16), head 2*10*2.
    assert forward_flops(SHAPE, 7, 2, 25) == 168 + 200 + 40
    assert activation_backward_flops(SHAPE, 7, 2, 25) == 168 + 400 + 40
    assert weight_gradient_flops(SHAPE, 7) == 168
    assert stage_flops(SHAPE, "gradient", 7, 2, 25) == 408 + 608
    assert stage_flops(SHAPE, "none", 7, 2, 25) == 0


def counted_forward(model: torch.nn.Module, batch: Batch) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        per_sample_losses(model, batch)
    return float(counter.get_total_flops())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_equal_what_pytorch_counts(family: str, lora: bool) -> None:
    model = tiny_model(family, dtype=torch.float32, lora=lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_attn_implementation("eager")  # type: ignore[operator]  # the counter knows plain products on every build
    batch = random_batch([12, 12, 12])
    sizes = (36, int(batch.supervised[:, 1:].sum()), 3 * 12**2)
    shape = ModelShape.from_model(model)
    assert counted_forward(model, batch) == forward_flops(shape, *sizes)

    with frozen(model), FlopCounterMode(display=False) as counter:
        handle = input_embeddings(model).register_forward_hook(lambda m, a, out: out.requires_grad_())
        per_sample_losses(model, batch).sum().backward()
        handle.remove()
    expected = forward_flops(shape, *sizes) + activation_backward_flops(shape, *sizes)
    assert counter.get_total_flops() == expected


def test_a_config_gives_the_shape_of_its_model_without_weights() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    assert isinstance(model.config, LlamaConfig)
    assert ModelShape.from_config(model.config) == ModelShape.from_model(model)


def test_biases_count_as_columns_of_gradients_and_tied_matrices_count_once() -> None:
    shape = ModelShape.from_model(tiny_model("qwen2", tied=True))
    assert shape.gradient_numel == sum(layer.numel for layer in gradient_layers(tiny_model("qwen2")))
    assert shape.params == ModelShape.from_model(tiny_model("qwen2")).params - 64 * 16


def test_a_token_pays_for_the_experts_it_is_sent_to() -> None:
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    shape = ModelShape.from_config(config)
    attention, router, expert = 16 * 16 * 2 + 16 * 8 * 2, 4 * 16, 3 * 16 * 24
    assert shape.block_products == pytest.approx(2 * (attention + router + 2 * expert))


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 10**9), st.integers(2, 50))
def test_operations_scale_with_the_rows(tokens: int, supervised: int, squared: int, times: int) -> None:
    once = stage_flops(SHAPE, "gradient", tokens, supervised, squared)
    assert stage_flops(SHAPE, "gradient", times * tokens, times * supervised, times * squared) == times * once


@pytest.mark.parametrize("name", ["none", "factorized", "rademacher", "hadamard", "mask"])
@pytest.mark.parametrize("lora", [False, True])
def test_feature_sizes_are_those_of_the_projectors(name: str, lora: bool) -> None:
    model = tiny_model("llama", lora=lora)
    dim = 8 if name == "factorized" else 50
    projector = make_projector(name, dim=None if name == "none" else dim, seed=0)
    assert feature_dim(ModelShape.from_model(model), name, dim) == projector.output_dim(gradient_layers(model))


def test_factorized_features_by_hand() -> None:
    # 10 tokens; a 40x30 matrix to 4x4: sides 40*4 + 30*4, then 4*4; a side of 3 is left whole.
    shape = SimpleNamespace(gradient_matrices=(Matrix(out_features=40, in_features=30, count=2),))
    assert feature_flops(shape, "factorized", 4, rows=1, tokens=10) == 2 * 2 * 10 * (160 + 120 + 16)  # type: ignore[arg-type]
    whole = SimpleNamespace(gradient_matrices=(Matrix(out_features=40, in_features=3, count=1),))
    assert feature_flops(whole, "factorized", 4, rows=1, tokens=10) == 2 * 10 * (160 + 0 + 12)  # type: ignore[arg-type]


def test_other_projections_form_the_gradient_first() -> None:
    formed = weight_gradient_flops(SHAPE, 100)
    assert feature_flops(SHAPE, "mask", 8, rows=5, tokens=100) == formed
    assert feature_flops(SHAPE, "rademacher", 8, rows=5, tokens=100) == formed + 2 * 5 * 12 * 8
    assert feature_flops(SHAPE, "hadamard", 8, rows=5, tokens=100) == formed + 5 * 16 * 4
    with pytest.raises(InvalidSettings, match="cost of this projection is not known"):
        feature_flops(SHAPE, "gaussian", 8, rows=5, tokens=100)


def test_a_stage_of_a_run_costs_what_its_tokens_cost() -> None:
    stage = SimpleNamespace(work="gradient", tokens=7, supervised_tokens=2, squared_tokens=25)
    assert stage_tflops(SHAPE, stage) == pytest.approx(1016e-12)
    stage.work = "thinking"
    with pytest.raises(InvalidSettings, match="work='thinking'"):
        stage_tflops(SHAPE, stage)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_hessian_products_cost_what_the_counter_sees_but_for_what_first_layers_spare(family: str, lora: bool) -> None:
    model = tiny_model(family, lora=lora, dtype=torch.float32)
    layers, shape = gradient_layers(model), ModelShape.from_model(model)
    batch = random_batch([12, 12, 12], supervised_share=1.0)
    directions = {layer.name: torch.randn(3, *layer.shape) for layer in layers}
    with FlopCounterMode(display=False) as counter:
        hessian_products(model, [(batch, torch.ones(3))], layers, directions)
    counted = hessian_flops(shape, 3, 36, 33, 3 * 144)
    # Two blocks only: the first block's inputs need no gradient, a large part of so small a model.
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.12)
    assert counter.get_total_flops() <= counted * 1.02
