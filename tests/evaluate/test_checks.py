"""The numeric checks pass on a sound model, and each fails on the fault it is there for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from oracles import reference_gradients
from tamis.data.batches import collate
from tamis.evaluate.checks import check_batch_composition, check_distortion, check_sign
from tamis.model.targets import gradient_layers
from tamis.projection import make_projector, project_gradients
from tamis.types import TokenizedExample
from tiny_models import FAMILIES, VOCAB, tiny_model


def rows(count: int, *, seed: int = 0) -> list[TokenizedExample]:
    draw = np.random.default_rng(seed)
    found = []
    for length in draw.integers(5, 20, count):
        ids = draw.integers(3, VOCAB, length).astype(np.int32)
        supervised = np.arange(length) >= length // 2
        found.append(TokenizedExample(input_ids=ids, supervised=supervised, truncated=0))
    return found


def cosines_of_pairs(x: torch.Tensor) -> torch.Tensor:
    pairs = itertools.combinations(range(len(x)), 2)
    return torch.stack([x[i] @ x[j] / (x[i].norm() * x[j].norm()) for i, j in pairs])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_passes_both_checks_and_is_left_as_it_was(family: str, lora: bool) -> None:
    model = tiny_model(family, dtype=torch.float32, lora=lora)
    before = {name: param.clone() for name, param in model.named_parameters()}
    layers = gradient_layers(model)
    batch = check_batch_composition(model, layers, rows(4), dtype="float32")
    assert batch.passed, batch
    sign = check_sign(model, layers, dict(enumerate(rows(4))), rows(3, seed=1), dtype="float32")
    assert sign is not None and sign.passed, sign
    # A change of a thousandth of the loss: a central difference errs in the third order of the step.
    assert sign.measured_change == pytest.approx(sign.predicted_change, rel=0.1)
    assert np.sign(sign.predicted_change) == -np.sign(sign.score) == -np.sign(sign.cosine)
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_step_is_the_step_that_weights_would_take() -> None:
    # The oracle: add -step * G to the weights themselves, and compare the change of the target loss.
    model = tiny_model("qwen2", dtype=torch.float64)
    layers = gradient_layers(model)
    pool, target = rows(1), rows(3, seed=1)
    found = check_sign(model, layers, {0: pool[0]}, target, dtype="float64")
    assert found is not None

    def loss_of(examples: list[TokenizedExample]) -> torch.Tensor:
        losses = []
        for row in examples:
            ids = torch.tensor(row.input_ids.astype(np.int64))[None]
            logits = model(input_ids=ids).logits[0, :-1]
            each = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            losses.append(each[torch.tensor(row.supervised[1:])].mean())
        return torch.stack(losses).mean()

    params = [p for layer in layers for p in model.get_submodule(layer.name).parameters()]
    row_grads = torch.autograd.grad(loss_of(pool), params)
    target_grads = torch.autograd.grad(loss_of(target), params)
    score = sum(float((a * b).sum()) for a, b in zip(row_grads, target_grads, strict=True))
    assert found.score == pytest.approx(score, rel=1e-6)
    step = -found.predicted_change / score
    changes = []
    for sign in (1, -1):
        with torch.no_grad():
            for param, grad in zip(params, row_grads, strict=True):
                param -= sign * step * grad
            changes.append(float(loss_of(target)))
            for param, grad in zip(params, row_grads, strict=True):
                param += sign * step * grad
    # Transformers' norms compute in float32: 1e-7 of the loss, in a change of a thousandth of it.
    assert found.measured_change == pytest.approx((changes[0] - changes[1]) / 2, rel=1e-3)


def test_a_model_whose_rows_see_each_other_fails_the_batch_check() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    norm = model.get_submodule("model.layers.0.input_layernorm")
    handle = norm.register_forward_hook(lambda module, args, out: out + 0.1 * out.mean(dim=0, keepdim=True))
    try:
        assert not check_batch_composition(model, gradient_layers(model), rows(4), dtype="float32").passed
    finally:
        handle.remove()


def test_a_model_with_a_wrong_backward_fails_the_sign_check() -> None:
    model = tiny_model("llama", dtype=torch.float32)

    class Flipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * torch.linspace(-2, 1, grad.shape[-1])

    norm = model.get_submodule("model.norm")
    handle = norm.register_forward_hook(lambda module, args, out: Flipped.apply(out))
    try:
        found = check_sign(model, gradient_layers(model), dict(enumerate(rows(4))), rows(3, seed=1), dtype="float32")
    finally:
        handle.remove()
    assert found is not None and not found.passed


def test_a_step_that_disagrees_is_followed_by_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    args = (model, gradient_layers(model), dict(enumerate(rows(4))), rows(3, seed=1))
    short = check_sign(*args, dtype="float32")
    assert short is not None and short.passed and short.steps == 1
    # A step that should move the loss by thirty times itself leaves where the loss is straight.
    monkeypatch.setattr("tamis.evaluate.checks._STEPS", {False: (30.0, 1e-3)})
    found = check_sign(*args, dtype="float32")
    assert found == replace(short, steps=2)
    monkeypatch.setattr("tamis.evaluate.checks._STEPS", {False: (30.0,)})
    once = check_sign(*args, dtype="float32")
    assert once is not None and not once.passed


def test_a_model_of_experts_is_known_as_one() -> None:
    dense = tiny_model("llama", dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCAB, num_key_value_heads=1, num_local_experts=4, **sizes)
    ).eval()
    for model, is_routed in ((dense, False), (experts, True)):
        layers = gradient_layers(model)
        found = check_sign(model, layers, dict(enumerate(rows(4))), rows(3, seed=1), dtype="float32")
        assert found is not None and found.passed and found.is_routed is is_routed


def test_rows_without_any_gradient_leave_nothing_to_check() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    layers = gradient_layers(model)
    assert check_sign(model, layers, dict(enumerate(rows(2))), rows(2), dtype="float32") is None
    assert check_distortion(model, layers, [rows(3)], make_projector("factorized", dim=2)) == []


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("name", "dim"), [("factorized", 2), ("hadamard", 64), ("mask", 64), ("none", None)])
def test_distortion_is_that_of_gradients_taken_one_row_at_a_time(name: str, dim: int | None, lora: bool) -> None:
    model = tiny_model("qwen2", dtype=torch.float64, lora=lora)
    layers = gradient_layers(model)
    groups = [rows(3, seed=1), rows(4, seed=2)]
    projector = make_projector(name, dim=dim, seed=0)
    found = check_distortion(model, layers, groups, projector)
    for at, group in zip(found, groups, strict=True):
        _, grads = reference_gradients(model, collate(np.arange(len(group)), group, 0), layers)
        whole = torch.stack([torch.cat([grad[layer.name].flatten() for layer in layers]) for grad in grads])
        exact, projected = (cosines_of_pairs(x) for x in (whole, project_gradients(projector, whole, layers)))
        assert at.pairs == len(exact) == len(group) * (len(group) - 1) // 2
        lengths = [len(row.input_ids) for row in group]
        assert (at.shortest, at.longest) == (min(lengths), max(lengths))
        # Transformers' norms compute in float32: 1e-7 of a gradient.
        assert at.mean_cosine == pytest.approx(float(exact.mean()), abs=1e-6)
        assert at.spread == pytest.approx(float(exact.std(unbiased=False)), abs=1e-6)
        assert at.rms_error == pytest.approx(float((projected - exact).square().mean().sqrt()), abs=1e-6)
        assert (at.rms_error < 1e-6) == (name == "none")
