"""Look-ahead scores are what differences of real training say; a trainer that chooses by them can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tamis
from classifier import Classifier, LabelledRows
from online_runs import arguments, collate, rows_of
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.model.loss import per_sample_losses
from tamis.online import Lookahead, rehearsal
from tamis.online.ahead import EarlyBatches
from tamis.online.fate import read_candidates
from tamis.online.rehearsal import coming_rates, look_ahead, rehearse
from tamis.online.target_turns import target_positions
from tamis.online.trainer import OnlineTrainer
from tamis.trajectory.adjoint import start_channel, sweep_step
from tamis.trajectory.optimizer_state import live_optimizer
from tamis.trajectory.replay import mean_gradient, play, train
from tamis.trajectory.run import Group, HeldTrajectory, Rule, Step
from tamis.trajectory.sweep import SweepSettings, run_sweep
from tamis.types import Batch
from tiny_models import random_batch, tiny_model

CLIP, RATES = 0.8, (0.01, 0.008, 0.006)


def warmed() -> tuple[nn.Module, torch.optim.AdamW]:
    """A float64 adapter and its optimizer after two updates. GPT-2: Llama's norms compute in float32 whatever comes."""
    model = tiny_model("gpt2", lora=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATES[0], weight_decay=0.1, betas=(0.9, 0.99))
    for seed in (7, 8):
        update(model, optimizer, random_batch([5, 6, 7], seed=seed), torch.full((3,), 1 / 3, dtype=torch.float64))
    return model, optimizer


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, weights: Tensor) -> None:
    optimizer.zero_grad()
    (per_sample_losses(model, batch) @ weights).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
    optimizer.step()


BLOCK = [random_batch([6, 5, 8, 7], seed=seed) for seed in (1, 2, 3)]
TARGET = random_batch([6, 9], seed=4)


def row_weights(batch: Batch, reduction: str) -> Tensor:
    """What each of its rows is of an update: all the same, or by its supervised tokens, of which the first has none."""
    tokens = [sum(1 for label in row[1:].tolist() if label) for row in batch.supervised]
    counts = torch.tensor(tokens if reduction == "tokens" else [1] * len(tokens), dtype=torch.float64)
    return counts / counts.sum()


def after(slot: int, place: int, eps: float, slots: int, reduction: str = "rows") -> float:
    """The target loss after ``slots`` real updates with one weight of one of them turned down by ``eps``."""
    model, optimizer = warmed()
    for number in range(slots):
        optimizer.param_groups[0]["lr"] = RATES[number]
        weights = row_weights(BLOCK[number], reduction)
        if number == slot:
            weights[place] *= 1 - eps
        update(model, optimizer, BLOCK[number], weights)
    with torch.no_grad():
        return float(per_sample_losses(model, TARGET).mean())


def scores(method: Lookahead, slots: int, reduction: str = "rows") -> list[Tensor]:
    model, optimizer = warmed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rates = [(rate,) for rate in RATES[: method.horizon]]
    block = [[batch] for batch in BLOCK[:slots]]
    found = rehearse(method, model, optimizer, block, [TARGET], rates=rates, clip=CLIP, reduction=reduction)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert grads  # of the last update: a rehearsal neither adds to them nor clears them
    assert all((p.grad is not None) == (name in grads) for name, p in model.named_parameters())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
    return found


