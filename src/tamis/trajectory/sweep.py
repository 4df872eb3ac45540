"""A whole run's scores: the sweep over all steps from the last to the first, on disk after every segment.

A sweep that was killed goes on at the segment it was in and ends in the same bytes. Disk is optional; everything else
happens in memory, one segment of the run at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tamis.errors import InvalidSettings, NonFinite
from tamis.gradients.functional import Curvature, Problem, check_curvature, per_sample_gradients, weighted_gradient
from tamis.trajectory.adjoint import Channel, refuse_lone_sample, renormalised, start_channel, sweep_step, tracin_step
from tamis.trajectory.replay import Played, mean_gradient, play_segment, segments
from tamis.trajectory.run import Rule, State, Trajectory
from tamis.trajectory.secant import Later, SecantWindow
from tamis.trajectory.segment_store import SegmentStore
from tamis.trajectory.update_error import ErrorProxy

__all__ = ["METHODS", "SweepSettings", "run_sweep", "target_gradients"]

METHODS = ("adamw-influence", "sgd-influence", "tracin")
_ALONG = ("none", "fisher")  # curvatures that the diagnostic compares


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How samples are scored.

    Args:
        method: ``adamw-influence``, ``sgd-influence`` or ``tracin``.
        curvature: what stands for the Hessian; ``tracin`` has none.
        secant: W of finite removal, 0 for the first order. Needs per-sample gradients.
        renormalise: the rest of the batch takes over the removed sample's weight.
        error: the element-wise estimate of the error of every sample's update. Needs per-sample gradients.
        diagnose: also score without curvature and with the empirical Fisher, for the mean of the target.
        tolerance: how far a replayed run may be from the recorded one; None: by the dtype.

    Raises:
        InvalidSettings: settings contradict each other.
    """

    method: Literal["adamw-influence", "sgd-influence", "tracin"] = "adamw-influence"
    curvature: Curvature = "exact"
    secant: int = 0
    renormalise: bool = False
    error: bool = False
    diagnose: bool = False
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_curvature(self.curvature)
        if self.method not in METHODS:
            raise InvalidSettings(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.secant < 0:
            raise InvalidSettings(f"secant={self.secant}: expected a number of steps, 0 for the first order")
        if self.method != "adamw-influence" and (self.secant or self.error):
            raise InvalidSettings(f"secant and error are about Adam's nonlinearity; {self.method} knows none of it")

    def check_rule(self, rule: Rule) -> None:
        """Refuse a method that is not the run's.

        Raises:
            InvalidSettings: AdamW-influence of a run that Adam did not train.
        """
        if self.method == "adamw-influence" and rule.kind == "sgd":
            raise InvalidSettings("the run was trained by SGD, which has no second moments; use method sgd-influence")


def target_gradients(
    problem: Problem, theta: Tensor, target: Sequence[Any], *, per_row: bool, group: Sequence[int] | None = None
) -> Tensor:
    """``(V, P)``: the gradient of the mean loss of the target rows, of each group of them, or of each row."""
    if per_row:
        return torch.cat([per_sample_gradients(problem, theta, micro) for micro in target])
    if group is not None:
        member = torch.tensor(list(group), device=theta.device)
        weights = [(member == g).to(theta) / (member == g).sum() for g in range(int(member.max()) + 1)]
        return torch.stack([weighted_gradient(problem, theta, target, own)[1] for own in weights])
    return mean_gradient(problem, theta, target)[1][None]


def run_sweep(
    trajectory: Trajectory,
    target: Sequence[Any],
    settings: SweepSettings,
    *,
    per_row: bool = False,
    group: Sequence[int] | None = None,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, list[Tensor]]:
    """Every step's numbers, a list over steps for each name.

    V is 1 for the mean of the target rows, their number with ``per_row``, or the number of groups that ``group`` puts
    them in. ``scores`` is (B, V) on the CPU; ``error`` (B,), ``curvature:none`` and ``curvature:fisher`` (B, 1) if
    asked for.

    Raises:
        StoreMismatch: the replay is not the recorded run.
        InvalidSettings: the method or the reading of removal is not one for this run.
        NonFinite: the run diverged, or a score did on the way back.
    """
    settings.check_rule(trajectory.rule)
    end = trajectory.state(trajectory.num_steps)
    sweep = _Sweep(trajectory.problem, trajectory.rule, settings, target, end, per_row=per_row, group=group)
    parts = segments(trajectory)
    done = SegmentStore(folder)
    left = parts if done.reached is None else [part for part in parts if part[1] <= done.reached]
    if done.reached is not None:
        if done.reached:
            sweep.load(done.tensors(end.theta))
        advance(trajectory.num_steps - done.reached)
    for start, stop in reversed(left):
        played = play_segment(trajectory, start, stop, tolerance=settings.tolerance)
        found = {one.step.index: sweep.step(one) for one in reversed(played)}
        done.write(start, stop, [found[index] for index in range(start, stop)], sweep.tensors() if start else {})
        advance(stop - start)
    return done.all(parts)


class _Sweep:
    """The state of a sweep between two steps."""

    def __init__(
        self,
        problem: Problem,
        rule: Rule,
        settings: SweepSettings,
        target: Sequence[Any],
        end: State,
        *,
        per_row: bool,
        group: Sequence[int] | None,
    ) -> None:
        self._problem, self._rule, self._settings = problem, rule, settings
        self._target = partial(target_gradients, problem, target=target, per_row=per_row, group=group)
        self._channels: list[Channel] = []
        self._same: str | None = None  # which diagnosis the scores' own channel is
        self._window = SecantWindow(settings.secant) if settings.secant else None
        self._proxy = ErrorProxy() if settings.error else None
        if settings.method == "tracin":
            return
        goal = self._target(end.theta)
        count = len(end.moments)
        self._channels.append(start_channel("scores", settings.method, settings.curvature, goal, moments=count))
        if settings.diagnose:
            mean = goal.mean(dim=0, keepdim=True)
            for curvature in _ALONG:
                name = f"curvature:{curvature}"
                if curvature == settings.curvature and len(goal) == 1:
                    self._same = name
                    continue
                self._channels.append(start_channel(name, settings.method, curvature, mean, moments=count))  # type: ignore[arg-type]

    def step(self, played: Played) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        step, settings = played.step, self._settings
        if settings.renormalise:
            refuse_lone_sample(step)
        if settings.method == "tracin":
            goal = self._target(played.before.theta)
            scores = tracin_step(self._problem, played, goal)
            found["scores"] = renormalised(scores, step.weights) if settings.renormalise else scores
        if self._window is not None:
            self._window.enter(played, self._channels[0].adjoint)
        if self._proxy is not None:
            self._proxy.enter(played)
        if self._window is not None or self._proxy is not None:
            found |= self._with_gradients(played)
        for channel in self._channels:
            scores = sweep_step(self._problem, played, channel)
            own = renormalised(scores, step.weights) if settings.renormalise else scores
            found.setdefault(channel.name, own)
            if channel.name == "scores" and self._same is not None:
                found[self._same] = own
        for name, tensor in found.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFinite(
                    f"update {step.index + 1}: the numbers of its {name} are not all finite; on the way back from "
                    "the end of the run they grew beyond what numbers hold, which is the sign of a chaotic run: no "
                    "derivative predicts it "
                    "(record one with a lower learning rate, or trust retraining alone)"
                )
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    def _with_gradients(self, played: Played) -> dict[str, Tensor]:
        """What needs every sample's own gradient, one micro-batch at a time."""
        scores, errors, first = [], [], 0
        for micro in played.step.micros:
            grads = per_sample_gradients(self._problem, played.before.theta, micro)
            own = played.step.weights[first : first + len(grads)]
            first += len(grads)
            if self._window is not None:
                scores.append(self._window.scores(played, grads, own, renormalise=self._settings.renormalise))
            if self._proxy is not None:
                errors.append(self._proxy.norms(played, grads, own))
        found = {}
        if scores:
            found["scores"] = torch.cat(scores)
        if errors:
            found["error"] = torch.cat(errors)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step needs."""
        found = {
            f"adjoint.{channel.name}.{i}": part for channel in self._channels for i, part in enumerate(channel.adjoint)
        }
        if self._proxy is not None:
            found |= {f"proxy.{name}": torch.as_tensor(getattr(self._proxy, name)) for name in "xyz"}
        for place, later in enumerate(self._window.later if self._window is not None else ()):
            s = later.step.settings
            values = {"g": later.step.g, "m": later.step.m, "v": later.step.v, "count": torch.tensor(s.count)}
            found |= {f"later.{place}.{name}": value for name, value in values.items()}
            found[f"later.{place}.rates"] = torch.tensor(later.rates, dtype=torch.float64)
            found |= {f"later.{place}.adjoint.{i}": part for i, part in enumerate(later.adjoint)}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse."""
        for channel in self._channels:
            parts = range(len(channel.adjoint))
            channel.adjoint = tuple(tensors[f"adjoint.{channel.name}.{i}"] for i in parts)
        if self._proxy is not None:
            for name in "xyz":
                setattr(self._proxy, name, tensors[f"proxy.{name}"])
        place = 0
        while self._window is not None and f"later.{place}.g" in tensors:
            get = {name: tensors[f"later.{place}.{name}"] for name in ("g", "m", "v", "count", "rates")}
            after = State(theta=get["g"], moments=(get["m"], get["v"]), count=int(get["count"]))
            rates = tuple(get["rates"].tolist())
            derivative = self._rule.derivative(after, get["g"], rates)
            adjoint = tuple(tensors[f"later.{place}.adjoint.{i}"] for i in range(3))
            self._window.later.append(Later(step=derivative, adjoint=adjoint, rates=rates))  # type: ignore[arg-type]
            place += 1
