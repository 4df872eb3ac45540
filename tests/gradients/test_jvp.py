"""Forward mode against torch.func.jvp of full logits, finite differences, and its own linearity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, jvp

from oracles import relative_error
from tamis.errors import InvalidInput, Unsupported
from tamis.gradients.jvp import gaussian_direction, hidden_tangents, loss_tangents, mean_direction
from tamis.model.blocks import causal_model, first_blocks
from tamis.model.head import head_of, read_out
from tamis.model.states import last_hidden_states
from tamis.model.targets import gradient_layers
from tiny_models import DECODERS, one_row, padded_by, permuted, random_batch, tiny_model

# RMSNorm, rotary tables and softmax of these models compute in float32 whatever the dtype.
TOLERANCE = 1e-6
POSITIONS = ("last", "mean")


def shallow_model(family, *, depth=2, attention="sdpa", **kwargs):
    model = tiny_model(family, blocks=3, **kwargs)
    causal_model(model).set_attn_implementation(attention)
    return first_blocks(model, depth)


def by_parameter(model, layers, direction):
    """A direction as tangents of the parameters, in the form in which the modules store them."""
    tangents = {}
    for layer in layers:
        matrix = direction[layer.name]
        weight = matrix[:, : layer.in_features]
        tangents[f"{layer.name}.weight"] = weight.T if layer.kind == "conv1d" else weight
        if layer.has_bias:
            tangents[f"{layer.name}.bias"] = matrix[:, -1]
    return tangents


def logit_tangents(model, batch, layers, direction, positions):
    """One row alone, without padding, all logits, ``torch.func.jvp``: shares no line with the fast path."""
    tangents = by_parameter(model, layers, direction)
    primals = {name: model.get_parameter(name).detach() for name in tangents}
    rows = []
    for row in range(len(batch.rows)):
        alone = one_row(batch, row)

        def logits(params, alone=alone):
            return functional_call(model, params, (), {"input_ids": alone.input_ids, "use_cache": False}).logits[0]

        _, tangent = jvp(logits, (primals,), (tangents,))
        if positions == "last":
            rows.append(tangent[-1])
        else:
            rows.append(tangent[:-1][alone.supervised[0, 1:]].mean(dim=0))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    ("family", "lora"), [*((family, False) for family in DECODERS), ("llama", True), ("gpt2", True)]
)
def test_inner_products_equal_those_of_logit_tangents(family, lora, positions):
    model = shallow_model(family, lora=lora)
    slow = shallow_model(family, lora=lora, attention="eager")  # torch.func.jvp needs a rule for every kernel, too
    slow.config.final_logit_softcapping = None  # the change of the head's own output, before a cap
    batch, layers = random_batch([6, 9, 3]), gradient_layers(model)
    direction = gaussian_direction(layers, seed=1, dtype=torch.float64)
    expected = logit_tangents(slow, batch, layers, direction, positions)
    tangents = hidden_tangents(model, batch, layers, direction, positions=positions)
    assert relative_error(tangents @ head_of(model).weight.T, expected) < TOLERANCE
    short = tangents @ read_out(head_of(model))
    assert short.shape == (3, 16)
    assert relative_error(short @ short.T, expected @ expected.T) < 2 * TOLERANCE


@pytest.mark.parametrize("positions", POSITIONS)
def test_tangent_is_the_limit_of_finite_differences(positions):
    model = shallow_model("llama")
    batch, layers = random_batch([5, 8]), gradient_layers(model)
    direction = gaussian_direction(layers, seed=2, dtype=torch.float64)
    tangents = by_parameter(model, layers, direction)

    def states(step):
        moved = shallow_model("llama")
        with torch.no_grad():
            for name, tangent in tangents.items():
                moved.get_parameter(name).add_(step * tangent)
        hidden = last_hidden_states(moved, batch)
        if positions == "last":
            return torch.stack([hidden[0, 4], hidden[1, 7]])
        return torch.stack([hidden[row, :-1][batch.supervised[row, 1:]].mean(dim=0) for row in range(2)])

    step = 0.02  # float32 parts leave 1e-7 / step, the third derivative step^2: both near 1e-4 of the tangent
    central = (states(step) - states(-step)) / (2 * step)
    assert relative_error(hidden_tangents(model, batch, layers, direction, positions=positions), central) < 1e-3


@settings(max_examples=15)
@given(st.integers(2, 4), st.sampled_from(POSITIONS), st.integers(0, 1000))
def test_mean_of_tangents_is_the_tangent_of_the_mean(count, positions, seed):
    model = shallow_model("qwen2")
    batch, layers = random_batch([4, 7], seed=seed), gradient_layers(model)
    directions = [gaussian_direction(layers, seed=seed, index=i, dtype=torch.float64) for i in range(count)]
    single = [hidden_tangents(model, batch, layers, each, positions=positions) for each in directions]
    joint = hidden_tangents(model, batch, layers, mean_direction(directions), positions=positions)
    assert relative_error(joint, torch.stack(single).mean(dim=0)) < TOLERANCE


@pytest.mark.parametrize("family", DECODERS)
def test_attention_that_has_no_forward_mode_rule_gives_the_same_tangents(family):
    fused, eager = shallow_model(family), shallow_model(family, attention="eager")
    batch, layers = random_batch([6, 6]), gradient_layers(eager)
    direction = gaussian_direction(layers, seed=3, dtype=torch.float64)
    tangents = by_parameter(fused, layers, direction)
    primals = {name: fused.get_parameter(name).detach() for name in tangents}
    with pytest.raises(NotImplementedError, match="forward AD"), torch.no_grad():
        jvp(lambda p: functional_call(fused, p, (), {"input_ids": batch.input_ids}).logits, (primals,), (tangents,))
    expected = hidden_tangents(eager, batch, layers, direction, positions="mean")
    assert relative_error(hidden_tangents(fused, batch, layers, direction, positions="mean"), expected) < TOLERANCE


@settings(max_examples=15)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(0, 4), st.randoms(), st.sampled_from(POSITIONS))
def test_padding_batch_mates_and_order_have_no_effect(lengths, extra, random, positions):
    model = shallow_model("gpt2")
    batch, layers = random_batch(lengths), gradient_layers(model)
    direction = gaussian_direction(layers, seed=4, dtype=torch.float64)
    order = random.sample(range(len(lengths)), len(lengths))
    whole = hidden_tangents(model, batch, layers, direction, positions=positions)
    other = hidden_tangents(model, padded_by(permuted(batch, order), extra), layers, direction, positions=positions)
    assert relative_error(other, whole[order]) < TOLERANCE
    alone = hidden_tangents(model, one_row(batch, 0), layers, direction, positions=positions)
    assert relative_error(alone, whole[:1]) < TOLERANCE


def test_no_dropout_and_nothing_left_behind():
    model = shallow_model("llama", dropout=0.5)
    model.train()
    batch, layers = random_batch([5]), gradient_layers(model)
    direction = gaussian_direction(layers, seed=5)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    once, again = (hidden_tangents(model, batch, layers, direction, positions="mean") for _ in range(2))
    assert torch.equal(once, again) and model.training
    assert all(torch.equal(param, before[name]) and param.requires_grad for name, param in model.named_parameters())


def test_direction_without_any_part_changes_nothing():
    model = shallow_model("llama")
    tangents = hidden_tangents(model, random_batch([5, 3]), (), {}, positions="last")
    assert torch.equal(tangents, torch.zeros(2, 16, dtype=torch.float64))


def test_directions_are_gaussian_of_unit_length_and_belong_to_seed_and_layer():
    layers = gradient_layers(tiny_model("gpt2", blocks=8))
    direction = gaussian_direction(layers, seed=0, dtype=torch.float64)
    entries = torch.cat([direction[layer.name].flatten() for layer in layers])
    size = len(entries)
    assert all(direction[layer.name].shape == layer.shape for layer in layers)
    assert abs(float(entries.square().sum()) - 1) < 4 * (2 / size) ** 0.5  # four standard errors of a chi-square / P
    scaled = entries * size**0.5
    assert abs(float(scaled.mean())) < 4 * size**-0.5
    assert abs(float(scaled.pow(4).mean()) - 3) < 4 * (96 / size) ** 0.5  # a fourth moment of 3: not signs, not uniform
    again = gaussian_direction(layers, seed=0, dtype=torch.float64)
    for other in (gaussian_direction(layers, seed=1), gaussian_direction(layers, seed=0, index=1)):
        assert not torch.equal(other[layers[0].name], again[layers[0].name].float())
    assert torch.equal(again[layers[3].name], direction[layers[3].name])
    fewer = gaussian_direction(layers[:4], seed=0, dtype=torch.float64)  # the same draw, but for the common factor
    ratio = fewer[layers[2].name] / direction[layers[2].name]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))


def test_row_without_a_label_has_no_mean_but_a_last_position():
    model = shallow_model("llama")
    batch, layers = random_batch([5, 3]), gradient_layers(model)
    batch.supervised[1] = False
    direction = gaussian_direction(layers, seed=6)
    with pytest.raises(InvalidInput, match="rows 1 have no supervised token"):
        hidden_tangents(model, batch, layers, direction, positions="mean")
    assert hidden_tangents(model, batch, layers, direction, positions="last").shape == (2, 16)


def test_operation_without_a_forward_mode_rule_is_named():
    model = shallow_model("llama")
    batch, layers = random_batch([5]), gradient_layers(model)

    class NoRule(torch.nn.Module):
        def forward(self, hidden):
            raise NotImplementedError("Trying to use forward AD with _some_kernel that does not support it")

    model.base_model.norm = NoRule()
    with pytest.raises(Unsupported, match=r"cannot be run in forward mode \(.*_some_kernel.*'sdpa' or 'eager'"):
        hidden_tangents(model, batch, layers, gaussian_direction(layers, seed=7), positions="mean")


def test_attention_that_may_drop_tangents_without_an_error_is_refused():
    model = shallow_model("llama")
    batch, layers = random_batch([5]), gradient_layers(model)
    direction = gaussian_direction(layers, seed=7)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(Unsupported, match=r"forward mode \(attention 'flash_attention_2'\).*'sdpa' or 'eager'"):
        hidden_tangents(model, batch, layers, direction, positions="mean")
    moved = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    with pytest.raises(Unsupported, match="attention 'flash_attention_2'"):
        loss_tangents(model, batch, moved)