@pytest.mark.parametrize(("slot", "place"), [(0, 1), (1, 3)])
def test_rehearsed_scores_are_differences_of_real_training(slot: int, place: int) -> None:
    found = scores(Lookahead(horizon=3, curvature="exact"), 3)
    eps = 1e-5
    difference = (after(slot, place, eps, 3) - after(slot, place, -eps, 3)) / (2 * eps)
    assert float(found[slot][place]) == pytest.approx(difference, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("secant", [False, True])
def test_a_broken_candidate_has_no_score_and_no_part_in_the_others(secant: bool) -> None:
    method = Lookahead(horizon=2, curvature="exact", secant=secant)

    def clean(batch: Batch) -> Batch:
        return replace(batch, input_ids=torch.where(batch.input_ids == 3, 4, batch.input_ids))

    def found(second: Batch) -> list[Tensor]:
        model, optimizer = warmed()
        with torch.no_grad():
            model.get_input_embeddings().weight[3] = torch.inf
        block, rates = [[clean(BLOCK[0])], [second]], [(rate,) for rate in RATES[:2]]
        return rehearse(method, model, optimizer, block, [clean(TARGET)], rates=rates, clip=CLIP)

    second = clean(BLOCK[1])
    broken = replace(second, input_ids=second.input_ids.clone())
    broken.input_ids[2, 0] = 3
    others = [0, 1, 3]
    without = found(Batch(**{name: tensor[others] for name, tensor in vars(second).items()}))
    first, last = found(broken)
    torch.testing.assert_close(first, without[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(last[others], without[1], rtol=1e-12, atol=0)
    assert torch.isnan(last[2])
    broken.input_ids[:, 0] = 3
    first, last = found(broken)
    assert torch.isfinite(first).all() and torch.isnan(last).all()


def test_rows_of_more_tokens_weigh_more_in_a_rehearsal_by_tokens() -> None:
    assert len(row_weights(BLOCK[1], "tokens").unique()) > 1
    found = scores(Lookahead(horizon=2, curvature="exact"), 2, "tokens")
    eps = 1e-5
    for slot, place in ((0, 3), (1, 0)):
        ends = [after(slot, place, turned, 2, "tokens") for turned in (eps, -eps)]
        assert float(found[slot][place]) == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-5, abs=1e-10)


def test_one_step_ahead_forms_agree_and_the_target_s_gradient_is_where_the_run_is() -> None:
    rehearsed, frozen = (scores(Lookahead(horizon=1, form=form), 1)[0] for form in ("rehearsal", "frozen"))
    torch.testing.assert_close(rehearsed, frozen, rtol=0, atol=0)
    # K J g and the target's gradient by differences of one real step each: the k = 1 rule, at the run's own place.
    model, optimizer = warmed()
    params = [p for p in model.parameters() if p.requires_grad]
    goal = torch.autograd.grad(per_sample_losses(model, TARGET).mean(), params)
    ends = []
    for eps in (1e-5, -1e-5):
        model, optimizer = warmed()
        weights = torch.full((4,), 0.25, dtype=torch.float64)
        weights[2] *= 1 - eps
        update(model, optimizer, BLOCK[0], weights)
        ends.append([p.detach() for p in model.parameters() if p.requires_grad])
    moved = sum(float(((a - b) / 2e-5 * g).sum()) for a, b, g in zip(*ends, goal, strict=True))
    assert float(rehearsed[2]) == pytest.approx(moved, rel=1e-5, abs=1e-10)


def test_exact_removal_one_step_ahead_is_the_true_difference_of_the_update() -> None:
    found = scores(Lookahead(horizon=1, secant=True), 1)[0]
    model, _ = warmed()
    params = [p for p in model.parameters() if p.requires_grad]
    goal = torch.autograd.grad(per_sample_losses(model, TARGET).mean(), params)
    ends = []
    for keep in (0.0, 1.0):
        model, optimizer = warmed()
        weights = torch.full((4,), 0.25, dtype=torch.float64)
        weights[1] *= keep
        update(model, optimizer, BLOCK[0], weights)
        ends.append([p.detach() for p in model.parameters() if p.requires_grad])
    moved = sum(float(((a - b) * g).sum()) for a, b, g in zip(*ends, goal, strict=True))
    assert float(found[1]) == pytest.approx(moved, rel=1e-9)


def test_a_frozen_horizon_is_the_recursion_at_one_place() -> None:
    """Two updates ahead: by hand, with the first update's moments and gradient, its count and rate moved on by one."""
    model, optimizer = warmed()
    live = live_optimizer(optimizer, model)
    found = scores(Lookahead(horizon=2, form="frozen", curvature="none"), 1)[0]
    params = list(live.params.values())
    losses = per_sample_losses(model, BLOCK[0])
    grads = torch.stack([flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in losses])
    raw = grads.mean(dim=0)
    n = raw.norm()
    kappa = min(1.0, CLIP / (float(n) + 1e-6))
    assert kappa < 1
    g, state = kappa * raw, live.state()
    m, v = 0.9 * state.moments[0] + 0.1 * g, 0.99 * state.moments[1] + 0.01 * g * g
    corrections = [1 / (1 - 0.9**t) for t in (3, 4)], [1 / (1 - 0.99**t) for t in (3, 4)]
    root = (corrections[1][0] * v).sqrt()
    d = 1 / (root + 1e-8)
    e = corrections[0][0] * m * d * d / (2 * root)
    a = flat(torch.autograd.grad(per_sample_losses(model, TARGET).mean(), params))
    b, c = -0.9 * RATES[1] * corrections[0][1] * d * a, 0.99 * RATES[1] * corrections[1][1] * e * a
    a = (1 - RATES[1] * 0.1) * a
    k = -RATES[0] * (corrections[0][0] * 0.1 * d - 2 * corrections[1][0] * 0.01 * e * g)
    q = k * a + 0.1 * b + 2 * 0.01 * g * c
    q = kappa * (q - raw * (raw @ q) / (n * (n + 1e-6)))
    torch.testing.assert_close(found, -(grads @ q) / 4, rtol=1e-9, atol=0)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


NORM = 0.2  # below that of every gradient of a small run


def small_run(updates: int) -> tuple[HeldTrajectory, list[LabelledRows]]:
    """Of a little network, clipped in every update, and target rows."""
    torch.manual_seed(0)
    problem = Classifier(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    rule = Rule(kind="adamw", groups=(Group(numel=problem.layout.numel, decay=0.1),), clip=NORM)

    def rows(count: int) -> LabelledRows:
        return LabelledRows(inputs=torch.randn(count, 4, dtype=torch.float64), labels=torch.randint(0, 3, (count,)))

    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    steps = [
        Step(index=t, micros=(rows(6),), rows=np.arange(6), weights=weights, rates=(RATES[t],)) for t in range(updates)
    ]
    return train(problem, rule, problem.start(), steps, every=1), [rows(4)]


@pytest.mark.parametrize("horizon", [1, 3])
def test_of_any_problem_scores_are_those_of_attributing_the_rehearsal(horizon: int) -> None:
    """A rehearsed block is a run: the sweep over the whole of it must find the same, for each of its updates."""
    run, target = small_run(horizon)
    problem, rule, steps = run.problem, run.rule, run.steps
    method = Lookahead(horizon=horizon, curvature="exact")
    found = look_ahead(method, problem, rule, run.state(0), steps, target, rates=[(rate,) for rate in RATES[:horizon]])
    # One update ahead the method takes the target's gradient where the run is, not where the update will lead.
    expected = run_sweep(run, target, SweepSettings())["scores"]
    if horizon == 1:
        goal = mean_gradient(problem, run.state(0).theta, target)[1][None]
        played = play(problem, rule, run.state(0), steps[0])
        channel = start_channel("by hand", "adamw-influence", "exact", goal, moments=2)
        expected = [sweep_step(problem, played, channel)]
    assert len(found) == horizon
    for own, other in zip(found, expected, strict=True):
        assert float(own.abs().max()) > 0
        torch.testing.assert_close(own, other[:, 0], rtol=1e-12, atol=1e-18)


def test_finite_removal_ahead_is_the_true_change_of_an_update_carried_on_by_autograd() -> None:
    run, target = small_run(3)
    method, rates = Lookahead(horizon=3, curvature="exact", secant=True), [(rate,) for rate in RATES]
    found = look_ahead(method, run.problem, run.rule, run.state(0), run.steps, target, rates=rates)
    for slot, step in enumerate(run.steps):
        there = run.state(slot + 1)
        state = [part.clone().requires_grad_() for part in (there.theta, *there.moments)]
        end = state
        for count, later in enumerate(run.steps[slot + 1 :], start=there.count + 1):
            end = trained_on(run.problem, later, end, count)
        loss = run.problem.predict(run.problem.layout.named(end[0]), target[0]).losses().mean()
        carried = torch.autograd.grad(loss, state, materialize_grads=True)
        for place, score in enumerate(found[slot]):
            weights = step.weights.clone()
            weights[place] = 0
            without = play(run.problem, run.rule, run.state(slot), step, weights).after
            moved = (without.theta - there.theta, *(x - y for x, y in zip(without.moments, there.moments, strict=True)))
            expected = sum(float(x @ y) for x, y in zip(carried, moved, strict=True))
            assert float(score) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def trained_on(problem: Any, step: Step, state: Sequence[Tensor], count: int) -> list[Tensor]:
    """``(θ, m, v)`` after a clipped update of ``small_run``, differentiable all through."""
    theta, m, v = state
    loss = problem.predict(problem.layout.named(theta), step.micros[0]).losses().mean()
    raw = torch.autograd.grad(loss, theta, create_graph=True)[0]
    assert raw.norm() > NORM
    g = raw * NORM / (raw.norm() + 1e-6)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    update = m / (1 - 0.9**count) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
    return [theta - step.rates[0] * (update + 0.1 * theta), m, v]


def test_a_frozen_horizon_with_curvature_is_a_product_of_explicit_matrices() -> None:
    run, target = small_run(3)
    first, before, moments = run.steps[2], run.state(2), run.state(3).moments
    method, rates = Lookahead(horizon=3, form="frozen", curvature="fisher"), [(rate,) for rate in reversed(RATES)]
    [found] = look_ahead(method, run.problem, run.rule, before, [first], target, rates=rates)
    theta = before.theta.clone().requires_grad_()
    named = run.problem.layout.named(theta)
    losses = run.problem.predict(named, first.micros[0]).losses()
    grads = torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses])
    goal = torch.autograd.grad(run.problem.predict(named, target[0]).losses().mean(), theta)[0]
    raw = grads.mean(dim=0)
    n, eye = raw.norm(), torch.eye(len(raw), dtype=torch.float64)
    assert n > NORM
    zero, jacobian = torch.zeros_like(eye), NORM / (n + 1e-6) * (eye - torch.outer(raw, raw) / (n * (n + 1e-6)))
    fisher = grads.T @ grads / 6
    g, (m, v) = NORM / (n + 1e-6) * raw, moments
    root = (v / (1 - 0.999**3)).sqrt()
    d = 1 / (root + 1e-8)
    e = m / (1 - 0.9**3) * d * d / (2 * root)

    def transition(count: int, rate: float) -> tuple[Tensor, Tensor]:
        """In the state at a fixed gradient, and in the gradient that the optimizer sees."""
        c1, c2 = 1 / (1 - 0.9**count), 1 / (1 - 0.999**count)
        rows = (
            ((1 - rate * 0.1) * eye, torch.diag(-rate * c1 * 0.9 * d), torch.diag(rate * c2 * 0.999 * e)),
            (zero, 0.9 * eye, zero),
            (zero, zero, 0.999 * eye),
        )
        injected = [torch.diag(-rate * (c1 * 0.1 * d - 2 * c2 * 0.001 * e * g)), 0.1 * eye, torch.diag(0.002 * g)]
        return torch.cat([torch.cat(row, dim=1) for row in rows]), torch.cat(injected)

    carried = torch.cat([goal, torch.zeros(2 * len(goal), dtype=torch.float64)])
    for ahead in (2, 1):
        state, injected = transition(3 + ahead, rates[ahead][0])
        state[:, : len(eye)] += injected @ jacobian @ fisher
        carried = carried @ state
    query = carried @ transition(3, RATES[2])[1] @ jacobian
    torch.testing.assert_close(found, -(grads @ query) / 6, rtol=1e-9, atol=1e-14)


def test_coming_rates_are_those_of_the_scheduler() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    live = live_optimizer(optimizer, model)
    foreseen = coming_rates(scheduler, live, 3)
    seen = []
    for _ in range(3):
        seen.append(live.rates())
        optimizer.step()
        scheduler.step()
    assert foreseen == seen
    assert coming_rates(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), live, 2) is None


