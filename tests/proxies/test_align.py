"""Alignment: its objectives against slow versions, what it trains, and the same bytes after a kill."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import proxy_case
from oracles import reference_gradients
from tamis.errors import NonFinite
from tamis.model.loss import supervised_logits, supervised_positions
from tamis.model.lowrank import low_rank_layers
from tamis.model.targets import gradient_layers
from tamis.proxies import align as align_module
from tamis.proxies.align import Aligned, AlignSettings, align, learning_rate_at
from tamis.proxies.assemble import proxy_of
from tamis.proxies.objectives import factor_params, gradient_distance, mean_loss, output_divergence, target_gradients
from tiny_models import random_batch

FAMILIES = ("llama", "qwen2", "gemma3", "gpt2")


def pair(family: str = "llama", *, dtype: torch.dtype = torch.float64, rank: int = 4) -> tuple[nn.Module, nn.Module]:
    """A model and its truncated, balanced copy."""
    model = proxy_case.model(family, dtype=dtype)
    factors = {}
    for layer in gradient_layers(model):
        weight = model.get_submodule(layer.name).weight.detach()
        assert isinstance(weight, torch.Tensor)
        u, s, vh = torch.linalg.svd(weight.T if layer.kind == "conv1d" else weight, full_matrices=False)
        root = s[:rank].sqrt()
        factors[layer.name] = (u[:, :rank] * root, root[:, None] * vh[:rank])
    return model, proxy_of(model, factors, space="product")


def settings(**changes: Any) -> AlignSettings:
    values: dict[str, Any] = {
        "objective": "kl", "steps": 6, "batch_rows": 4, "learning_rate": 3e-3, "kl_weight": 0.1, "temperature": 1.0,
        "measure_steps": 2, "patience": 9, "seed": 0, **changes,
    }  # fmt: skip
    return AlignSettings(**values)


def run(
    model: nn.Module, proxy: nn.Module, folder: Path, retention: Any = lambda proxy: 0.0, **changes: Any
) -> Aligned:
    return align(
        proxy, model, proxy_case.rows(10, seed=4), settings=settings(**changes), retention=retention,
        batch_tokens=40, pad_id=0, folder=folder, advance=lambda steps: None,
    )  # fmt: skip


def test_the_divergence_is_the_mean_over_rows_of_the_mean_over_tokens() -> None:
    model, proxy = pair()
    batch = random_batch([6, 9, 7])
    positions = supervised_positions(batch)
    with torch.no_grad():
        theirs, ours = (supervised_logits(m, batch, positions) for m in (model, proxy))
        found = output_divergence(theirs, ours, positions, temperature=2.0)
        p, q = (torch.softmax(logits / 2.0, dim=1) for logits in (theirs, ours))
    each = (p * (p / q).log()).sum(dim=1)
    expected = torch.stack([each[positions.row == row].mean() for row in range(3)]).mean() * 4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float(output_divergence(theirs, theirs, positions, temperature=2.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_target_gradients_are_of_the_mean_loss(family: str) -> None:
    model, proxy = pair(family)
    batch = random_batch([6, 9])
    found = target_gradients(model, batch, low_rank_layers(proxy))
    layers = gradient_layers(model)
    _, rows = reference_gradients(model, batch, layers)
    for layer in layers:
        expected = torch.stack([row[layer.name] for row in rows]).mean(dim=0)[:, : layer.in_features]
        torch.testing.assert_close(found[layer.name], expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_distance_and_its_slope_are_those_of_a_slow_version(family: str) -> None:
    """Equation 6 by plain autograd, and its derivative along a random direction by differences."""
    model, proxy = pair(family)
    batch = random_batch([6, 5])
    positions = supervised_positions(batch)
    wanted = target_gradients(model, batch, low_rank_layers(proxy))

    def slow() -> float:
        loss = mean_loss(supervised_logits(proxy, batch, positions), positions)
        total = 0.0
        for name, layer in low_rank_layers(proxy).items():
            a, b = layer.A.weight, layer.B.weight
            for mine, theirs in zip(
                torch.autograd.grad(loss, [a, b], retain_graph=True),
                (wanted[name] @ b.T, a.T @ wanted[name]),
                strict=True,
            ):
                total += 1 - float(nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0))
        return total / len(wanted)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        params = list(factor_params(proxy).values())
        distance = gradient_distance(proxy, mean_loss(supervised_logits(proxy, batch, positions), positions), wanted)
        assert float(distance.detach()) == pytest.approx(slow(), rel=1e-6)
        slopes = torch.autograd.grad(distance, params)
        if family != "gpt2":
            return  # norms in float32 are too coarse for differences
        generator = torch.Generator().manual_seed(0)
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for param, direction in zip(params, directions, strict=True):
                    param.add_(direction, alpha=sign * 1e-6)
            values.append(slow())
            with torch.no_grad():
                for param, direction in zip(params, directions, strict=True):
                    param.add_(direction, alpha=-sign * 1e-6)
    expected = (values[0] - values[1]) / 2e-6
    found = sum(float((s * d).sum()) for s, d in zip(slopes, directions, strict=True))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_layer_without_target_gradient_is_left_out_of_the_mean() -> None:
    model, proxy = pair()
    batch = random_batch([6, 5])
    positions = supervised_positions(batch)
    wanted = target_gradients(model, batch, low_rank_layers(proxy))

    def distance() -> float:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = mean_loss(supervised_logits(proxy, batch, positions), positions)
            return float(gradient_distance(proxy, loss, wanted))

    everything = distance()
    first = next(iter(wanted))
    wanted[first] = torch.zeros_like(wanted[first])
    assert 0 < distance() != everything
    for name in wanted:
        wanted[name] = torch.zeros_like(wanted[name])
    assert distance() == 0


@pytest.mark.parametrize("objective", ["kl", "align", "align+kl"])
def test_alignment_lowers_its_objective_and_touches_nothing_but_factors(objective: str, tmp_path: Path) -> None:
    model, proxy = pair("qwen2", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    start = {name: param.detach().clone() for name, param in factor_params(proxy).items()}
    scores = iter(range(99))
    done = run(model, proxy, tmp_path, lambda proxy: next(scores), objective=objective, steps=20, measure_steps=10)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(not torch.equal(param, start[name]) for name, param in factor_params(proxy).items())
    points = done.curve[1:]
    lowered = [p.distance if objective == "align" else p.divergence for p in points]
    assert lowered[0] is not None and lowered[-1] is not None and lowered[-1] < lowered[0]
    assert all((p.distance is None) == (objective == "kl") for p in points)
    assert all((p.divergence is None) == (objective == "align") for p in points)
    assert done.steps == 20 and all(param.requires_grad for param in model.parameters())


def test_the_best_measurement_stays_and_patience_ends_the_rest(tmp_path: Path) -> None:
    model, proxy = pair(dtype=torch.float32)
    seen: list[torch.Tensor] = []
    values = iter([0.1, 0.5, 0.2, 0.3, 0.9])

    def retention(proxy: nn.Module) -> float:
        seen.append(next(iter(factor_params(proxy).values())).detach().clone())
        return next(values)

    done = run(model, proxy, tmp_path, retention, steps=40, patience=2)
    assert (done.steps, done.best_step) == (6, 2) and [p.retention for p in done.curve] == [0.1, 0.5, 0.2, 0.3]
    assert torch.equal(next(iter(factor_params(proxy).values())), seen[1])


@pytest.mark.parametrize("objective", ["kl", "align+kl"])
def test_a_killed_alignment_ends_in_the_same_numbers(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, proxy = pair(dtype=torch.float32)
    _, other = pair(dtype=torch.float32)
    scores = {0: 0.1, 2: 0.4, 4: 0.3, 6: 0.2}
    run(model, proxy, tmp_path / "whole", lambda p: 0.0, objective=objective)
    step, calls = align_module._step, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # in the second of three rounds
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(align_module, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, other, tmp_path / "killed", lambda p: 0.0, objective=objective)
    monkeypatch.setattr(align_module, "_step", step)
    _, resumed = pair(dtype=torch.float32)
    done = run(model, resumed, tmp_path / "killed", lambda p: 0.0, objective=objective)
    assert [point.step for point in done.curve] == list(scores)
    for name, param in factor_params(proxy).items():
        assert torch.equal(factor_params(resumed)[name], param), name


def test_a_rate_that_blows_up_is_an_error_that_says_so(tmp_path: Path) -> None:
    model, proxy = pair(dtype=torch.float32)
    with pytest.raises(NonFinite, match=r"diverged at step .*lower --learning-rate"):
        run(model, proxy, tmp_path, learning_rate=1e30, steps=8)


def test_the_rate_rises_over_ten_steps_and_falls_to_zero() -> None:
    chosen = settings(steps=30, learning_rate=1.0)
    rates = [learning_rate_at(step, chosen) for step in range(31)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == 1.0 and rates[20] == 0.5 and rates[30] == 0


def test_factors_are_trained_in_float32_in_a_half_precision_model(tmp_path: Path) -> None:
    model, proxy = pair(dtype=torch.float32)
    half = model.to(torch.bfloat16)
    _, proxy = (
        half,
        proxy_of(
            half,
            {n: (m.A.weight.detach(), m.B.weight.detach()) for n, m in low_rank_layers(proxy).items()},
            space="product",
        ),
    )
    run(half, proxy, tmp_path, steps=2)
    assert {param.dtype for param in factor_params(proxy).values()} == {torch.float32}
