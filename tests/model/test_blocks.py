"""The first blocks as a model of their own, in every family, with and without an adapter."""

import pytest
import torch
from torch import nn

from tamis.errors import InvalidSettings, Unsupported
from tamis.model.blocks import Decoder, causal_model, first_blocks, graph_of_last_blocks, last_block_layers
from tamis.model.states import last_hidden_states
from tamis.model.targets import gradient_layers
from tiny_models import DECODERS, random_batch, tiny_model

CASES = [(family, lora) for family in DECODERS for lora in (False, True)]


def final_norm(model):
    stack = causal_model(model).base_model
    return stack.ln_f if hasattr(stack, "ln_f") else stack.norm


def states_behind_block(model, batch, depth):
    """Transformers' own record of the states between blocks (of unpadded rows), then the final norm."""
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, output_hidden_states=True)
        states = output.hidden_states[depth]
        is_normed = depth == len(output.hidden_states) - 1  # the last of them already went through it
        return states if is_normed else final_norm(model)(states)


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_first_blocks_give_the_states_that_the_whole_model_passes_through(family, lora):
    model = tiny_model(family, lora=lora, blocks=3)
    batch = random_batch([7, 7])
    for depth in range(4):
        found = last_hidden_states(first_blocks(model, depth), batch)
        expected = states_behind_block(model, batch, depth)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # parts of these models compute in float32


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_first_blocks_share_every_weight_and_leave_the_model_alone(family, lora):
    model = tiny_model(family, lora=lora, blocks=3)
    names = [name for name, _ in model.named_modules()]
    shallow = first_blocks(model, 1)
    own = {id(param) for param in model.parameters()}
    assert all(id(param) in own for param in shallow.parameters())
    assert len(Decoder.of(shallow).blocks) == 1 == shallow.config.num_hidden_layers
    assert shallow.base_model.config.num_hidden_layers == 1
    assert len(Decoder.of(model).blocks) == 3 == causal_model(model).config.num_hidden_layers
    assert [name for name, _ in model.named_modules()] == names


def test_hooks_of_the_whole_model_do_not_run_for_its_first_blocks_nor_the_other_way_round():
    model = tiny_model("llama")
    calls = []
    model.register_forward_hook(lambda *args: calls.append("whole"))
    shallow = first_blocks(model, 1)
    shallow.register_forward_hook(lambda *args: calls.append("first"))
    batch = random_batch([3])
    last_hidden_states(shallow, batch)
    assert calls == ["first"]
    last_hidden_states(model, batch)
    assert calls == ["first", "whole"]


def test_layers_of_the_first_blocks_are_those_of_the_model():
    model = tiny_model("qwen2", blocks=3)
    layers = gradient_layers(model)
    assert gradient_layers(first_blocks(model, 2)) == layers[: 2 * len(layers) // 3]


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_layers_of_the_last_blocks_are_the_last_layers(family, lora):
    model = tiny_model(family, lora=lora, blocks=12)  # block 1 is no part of blocks 10 and 11
    layers = gradient_layers(model)
    assert last_block_layers(model, layers, 2) == layers[-len(layers) // 6 :]
    assert last_block_layers(model, layers, 12) == layers


@pytest.mark.parametrize("count", [-1, 3])
def test_more_blocks_than_there_are_is_refused(count):
    with pytest.raises(InvalidSettings, match=f"{count} blocks were asked for; expected 0 to 2"):
        first_blocks(tiny_model("llama"), count)
    with pytest.raises(InvalidSettings, match="expected 1 to 2"):
        last_block_layers(tiny_model("llama"), (), count)


def test_no_layer_in_the_last_blocks_is_refused():
    model = tiny_model("llama")
    first = [layer for layer in gradient_layers(model) if ".0." in layer.name]
    with pytest.raises(Unsupported, match="none of the 7 layers that carry gradients lies in the last 1 blocks"):
        last_block_layers(model, first, 1)


def test_wrapped_forward_is_refused_because_it_would_run_the_whole_model():
    model = tiny_model("llama")
    model.forward = model.forward  # what spreading a model over devices does: an attribute of the object
    with pytest.raises(Unsupported, match="the forward of LlamaForCausalLM is wrapped"):
        first_blocks(model, 1)


def test_model_without_a_list_of_blocks_is_refused():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleDict({str(i): block for i, block in enumerate(model.model.layers)})
    with pytest.raises(Unsupported, match="keeps its 2 blocks in no list beside the token embedding"):
        Decoder.of(model)


def test_no_graph_before_the_last_blocks_and_everything_restored_after_an_error():
    model = tiny_model("llama", blocks=3)
    model.gradient_checkpointing_enable()
    model.train()
    before = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    assert True in before
    tracked = []
    for block in Decoder.of(model).blocks:
        block.register_forward_hook(lambda module, args, output: tracked.append(output.requires_grad))

    def fail(module, args):
        raise ZeroDivisionError

    batch = random_batch([4])
    with graph_of_last_blocks(model, 1):
        model(input_ids=batch.input_ids, use_cache=False)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert tracked == [False, False, True]
    handle = Decoder.of(model).blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), graph_of_last_blocks(model, 1):
        model(input_ids=batch.input_ids, use_cache=False)
    handle.remove()
    assert torch.is_grad_enabled()
    assert [getattr(module, "gradient_checkpointing", None) for module in model.modules()] == before
    tracked.clear()
    with graph_of_last_blocks(model, 3):
        model(input_ids=batch.input_ids, use_cache=False)
    assert tracked == [True, True, True]
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 0
