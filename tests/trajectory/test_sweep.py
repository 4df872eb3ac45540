"""A whole run's scores: each way to score against training again, against a loop, and in less precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from classifier import Classifier, LabelledRows
from tamis.trajectory import sweep
from tamis.trajectory.replay import play, train
from tamis.trajectory.run import HeldTrajectory
from tamis.trajectory.secant import SecantWindow
from tamis.trajectory.sweep import SweepSettings, run_sweep
from trajectory_case import ReferenceNet, adjoint_scores, played_all, random_run, random_target, target_loss

TARGET = random_target()
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-13}  # float64; the same sums in another order


def weight_handed_on(weights: Tensor, place: int, share: float) -> Tensor:
    """A share of one row's weight given to the others, in proportion to theirs."""
    given, rest = share * weights[place], weights.sum() - weights[place]
    found = [w - given if row == place else w + given * w / rest for row, w in enumerate(weights)]
    return torch.stack(found)


def end_with(run: HeldTrajectory, index: int, weights: Tensor) -> Tensor:
    """The target loss of the same training with other weights in one step."""
    steps = [replace(step, weights=weights) if step.index == index else step for step in run.steps]
    again = train(run.problem, run.rule, run.states[0].theta, steps, every=len(steps))
    return target_loss(run, again.states[len(steps)].theta, TARGET)


def test_a_renormalising_sweep_is_the_difference_of_runs_whose_other_rows_take_the_weight_over() -> None:
    run = random_run(even=False, micro_sizes=(2, 3), clip=0.3)
    found = run_sweep(run, TARGET, SweepSettings(renormalise=True))["scores"]
    eps = 1e-5
    for index, place in ((0, 4), (4, 0), (7, 2)):
        weights = run.steps[index].weights
        ends = [end_with(run, index, weight_handed_on(weights, place, share)) for share in (eps, -eps)]
        # Central differences of size 1e-5: an error of 1e-10 relative to the third derivative, and 1e-16/1e-5 rounding.
        assert float(ends[0] - ends[1]) / (2 * eps) == pytest.approx(float(found[index][place]), rel=1e-5, abs=1e-9)


def test_a_renormalising_sweep_takes_the_last_step_s_rows_out_exactly_if_removal_is_finite() -> None:
    run = random_run(even=False, micro_sizes=(2, 3), clip=0.3)
    found = run_sweep(run, TARGET, SweepSettings(renormalise=True, secant=2))["scores"][-1]
    last = played_all(run)[-1]
    theta = last.after.theta.clone().requires_grad_()
    goal = torch.autograd.grad(target_loss(run, theta, TARGET), theta)[0]
    for place in range(5):
        weights = weight_handed_on(last.step.weights, place, 1.0)
        moved = play(run.problem, run.rule, last.before, last.step, weights).after.theta - last.after.theta
        torch.testing.assert_close(found[place, 0], goal @ moved, **EXACT)


@pytest.mark.parametrize("name", ["tracin", "curvature:none", "curvature:fisher"])
def test_what_a_sweep_scores_beside_is_renormalised_too(name: str) -> None:
    run = random_run(even=False, micro_sizes=(2, 3), steps=4)
    method, key = ("tracin", "scores") if name == "tracin" else ("adamw-influence", name)
    plain, found = (
        run_sweep(run, TARGET, SweepSettings(method=method, diagnose=True, renormalise=renormalise))[key]  # type: ignore[arg-type]
        for renormalise in (False, True)
    )
    for step, scores, given in zip(run.steps, plain, found, strict=True):
        for place, w in enumerate(step.weights):
            others = [row for row in range(5) if row != place]
            taken = w / step.weights[others].sum()  # every other row grows by this share of itself
            expected = scores[place] - taken * scores[others].sum(dim=0)
            torch.testing.assert_close(given[place], expected, **EXACT)


def test_tracin_is_a_loop_over_rows_with_their_own_weights_and_rates() -> None:
    run = random_run(even=False, micro_sizes=(2, 3), decays=(0.1, 0.0), rates=(1.0, 0.3), clip=0.3, steps=3)
    found = run_sweep(run, TARGET, SweepSettings(method="tracin"))["scores"]
    sizes = torch.tensor([group.numel for group in run.rule.groups])
    for played, scores in zip(played_all(run), found, strict=True):
        theta = played.before.theta.clone().requires_grad_()
        rates = torch.tensor(played.step.rates, dtype=torch.float64).repeat_interleave(sizes)
        goal = torch.autograd.grad(target_loss(run, theta, TARGET), theta)[0]
        named = run.problem.layout.named(theta)
        losses = torch.cat([run.problem.predict(named, micro).losses() for micro in played.step.micros])
        for loss, weight, score in zip(losses, played.step.weights, scores, strict=True):
            grad = torch.autograd.grad(loss, theta, retain_graph=True)[0]
            torch.testing.assert_close(score[0], weight * (rates * grad * goal).sum(), **EXACT)


@pytest.mark.parametrize("method", ["adamw-influence", "sgd-influence", "tracin"])
def test_every_target_gets_the_scores_of_its_own_rows(
    method: Literal["adamw-influence", "sgd-influence", "tracin"],
) -> None:
    run, rows = random_run(clip=0.3, steps=4), random_target(5)[0]
    micros = [LabelledRows(inputs=rows.inputs[at], labels=rows.labels[at]) for at in (slice(0, 2), slice(2, 5))]
    settings = SweepSettings(method=method)

    def alone(members: list[int]) -> Tensor:
        own = LabelledRows(inputs=rows.inputs[members], labels=rows.labels[members])
        if method == "tracin":
            return torch.cat(run_sweep(run, [own], settings)["scores"])[:, 0]
        return torch.cat(adjoint_scores(run, [own], method=method)[0])

    together = torch.cat(run_sweep(run, micros, settings, group=[0, 1, 0, 2, 0])["scores"])
    expected = torch.stack([alone([0, 2, 4]), alone([1]), alone([3])], dim=1)
    torch.testing.assert_close(together, expected, **EXACT)
    by_row = torch.cat(run_sweep(run, micros, settings, per_row=True)["scores"])
    torch.testing.assert_close(by_row, torch.stack([alone([row]) for row in range(5)], dim=1), **EXACT)


