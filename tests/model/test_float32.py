"""A model of 16-bit weights measured in float32 gives the numbers of the same model cast to float32 as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from tamis.model.float32 import in_float32
from tamis.model.loss import per_sample_losses
from tiny_models import DECODERS, random_batch, tiny_model


def narrow(family: str, **options: Any) -> nn.Module:
    """Weights of 16 bits; those of an adapter, which are trained, of 32."""
    model = tiny_model(family, dtype=torch.float32, **options)
    for name, param in model.named_parameters():
        param.data = param.data if "lora" in name else param.data.bfloat16()
    return model


def losses(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return per_sample_losses(model, random_batch([5, 9, 3]))


CASES = [*((family, lora) for family in DECODERS for lora in (False, True)), ("gpt_neox", False)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "lora"), CASES)
def test_losses_are_those_of_the_whole_model_in_float32(family: str, lora: bool, tied: bool) -> None:
    model = narrow(family, lora=lora, tied=tied)
    before = {name: (id(tensor), tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()}
    wide = losses(copy.deepcopy(model).float())
    with torch.autocast("cpu", dtype=torch.bfloat16), in_float32(model):
        found = losses(model)
    assert torch.equal(found, wide) and found.dtype == torch.float32
    assert not torch.equal(losses(model).float(), wide)
    assert {name: (id(tensor), tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_block_at_a_time_is_wide() -> None:
    model = narrow("llama", blocks=3)
    seen = []

    def count(*_: Any) -> None:
        seen.append([block.mlp.up_proj.weight.dtype == torch.float32 for block in model.model.layers].count(True))

    for block in model.model.layers:
        block.mlp.register_forward_hook(count)
    with in_float32(model):
        losses(model)
    assert seen == [1, 1, 1]


def test_a_forward_that_a_trainer_wrapped_in_autocast_is_passed_by() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    plain = losses(model)
    model._original_forward = model.forward  # what accelerate does for a Trainer in 16 bits
    wrapped = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
    model.forward = wrapped
    assert not torch.equal(losses(model), plain)
    with in_float32(model):
        assert torch.equal(losses(model), plain)
    assert model.forward is wrapped


def test_weights_come_back_after_an_error() -> None:
    model = narrow("qwen2")

    def fail(*_: Any) -> None:
        raise ValueError("broken")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"), in_float32(model):
        losses(model)
    hook.remove()
    assert all(param.dtype == torch.bfloat16 for param in model.parameters())
    losses(model)
