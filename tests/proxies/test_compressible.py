"""Layers that cannot be put in factors are named with the reason, and the others are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import proxy_case
from tamis.errors import Unsupported
from tamis.proxies.compressible import find_compressible
from tiny_models import FAMILIES, VOCAB, random_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_the_blocks_are_found(family: str) -> None:
    found = find_compressible(proxy_case.model(family), random_batch([5, 8]))
    assert not found.left_out
    assert len(found.layers) == (2 * 4 if family == "gpt2" else 2 * 7)


def test_layers_that_do_not_act_as_plain_ones_are_named() -> None:
    model: Any = proxy_case.model("llama")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.v_proj = attention.k_proj  # one layer in two roles
    weight = mlp.gate_proj.weight

    class Bypassed(nn.Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:  # hooks never see it
            return nn.functional.linear(x, weight)

    bypassed = Bypassed(16, 24, bias=False)
    mlp.gate_proj = bypassed
    found = find_compressible(model, random_batch([5, 8]))
    reasons = {entry.layers: entry.reason for entry in found.left_out}
    assert reasons == {
        "model.layers.*.self_attn.k_proj": "is used 2 times in a pass",
        "model.layers.*.mlp.gate_proj": "is not called as a module",
    }
    assert len(found.layers) == 14 - 3


def test_routed_experts_stay_and_are_named() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    found = find_compressible(model, random_batch([5, 8]))
    assert {layer.name.rpartition(".")[2] for layer in found.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any("experts" in entry.layers and "experts" in entry.reason for entry in found.left_out)


def test_a_model_whose_blocks_are_nowhere_listed_is_compressed_and_says_so() -> None:
    model: Any = proxy_case.model("llama")
    model.config.num_hidden_layers = 7  # as if its list of blocks were another
    found = find_compressible(model, random_batch([5, 8]))
    assert len(found.layers) == 14 and "cannot be told apart" in found.notes[0]


def test_a_model_without_such_layers_is_refused() -> None:
    model: Any = proxy_case.model("gpt2")
    for block in model.transformer.h:
        for param in block.parameters():
            param.requires_grad_(False)
    with pytest.raises(Unsupported, match="no trainable linear layer"):
        find_compressible(model, random_batch([5, 8]))
