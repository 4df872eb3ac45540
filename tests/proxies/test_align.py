"""Alignment: its objectives against slow versions, what it trains, and the same bytes after a kill."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import proxy_case
from oracles import reference_gradients
from tamis.errors import NonFinite
from tamis.model.loss import supervised_logits, supervised_positions
from tamis.model.low_rank_linear import low_rank_layers
from tamis.model.targets import gradient_layers
from tamis.proxies import align as align_module
from tamis.proxies.align import Aligned, AlignSettings, align, learning_rate_at
from tamis.proxies.assemble import proxy_of
from tamis.proxies.objectives import factor_params, gradient_distance, mean_loss, output_divergence, target_gradients
from tamis.proxies.rows import Row, batches_of
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
        "objective": "kl", "steps": 6, "update_rows": 4, "learning_rate": 3e-3, "kl_weight": 0.1, "temperature": 1.0,
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


def one_by_one(model: nn.Module, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a row's supervised tokens, from the row alone."""
    ids = torch.from_numpy(row.tokens.input_ids.astype("int64"))[None]
    predicting = torch.from_numpy(row.tokens.supervised[1:])
    return model(input_ids=ids).logits[0, :-1][predicting], ids[0, 1:][predicting]


def slow_divergence(model: nn.Module, proxy: nn.Module, rows: Sequence[Row], temperature: float) -> torch.Tensor:
    """Equation 7, row by row."""
    each = []
    for row in rows:
        with torch.no_grad():
            theirs, _ = one_by_one(model, row)
        ours, _ = one_by_one(proxy, row)
        p, q = (torch.softmax(logits / temperature, dim=1) for logits in (theirs, ours))
        each.append(temperature**2 * (p * (p / q).log()).sum(dim=1).mean())
    return torch.stack(each).mean()