def test_batches_seen_early_come_in_their_turn() -> None:
    early = EarlyBatches(iter(range(5)))
    assert early.peek(2) == [0, 1] and next(early) == 0 and early.peek(3) == [1, 2, 3]
    assert list(early) == [1, 2, 3, 4] and early.peek(1) == []


def trained(folder: Path, *, resume: bool = False, **changes: Any) -> Any:
    trainer = tamis.OnlineTrainer(
        model=tiny_model("llama", dtype=torch.float32, lora=True),
        args=arguments(folder, **{"max_steps": 7, "save_strategy": "steps", "save_steps": 3, **changes}),
        train_dataset=rows_of(40, seed=1),
        target_dataset=rows_of(6, seed=2),
        data_collator=collate,
        selection=Lookahead(keep=2, oversample=3, horizon=4),
        target_rows=4,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


@dataclass
class Runs:
    """One run to its end, and resumed within a block; candidates as they were logged by each."""

    whole: Any
    chosen: Any
    again: Any
    later: Any


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_choice_without_a_supervised_token_is_said_as_by_every_method(tmp_path: Path, horizon: int) -> None:
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in rows_of(12, seed=1)]
    trainer = OnlineTrainer(
        model=tiny_model("llama", dtype=torch.float32, lora=True).train(), args=arguments(tmp_path, max_steps=4),
        train_dataset=silent, target_dataset=rows_of(3, seed=2), data_collator=collate,
        selection=Lookahead(keep=2, oversample=2, horizon=horizon),
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="no candidate of this step has a supervised token; shuffle the pool"):
        trainer.train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    whole = trained(folder)
    chosen = read_candidates(folder / "candidates").to_pandas()
    again = trained(folder, resume=True)
    return Runs(whole, chosen, again, read_candidates(folder / "candidates").to_pandas())


