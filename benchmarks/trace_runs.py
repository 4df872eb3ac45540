"""A training run whose attribution is measured, what retraining says, and what each method says: shared by trace_*.py.

Everything is about the loss of target rows after the last update: of their mean, and of the first few one by one.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamis.gradients.functional import per_sample_gradients, products
from tamis.maths.ranks import rank_correlation
from tamis.trajectory.adjoint import Channel, final_values, start_channel, sweep_step
from tamis.trajectory.leave_out import final_parameters_without
from tamis.trajectory.replay import Played, mean_gradient, play_segment
from tamis.trajectory.run import Group, HeldTrajectory, Rule, State
from tamis.trajectory.secant import SecantWindow

RESULTS = Path(__file__).parent / "results"
WINDOW = 10  # updates of finite removal
Use = tuple[int, int]  # update and place in its batch, both from 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that was trained, replayed, and what is asked of it."""

    run: HeldTrajectory
    played: Sequence[Played]
    problem: Any  # the run's, or its slower twin that can be differentiated in any way
    target: tuple[Any, ...]  # micro-batches of target rows
    singles: int  # of the first target rows that are looked at one by one
    together: bool  # whether many copies of the model can be trained in one batched pass

    @property
    def theta(self) -> Tensor:
        return self.played[-1].after.theta

    def values(self, losses: Tensor) -> Tensor:
        """``(..., targets)`` losses -> ``(..., 1 + singles)``: their mean, then the first ones."""
        return torch.cat([losses.mean(dim=-1, keepdim=True), losses[..., : self.singles]], dim=-1)

    def goal(self, theta: Tensor) -> Tensor:
        """``(1 + singles, P)``: gradients of what ``values`` holds, at ``theta``."""
        problem, left, found = self.problem, self.singles, []
        for micro in self.target:
            if left > 0:
                part = micro.first(left)
                found.append(per_sample_gradients(problem, theta, part))
                left -= len(part)
        return torch.cat([mean_gradient(self.run.problem, theta, self.target)[1][None], *found])


def random_uses(run: HeldTrajectory, count: int, seed: int) -> list[Use]:
    """Of all samples of all updates, in the order of updates."""
    places = [(step.index, place) for step in run.steps for place in range(len(step.rows))]
    rng = np.random.default_rng(seed)
    return [places[i] for i in np.sort(rng.choice(len(places), size=min(count, len(places)), replace=False))]


def replayed(run: HeldTrajectory) -> list[Played]:
    """Every update, kept."""
    return play_segment(run, 0, run.num_steps)


def ends_without(case: Case, uses: Sequence[Use]) -> Tensor:
    """``(n, P)``: final parameters of the run without each use, each use on its own."""
    if not case.together:
        return torch.stack([final_parameters_without(case.run, *use) for use in uses])
    run, live = case.run, list[int]()
    theta, moments = torch.zeros(0), tuple[Tensor, ...]()
    for one in case.played:
        entering = [n for n, use in enumerate(uses) if use[0] == one.step.index]
        if entering:
            fresh = [tensor.expand(len(entering), -1) for tensor in (one.before.theta, *one.before.moments)]
            parts = (theta, *moments) if live else [tensor[:0] for tensor in fresh]
            theta, *rest = (torch.cat(pair) for pair in zip(parts, fresh, strict=True))
            moments = tuple(rest)
            live += entering
        if not live:
            continue
        weights = one.step.weights.to(theta).repeat(len(live), 1)
        for row, n in enumerate(live):
            if uses[n][0] == one.step.index:
                weights[row, uses[n][1]] = 0
        raw = many_gradients(run.problem, theta, one.step.micros[0], weights)
        state = State(theta=theta, moments=moments, count=one.before.count)
        after = run.rule.advance(state, run.rule.seen(theta, raw), one.step.rates)
        theta, moments = after.theta, after.moments
    found = torch.empty_like(theta)
    found[torch.tensor(live)] = theta
    return found


def many_gradients(problem: Any, theta: Tensor, micro: Any, weights: Tensor) -> Tensor:
    """``sum_i w_ki grad l_i(θ_k)`` of every copy k of the model, unclipped: (n, P) and (n, B) -> (n, P)."""
    leaf = theta.detach().requires_grad_()
    losses = torch.vmap(lambda own: problem.predict(problem.layout.named(own), micro).losses())(leaf)
    found: Tensor = torch.autograd.grad((losses * weights).sum(), leaf)[0]
    return found


def true_effects(case: Case, ends: Tensor) -> Tensor:
    """``(n, 1 + singles)``: how much higher each target value is without the sample."""
    before = final_values(case.run.problem, case.theta, case.target)
    return torch.stack([case.values(final_values(case.run.problem, end, case.target) - before) for end in ends])


