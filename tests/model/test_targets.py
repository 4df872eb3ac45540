"""Which layers carry gradients, and an account of every parameter."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from tamis.errors import InvalidSettings, Unsupported
from tamis.model.blocks import first_blocks
from tamis.model.targets import coverage, gradient_layers, is_tied
from tiny_models import FAMILIES, tiny_model


def test_llama_layers_are_the_linear_layers_of_its_blocks() -> None:
    model = tiny_model("llama")
    layers = gradient_layers(model)
    assert [layer.name for layer in layers[:7]] == [
        f"model.layers.0.{name}"
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert len(layers) == 14
    assert {layer.kind for layer in layers} == {"linear"}
    assert layers[4].shape == (24, 16)
    assert not any(layer.has_bias for layer in layers)


def test_biases_add_a_column_where_the_model_has_them() -> None:
    layers = {layer.name.split(".")[-1]: layer for layer in gradient_layers(tiny_model("qwen2"))}
    assert layers["q_proj"].shape == (16, 17)
    assert layers["o_proj"].shape == (16, 16)


def test_conv1d_is_a_linear_layer_with_its_weight_transposed() -> None:
    layers = {layer.name.split(".")[-1]: layer for layer in gradient_layers(tiny_model("gpt2"))}
    assert layers["c_attn"].kind == "conv1d"
    assert layers["c_attn"].shape == (48, 17)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_layers_are_its_trainable_factors(family: str) -> None:
    model = tiny_model(family, lora=True)
    layers = gradient_layers(model)
    trainable = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.requires_grad}
    assert {layer.name for layer in layers} == trainable
    assert coverage(model, layers).share == 1.0
    assert min(min(layer.shape) for layer in layers) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_head_is_last_and_only_on_request(tied: bool) -> None:
    model = tiny_model("gpt2", tied=tied)
    assert is_tied(model) == tied
    assert all(layer.kind != "head" for layer in gradient_layers(model))
    assert gradient_layers(model, include_head=True)[-1].name == "lm_head"


def test_frozen_head_cannot_be_included() -> None:
    with pytest.raises(InvalidSettings, match=r"LM head '.*lm_head' is frozen"):
        gradient_layers(tiny_model("llama", lora=True), include_head=True)


def test_tied_head_with_a_bias_is_refused() -> None:
    model = tiny_model("llama", tied=True)
    model.lm_head.bias = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    with pytest.raises(Unsupported, match="has a bias and shares its matrix"):
        gradient_layers(model, include_head=True)


def test_model_without_trainable_layers_is_refused() -> None:
    with pytest.raises(Unsupported, match="no trainable linear layer"):
        gradient_layers(tiny_model("llama").requires_grad_(False))


def test_frozen_layers_carry_no_gradient() -> None:
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    assert all(layer.name.startswith("model.layers.1.") for layer in gradient_layers(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_coverage_accounts_for_every_parameter_once(family: str, lora: bool, head: bool) -> None:
    if lora and head:
        head = False
    model = tiny_model(family, lora=lora, tied=True)
    layers = gradient_layers(model, include_head=head)
    table = coverage(model, layers)
    assert sum(row.numel for row in table.rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.tensors for row in table.rows) == len(list(model.parameters()))
    assert table.covered == sum(layer.numel for layer in layers)
    assert sum(row.share for row in table.rows) == pytest.approx(1.0)
    assert table.share == pytest.approx(sum(row.share for row in table.rows if row.covered))
    assert all(row.reason for row in table.rows)


def test_coverage_groups_blocks_and_gives_reasons() -> None:
    model = tiny_model("llama", tied=False)
    rows = {row.parameters: row for row in coverage(model, gradient_layers(model)).rows}
    query = rows["model.layers.*.self_attn.q_proj.weight"]
    assert (query.tensors, query.numel, query.covered, query.reason) == (2, 512, True, "linear layer")
    assert rows["lm_head.weight"].reason == "LM head: left out unless asked for"
    assert rows["model.embed_tokens.weight"].reason == "token embedding"
    assert rows["model.norm.weight"].reason == "norm, bias or scale vector"
    tied = tiny_model("llama", tied=True)
    rows = {row.parameters: row for row in coverage(tied, gradient_layers(tied, include_head=True)).rows}
    assert rows["model.embed_tokens.weight"].covered
    assert rows["model.embed_tokens.weight"].reason == "LM head and token embedding, one matrix"


def test_fused_experts_are_listed_as_uncovered() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config)
    layers = gradient_layers(model)
    assert not any("experts" in layer.name for layer in layers)
    uncovered = [row for row in coverage(model, layers).rows if "experts" in row.parameters]
    assert uncovered
    assert all(not row.covered and row.reason.startswith("routed experts") for row in uncovered)
    assert sum(row.share for row in uncovered) > 0.5


def test_dora_and_merged_adapters_are_refused() -> None:
    merged = tiny_model("llama", lora=True)
    merged.merge_adapter()
    with pytest.raises(Unsupported, match="the adapter is merged into"):
        gradient_layers(merged)
    dora = tiny_model("llama", lora=True)
    module = next(m for m in dora.modules() if hasattr(m, "lora_A"))
    module.use_dora["default"] = True
    with pytest.raises(Unsupported, match="uses DoRA"):
        gradient_layers(dora)


def test_a_part_of_a_model_without_the_adapter_s_layers_says_so() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model("llama"), config)
    assert gradient_layers(adapted)
    with pytest.raises(Unsupported, match=r"no layer of this part of .* carries the adapter"):
        gradient_layers(first_blocks(adapted, 1))