def in_float32(run: HeldTrajectory) -> HeldTrajectory:
    """The same training, computed in float32 from the same start."""
    steps = [
        replace(step, micros=tuple(LabelledRows(inputs=m.inputs.float(), labels=m.labels) for m in step.micros))
        for step in run.steps
    ]
    theta = run.states[0].theta.float()
    return train(Classifier(ReferenceNet(5, 4, 3).float()), run.rule, theta, steps, every=100)


# Measured over 12 seeds: up to 1.3e-6 of a step's largest score, twenty rounding units; in a lone first update, whose
# derivative ε/(|g| + ε)² lets the smallest gradient dominate with twice its relative error, up to 8e-5 over 20 seeds.
@pytest.mark.parametrize(("steps", "most"), [(8, 1e-5), (1, 3e-4)])
def test_float32_scores_are_those_of_float64(steps: int, most: float) -> None:
    run = random_run(steps=steps, clip=0.3)
    rounded = [LabelledRows(inputs=micro.inputs.float(), labels=micro.labels) for micro in TARGET]
    precise = run_sweep(run, TARGET, SweepSettings())["scores"]
    for own, other in zip(run_sweep(in_float32(run), rounded, SweepSettings())["scores"], precise, strict=True):
        assert own.dtype == torch.float32
        assert (own.double() - other).abs().max() <= most * other.abs().max()


def test_finite_removal_of_nearly_a_whole_first_gradient_keeps_the_digits_of_float32() -> None:
    [played] = played_all(in_float32(random_run(steps=1, decays=(0.0,))))
    whole, rate, eps = played.clip.gradient, played.step.rates[0], played.rule.groups[0].eps
    goal = torch.linspace(-1, 1, len(whole))[None]
    window = SecantWindow(1)
    window.enter(played, (goal, torch.zeros_like(goal), torch.zeros_like(goal)))
    grads = (1 - torch.logspace(-4.5, -2, 20))[:, None] * whole
    found = window.scores(played, grads, torch.ones(20))[:, 0].double()
    left, before = (whole - grads).double(), whole.double()  # the difference of close numbers is exact
    # Moments are fresh, so Adam's update of a gradient is its sign, up to ε.
    change = left / (left.abs() + eps) - before / (before.abs() + eps)
    torch.testing.assert_close(found, -rate * change @ goal[0].double(), rtol=1e-5, atol=1e-8)


def test_finite_removal_of_nearly_a_whole_gradient_keeps_its_digits_in_the_updates_that_follow() -> None:
    """Their own gradients are zero, as those of a token's embedding are where no row has the token."""
    run = random_run(steps=3, decays=(0.0,))
    silent = [replace(step, weights=step.weights * (step.index == 0)) for step in run.steps]
    run = in_float32(train(run.problem, run.rule, run.states[0].theta, silent, every=100))
    first, group = played_all(run)[0], run.rule.groups[0]
    whole = first.clip.gradient
    goal = torch.linspace(-1, 1, len(whole))[None]
    window = SecantWindow(3)
    for played in reversed(played_all(run)):
        window.enter(played, (goal, torch.zeros_like(goal), torch.zeros_like(goal)))
    grads = (1 - torch.logspace(-4.5, -2, 20))[:, None] * whole
    found = window.scores(first, grads, torch.ones(20))[:, 0].double()

    def path(g: Tensor) -> Tensor:
        """What Adam's updates of ``g`` and of no gradient after it add up to."""
        total, m, v = torch.zeros_like(g), (1 - group.beta1) * g, (1 - group.beta2) * g**2
        for count, step in enumerate(run.steps, start=1):
            root = (v / (1 - group.beta2**count)).sqrt() + group.eps
            total = total - step.rates[0] * m / (1 - group.beta1**count) / root
            m, v = group.beta1 * m, group.beta2 * v
        return total

    change = path((whole - grads).double()) - path(whole.double())
    torch.testing.assert_close(found, change @ goal[0].double(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("curvature", ["none", "fisher"])
@pytest.mark.parametrize("more", [{}, {"secant": 2}, {"renormalise": True}], ids=["plain", "secant", "renormalised"])
def test_a_diagnosis_by_the_scores_own_curvature_is_no_sweep_of_its_own(
    curvature: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = random_run()
    expected = run_sweep(run, TARGET, SweepSettings(diagnose=True, **more))
    names = list[str]()
    whole = sweep.sweep_step

    def counted(problem: Any, played: Any, channel: Any, **options: Any) -> Any:
        names.append(channel.name)
        return whole(problem, played, channel, **options)

    monkeypatch.setattr(sweep, "sweep_step", counted)
    found = run_sweep(run, TARGET, SweepSettings(diagnose=True, curvature=curvature, **more), folder=tmp_path / "sweep")
    other = {"none": "fisher", "fisher": "none"}[curvature]
    assert set(names) == {"scores", f"curvature:{other}"}
    for name in ("curvature:none", "curvature:fisher"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-13)