def scores_of(case: Case, goal: Tensor, uses: Sequence[Use], name: str) -> dict[str, Tensor]:
    """``(n, 1 + singles)`` by method ``name``: "tracin", or "adamw" or "sgd" and a curvature.

    "adamw exact" brings "adamw exact, finite removal W" along, which is the same sweep.
    """
    if name == "tracin":
        return {name: tracin(case, uses)}
    optimizer, curvature = name.split()
    own = case.run.rule.kind
    steps = list(case.played)
    if optimizer == "adamw" and own == "sgd":
        steps = as_if_adam(steps)  # what a user gets who takes the wrong method: Adam's moments of an SGD run
    channel = start_channel(name, f"{optimizer}-influence", curvature, goal, moments=2)  # type: ignore[arg-type]
    window = SecantWindow(WINDOW) if name == "adamw exact" and own == "adamw" else None
    found, finite = dict[Use, Tensor](), dict[Use, Tensor]()
    for one in reversed(steps):
        here = [use for use in uses if use[0] == one.step.index]
        if window is not None:
            window.enter(one, channel.adjoint)
            if here:
                grads, weights = chosen_gradients(case, one, here)
                finite |= dict(zip(here, window.scores(one, grads, weights), strict=True))
        scores = back_without_curvature(case, one, channel, here) if curvature == "none" else None
        if scores is None:
            scores = sweep_step(case.problem, one, channel)[[place for _, place in here]]
        found |= dict(zip(here, scores, strict=True))
    answer = {name: torch.stack([found[use] for use in uses])}
    if window is not None:
        answer[f"{name}, finite removal {WINDOW}"] = torch.stack([finite[use] for use in uses])
    return answer


def back_without_curvature(case: Case, one: Played, channel: Channel, here: Sequence[Use]) -> Tensor:
    """What ``sweep_step`` does, but with the gradients of the chosen samples alone: no pass over the batch."""
    derivative = channel.derivative(one)
    q = one.clip.jacobian(derivative.inject(channel.adjoint))
    channel.adjoint = derivative.back(channel.adjoint, 0.0)
    if not here:
        return q[:0, :0]
    grads, weights = chosen_gradients(case, one, here)
    return -weights[:, None] * (grads @ q.T)


def tracin(case: Case, uses: Sequence[Use]) -> Tensor:
    """``w η <g_i, ∇ℓ>`` with both gradients before the sample's update."""
    found = []
    for one in case.played:
        here = [use for use in uses if use[0] == one.step.index]
        if here:
            grads, weights = chosen_gradients(case, one, here)
            rate = one.rule.over(one.g, one.step.rates)
            assert isinstance(rate, float), "one learning rate for all parameters"
            found.append(rate * weights[:, None] * (grads @ case.goal(one.before.theta).T))
    return torch.cat(found)


def as_if_adam(steps: Sequence[Played]) -> list[Played]:
    rule = Rule(kind="adamw", groups=(Group(numel=len(steps[0].g)),))
    state, found = rule.fresh(steps[0].before.theta), []
    for one in steps:
        moved = rule.advance(state, one.g, one.step.rates)
        state = State(theta=one.after.theta, moments=moved.moments, count=moved.count)
        found.append(replace(one, rule=rule, after=state))
    return found


def chosen_gradients(case: Case, one: Played, here: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """Gradients of some samples of an update, and their weights in it."""
    places = [place for _, place in here]
    part = one.step.micros[0].at(places)
    grads = per_sample_gradients(case.problem, one.before.theta, part)
    return grads, one.step.weights[places].to(grads)


def first_order_changes(case: Case, uses: Sequence[Use]) -> Tensor:
    """``(n, P)``: ``θ'_T``, the change of the final parameters that AdamW-influence reckons with, forwards."""
    assert all(len(one.step.micros) == 1 for one in case.played)
    live, change = list[int](), tuple[Tensor, ...]()
    for one in case.played:
        derivative = one.derivative()
        if live:
            step = one.step
            curved = products(case.problem, one.before.theta, step.micros, step.weights, change[0], "exact")[1]
            change = derivative.push(change, one.clip.jacobian(curved))
        entering = [n for n, use in enumerate(uses) if use[0] == one.step.index]
        if entering:
            grads, weights = chosen_gradients(case, one, [uses[n] for n in entering])
            zero = torch.zeros_like(grads)
            nothing = (zero,) * (1 + len(one.before.moments))
            fresh = derivative.push(nothing, one.clip.jacobian(-weights[:, None] * grads))
            change = tuple(torch.cat(pair) for pair in zip(change, fresh, strict=True)) if live else fresh
            live += entering
    found = torch.empty_like(change[0])
    found[torch.tensor(live)] = change[0]
    return found


def mean_spearman(scores: Tensor, truth: Tensor) -> float | None:
    """Over samples, averaged over the columns on which both sides have spread."""
    columns = zip(scores.T.cpu().double().numpy(), truth.T.cpu().double().numpy(), strict=True)
    found = [value for a, b in columns if (value := rank_correlation(a, b)) is not None]
    return rounded(float(np.mean(found))) if found else None


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        writer.writerows(lines)