def slow_distance(model: nn.Module, proxy: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Equation 6 of the whole batch, whose loss is summed up row by row."""
    losses = [
        torch.stack([nn.functional.cross_entropy(*one_by_one(each, row)) for row in rows]).mean()
        for each in (model, proxy)
    ]
    names = list(low_rank_layers(proxy))
    found = torch.autograd.grad(losses[0], [model.get_parameter(f"{name}.weight") for name in names])
    return gradient_distance(proxy, losses[1], dict(zip(names, found, strict=True)))


@pytest.mark.parametrize(
    ("objective", "kl_weight", "temperature"),
    [("kl", 0.3, 1.0), ("kl", 0.3, 2.0), ("align", 0.3, 2.0), ("align+kl", 0.3, 1.0), ("align+kl", 5.0, 2.0)],
)
@pytest.mark.parametrize("batch_tokens", [40, 10**6])
def test_a_step_has_the_gradient_of_its_weighted_objective_whatever_the_batches(
    objective: str, kl_weight: float, temperature: float, batch_tokens: int
) -> None:
    model, proxy = pair()
    rows = proxy_case.rows(10, seed=4)
    sizes = [len(batch.rows) for batch in batches_of(rows, batch_tokens=batch_tokens, pad_id=0)]
    assert sizes == [10] or len(set(sizes)) > 1  # one batch, or uneven ones
    options = settings(objective=objective, kl_weight=kl_weight, temperature=temperature)
    found = align_module._step(proxy, model, rows, options, batch_tokens, 0)
    params = list(factor_params(proxy).values())
    grads = [param.grad for param in params]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        divergence = slow_divergence(model, proxy, rows, temperature) if objective != "align" else None
        distance = slow_distance(model, proxy, rows) if objective != "kl" else None
        parts, weights = (divergence, distance), (1.0 if objective == "kl" else kl_weight, 1.0)
        weighted = [weight * part for weight, part in zip(weights, parts, strict=True) if part is not None]
        expected = torch.autograd.grad(torch.stack(weighted).sum(), params)
    for value, part in zip(found, parts, strict=True):
        assert value == (None if part is None else pytest.approx(float(part.detach()), rel=1e-8))
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)  # norms are in float32


def test_the_updates_are_those_of_adamw_written_out(tmp_path: Path) -> None:
    """Weight decay .01, gradients of all factors together clipped to length 1, and a rate that rises and falls."""
    model, proxy = pair()
    head = model.get_parameter("lm_head.weight")
    head.data.mul_(10)  # both models' head: surer answers, and gradients that are long at first
    rows, peak, steps = proxy_case.rows(10, seed=4), 0.03, 12
    params = list(factor_params(proxy).values())
    start = [param.detach().clone() for param in params]
    values = iter([0.0, 1.0])  # what is left at the end is the last state
    run(model, proxy, tmp_path, lambda proxy: next(values), steps=steps, measure_steps=steps, update_rows=len(rows),
        learning_rate=peak)  # fmt: skip
    found = [param.detach().clone() for param in params]
    for param, first in zip(params, start, strict=True):
        param.data = first
    means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
    lengths = []
    for step in range(steps):
        rate = peak * ((step + 1) / 10 if step < 10 else (steps - step) / 2)
        grads = torch.autograd.grad(slow_divergence(model, proxy, rows, 1.0), params)
        lengths.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        with torch.no_grad():
            for param, grad, mean, square in zip(params, grads, means, squares, strict=True):
                grad = grad / max(1.0, lengths[-1])
                mean.mul_(0.9).add_(0.1 * grad)
                square.mul_(0.999).add_(0.001 * grad**2)
                param.mul_(1 - rate * 0.01)
                average = mean / (1 - 0.9 ** (step + 1))
                param.sub_(rate * average / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    assert max(lengths) > 2 and min(lengths) < 1
    for param, trained in zip(params, found, strict=True):
        torch.testing.assert_close(trained, param.detach(), rtol=1e-5, atol=1e-6)


def test_rows_are_drawn_without_replacement_epoch_after_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []

    def step(proxy: nn.Module, model: nn.Module, chosen: Sequence[Row], *others: Any) -> tuple[float, None]:
        assert len(chosen) == 4
        drawn.extend(row.tokens.input_ids.tobytes() for row in chosen)
        return 0.0, None

    monkeypatch.setattr(align_module, "_step", step)
    run(*pair(), tmp_path, steps=5, measure_steps=5)  # twice the ten rows, four a step
    every = sorted(row.tokens.input_ids.tobytes() for row in proxy_case.rows(10, seed=4))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == every and drawn[:10] != drawn[10:]


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


def test_an_alignment_whose_state_is_damaged_begins_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, proxy = pair(dtype=torch.float32)
    run(model, proxy, tmp_path, steps=2)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    _, other = pair(dtype=torch.float32)
    assert run(model, other, tmp_path, steps=2).steps == 2 and f"{state} is damaged" in caplog.text
    for name, param in factor_params(proxy).items():
        assert torch.equal(factor_params(other)[name], param), name


def test_a_rate_that_blows_up_is_an_error_that_says_so(tmp_path: Path) -> None:
    model, proxy = pair(dtype=torch.float32)
    with pytest.raises(NonFinite, match=r"diverged at step .*lower --learning-rate"):
        run(model, proxy, tmp_path, learning_rate=1e30, steps=8)


def test_an_update_that_only_the_measurement_sees_blow_up_is_the_same_error(tmp_path: Path) -> None:
    """The objective of an update is of the weights before it, so the last one shows in the losses that are measured."""
    model, proxy = pair(dtype=torch.float32)
    measured = []

    def losses(_: nn.Module) -> float:
        measured.append(0.0)
        if len(measured) > 1:
            raise NonFinite("the loss of rows 1, 2 is NaN or infinite; check the weights")
        return 0.0

    with pytest.raises(NonFinite, match=r"diverged at step 2: .*lower --learning-rate"):
        run(model, proxy, tmp_path, losses)


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
