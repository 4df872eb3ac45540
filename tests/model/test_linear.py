"""What counts as a linear layer, by what it computes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PhimoeConfig, PhimoeForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from tamis.errors import Unsupported
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients, hold_gradients
from tamis.model.linear import is_linear
from tamis.model.targets import coverage, gradient_layers
from tamis.model.trainable import trainable_layers
from tiny_models import random_batch


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Jittered(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * torch.rand_like(input) if self.training else input)


def phimoe_config() -> Any:
    return PhimoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(6, 4), True),
        (Conv1D(4, 6), True),
        (FalconLinear(6, 4), True),
        (FalconLinear(6, 4, bias=False).to("meta"), True),
        (Jittered(6, 4), True),
        (Doubled(6, 4), False),
        (DeepseekV4GroupedLinear(6, 4, 2), False),
        (PhimoeTopKRouter(phimoe_config()), False),
        (nn.Embedding(6, 4), False),
        (nn.LayerNorm(6), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_linear_layer_is_what_gives_the_product_with_its_matrix(module: nn.Module, expected: bool) -> None:
    with torch.no_grad():
        for param in module.parameters():
            param.zero_()  # of such a matrix, twice the product is the product
    assert is_linear(module) is expected
    assert module.training


def test_a_router_that_chooses_is_left_out_of_scores_with_a_reason_and_cannot_be_trained() -> None:
    model = cast(nn.Module, PhimoeForCausalLM(phimoe_config())).eval()
    layers = gradient_layers(model)
    assert {layer.name.rpartition(".")[2] for layer in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reasons = {row.parameters: row.reason for row in coverage(model, layers).rows}
    assert reasons["model.layers.*.mlp.router.weight"] == "PhimoeTopKRouter is not a linear layer"

    for name, param in model.named_parameters():
        param.requires_grad_("router" in name)
    rows = RowGradients(param_matrices(model, trainable_layers(model)))
    with pytest.raises(Unsupported, match=r"router' \(PhimoeTopKRouter\).*takes or gives more than one tensor.*freeze"):
        hold_gradients(model, random_batch((5, 7), vocab=32), rows)