def test_a_run_resumed_within_a_block_makes_the_same_choices(runs: Runs) -> None:
    assert (runs.chosen.groupby("step")["kept"].sum() == 2).all()
    np.testing.assert_array_equal(runs.chosen[["row", "kept"]].to_numpy(), runs.later[["row", "kept"]].to_numpy())
    for one, other in zip(runs.whole.model.parameters(), runs.again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_run_costs_its_rehearsals_also_when_it_was_resumed_in_a_block(runs: Runs) -> None:
    lengths = np.array([len(row["input_ids"]) for row in rows_of(40, seed=1)])
    target = np.array([len(row["input_ids"]) for row in rows_of(6, seed=2)])
    by_step = runs.chosen.groupby("step")["row"].agg(lambda rows: lengths[rows].sum())
    # Update 1 is cold; blocks are updates 2 to 5 and 6 to 7, where training ends. A rehearsed update is a training step
    # and 2.5 on the way back, over the first of a block, without curvature, 2.
    times = {2: 3.0, 3: 3.5, 4: 3.5, 5: 3.5, 6: 3.0, 7: 3.5}
    looked = [target_positions(choice, count=4, total=6, seed=3) for choice in (1, 5)]
    kept = lengths[runs.chosen["row"][runs.chosen["kept"]]].sum()
    tokens = [sum(by_step[step] * n for step, n in times.items()), sum(target[own].sum() for own in looked), kept]
    for trainer in (runs.whole, runs.again):
        assert trainer.work()[:, 0].tolist() == tokens
        assert sorted({*looked[0], *looked[1]}) == trainer._target_seen.nonzero()[0].tolist()
    torch.testing.assert_close(runs.whole.work(), runs.again.work(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (Lookahead(curvature="exact"), [3.0]),
        (Lookahead(secant=True), [2.0]),
        (Lookahead(horizon=2, curvature="exact", secant=True), [2.0, 5.0]),
        (Lookahead(horizon=3, form="frozen", curvature="exact"), [9.0]),
    ],
)
def test_passes_that_are_counted_are_those_that_are_made(
    method: Lookahead, steps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a training step ahead, one for gradients of their own, and two or three for a way back that is taken."""
    made = [0.0] * len(steps)

    def noted(name: str, dear: Callable[..., float]) -> None:
        own = getattr(rehearsal, name)

        def call(problem: Any, *args: Any, **kwargs: Any) -> Any:
            slot = next(n for n, block in enumerate(BLOCK) if same_rows(block, args))
            made[slot] += dear(*args)
            return own(problem, *args, **kwargs)

        monkeypatch.setattr(rehearsal, name, call)

    def same_rows(block: Batch, args: Any) -> bool:
        micros = next(found for found in map(micros_of, args) if found is not None)
        return bool(micros[0].batch is block)

    noted("play", lambda rule, state, step: 1.0)
    noted("per_sample_gradients", lambda theta, micro: 1.0)
    noted("sweep_step", lambda played, channel, **_: 3.0 if channel.curvature == "exact" else 2.0)
    scores(method, len(steps))
    assert made == steps == [method.spent(slot) for slot in range(len(steps))]
    assert f"{np.mean(steps):.3g} training steps on all candidates" in method.cost


def micros_of(value: Any) -> Any:
    """The rows that an argument of a pass is about, if it is about rows."""
    if hasattr(value, "step"):  # what was played
        return value.step.micros
    return value.micros if hasattr(value, "micros") else [value] if hasattr(value, "batch") else None


def test_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="horizon must be at least 1"):
        Lookahead(horizon=0)
    with pytest.raises(InvalidSettings, match=r"cold_start=0: .*or secant=True"):
        Lookahead(cold_start=0)
    assert Lookahead(cold_start=0, secant=True).cold_start == 0
    with pytest.raises(InvalidSettings, match=r"form='guess': expected one of rehearsal, frozen"):
        Lookahead(form="guess")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=r"set gradient_accumulation_steps=1 \(tamis train: --accumulation 1\)"):
        trained(tmp_path, gradient_accumulation_steps=2)
    assert "every 5 updates the target rows" in Lookahead(horizon=5).cost
