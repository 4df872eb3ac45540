"""What a run cost: hand-counted operations of one linear stack, and which part of a step they belong to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from online_steps import CANDIDATES, TARGET, optimizer_of, split
from tamis.gradients.parameters import param_matrices
from tamis.model.trainable import trainable_layers
from tamis.online import FilterThenWeight, Full, TracIn, Uniform
from tamis.online.cost import PARTS, Counter, as_plain, token_sums
from tamis.online.settings import StepSettings
from tamis.online.step import OnlineStep
from tiny_models import tiny_model

# The tiny Llama: 16 hidden, 24 inner, 64 tokens, 4 heads of 4 and 2 of them for keys and values, 2 blocks.
BLOCK = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24
HEAD = 16 * 64


def test_operations_are_those_counted_by_hand() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)  # 24 x 16 of it is trained
    counter = Counter(model, param_matrices(model, trainable_layers(model)))
    tokens, supervised, squared = sums = token_sums([CANDIDATES])
    assert (tokens, squared) == (39.0, float(81 + 16 + 49 + 36 + 64 + 25))
    forward = 2 * 2 * BLOCK * tokens + 4 * 2 * 16 * squared + 2 * HEAD * supervised
    double_attention = forward + 4 * 2 * 16 * squared
    trained = 2 * 24 * 16 * tokens
    assert counter.flops("gradient", sums) == forward + double_attention + trained
    assert counter.flops("jvp", sums) == forward + double_attention + trained  # a forward pass and its tangents
    assert counter.flops("assembly", sums) == trained
    assert token_sums([CANDIDATES], torch.tensor([0, 1, 0, 0, 0, 0]).bool())[0] == 4
    assert token_sums([]) == (0.0, 0.0, 0.0)


def test_alignments_with_a_narrow_direction_cost_what_is_left_of_the_products() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)  # 24 x 16
    model.model.layers[0].self_attn.k_proj.requires_grad_(True)  # 8 x 16, too small for rank 3
    model.lm_head.requires_grad_(True)
    counter = Counter(model, param_matrices(model, trainable_layers(model)), target_rank=3)
    tokens, supervised, _ = sums = token_sums([CANDIDATES])
    without = counter.flops("gradient", sums) - counter.flops("assembly", sums)
    narrow = 2 * tokens * (3 * (24 + 16) + 8 * 16) + 2 * supervised * 3 * (64 + 16)
    assert counter.flops("alignment", sums) == without + narrow
    counter.add("candidates", "alignment", [CANDIDATES])
    assert counter.total()[0, 1] == without + narrow + 8 * 3 * (24 * 16 + 64 * 16)  # cut once


@pytest.mark.parametrize(
    ("alignment", "gram", "saves"),
    [("adam", "exact", False), ("adam", "sketch", True), ("jacobian", "sketch", False)],
)
def test_a_gradient_that_something_else_is_made_of_is_counted_whole(alignment: Any, gram: Any, saves: bool) -> None:
    """Exact pairs take every row's gradient, the Jacobian the mean of all."""
    model = tiny_model("llama")
    method = FilterThenWeight(keep=2, oversample=3, alignment=alignment)
    for rank in (None, 1):
        step = OnlineStep(model, method, StepSettings(gram=gram, target_rank=rank))
        step.propose([CANDIDATES], [TARGET], optimizer_of(model))
        found = float(step.work()[PARTS.index("candidates"), 1])
        if rank is None:
            whole = found
    assert (found < whole) == saves


def spent(method: Any, settings: StepSettings, proxy: Any = None, choices: int = 1) -> dict[str, float]:
    model = tiny_model("llama", lora=True)
    optimizer = optimizer_of(model)
    step = OnlineStep(model, method, settings, proxy=proxy)
    for _ in range(choices):
        look = step.looks([CANDIDATES], cold=False)
        step.propose(split(CANDIDATES, 2), [TARGET] if look else [], optimizer, fresh_target=look)
    return {part: row["tflops"] * 1e12 for part, row in as_plain(step.work()).items()}


def test_parts_of_a_step_are_told_apart_and_cheaper_ways_cost_less_where_they_do() -> None:
    sizes = {"keep": 2, "oversample": 3}
    exact = spent(TracIn(**sizes), StepSettings())
    full, uniform = spent(Full(**sizes), StepSettings()), spent(Uniform(**sizes), StepSettings())
    assert full == {"candidates": 0.0, "target": 0.0, "update": pytest.approx(exact["candidates"])}
    assert 0 < uniform["update"] < full["update"] / 2
    assert 0 < exact["update"] < 0.1 * exact["candidates"]  # put together from what was kept
    jvp = spent(TracIn(**sizes), StepSettings(candidates="jvp"))
    assert jvp["candidates"] == pytest.approx(exact["candidates"])  # it saves memory, not operations
    assert jvp["update"] > exact["update"]
    once, thrice = (spent(TracIn(**sizes), StepSettings(candidates="reuse:3"), choices=n) for n in (1, 3))
    assert once == exact
    assert thrice["candidates"] == exact["candidates"]
    assert thrice["target"] == exact["target"]
    assert sum(thrice.values()) < 2.2 * sum(exact.values())
    proxy = tiny_model("llama", seed=1, blocks=1)
    small = spent(TracIn(**sizes), StepSettings(candidates="proxy"), proxy)
    assert small["candidates"] < exact["candidates"]
    assert small["target"] < exact["target"]
    assert exact["update"] < small["update"] < full["update"]  # the chosen run on the trained model


def test_work_goes_on_from_a_checkpoint() -> None:
    model = tiny_model("llama", lora=True)
    optimizer = optimizer_of(model)
    step, again = (OnlineStep(model, FilterThenWeight(keep=2, oversample=3)) for _ in range(2))
    step.propose([CANDIDATES], [TARGET], optimizer)
    again.load_state_dict({name: value.clone() for name, value in step.state_dict().items()})
    again.propose([CANDIDATES], [TARGET], optimizer)
    step.propose([CANDIDATES], [TARGET], optimizer)
    torch.testing.assert_close(again.work(), step.work(), rtol=0, atol=0)
    assert again.work().shape == (len(PARTS), 2)
