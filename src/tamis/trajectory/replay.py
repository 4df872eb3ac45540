"""Going through a recorded run again, forwards, and keeping what the way back needs of every step.

Nothing touches the model's own parameters: losses are functions of a flat vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tamis.errors import NonFinite, StoreMismatch
from tamis.gradients.functional import Problem, weighted_gradient
from tamis.maths.clip import Clip, clip_at
from tamis.maths.step_derivative import StepDerivative
from tamis.trajectory.run import HeldTrajectory, Rule, State, Step, Trajectory

__all__ = ["Played", "mean_gradient", "play", "play_segment", "segments", "train", "weighted_losses"]


@dataclass(frozen=True, kw_only=True)
class Played:
    """One step as it was replayed."""

    step: Step
    before: State
    after: State
    clip: Clip  # with the raw gradient
    g: Tensor  # what the optimizer saw
    losses: Tensor  # (B,)
    rule: Rule

    def derivative(self) -> StepDerivative:
        """Of the optimizer's own step."""
        return self.rule.derivative(self.after, self.g, self.step.rates)


def play(problem: Problem, rule: Rule, state: State, step: Step, weights: Tensor | None = None) -> Played:
    """One update from ``state``; ``weights`` stand in for the recorded ones."""
    used = step.weights if weights is None else weights
    losses, raw = weighted_gradient(problem, state.theta, step.micros, used)
    clip = clip_at(raw, rule.clip)
    g = rule.seen(state.theta, raw * clip.factor if clip.is_active else raw)
    after = rule.advance(state, g, step.rates)
    return Played(step=step, before=state, after=after, clip=clip, g=g, losses=losses, rule=rule)


def segments(trajectory: Trajectory) -> list[tuple[int, int]]:
    """Pairs of neighbouring boundaries, in order."""
    return list(pairwise(trajectory.boundaries))


def play_segment(trajectory: Trajectory, start: int, stop: int, *, tolerance: float | None = None) -> list[Played]:
    """The steps from ``start`` to before ``stop``, checked against what was recorded of them.

    Raises:
        NonFinite: a loss or gradient is not: the run diverged.
        StoreMismatch: losses, gradient norms or the state at the end are not those of the recorded run.
    """
    state = trajectory.state(start)
    tolerance = trajectory.tolerance if tolerance is None else tolerance
    found = []
    for index in range(start, stop):
        played = play(trajectory.problem, trajectory.rule, state, trajectory.step(index))
        _check_step(played, tolerance)
        found.append(played)
        state = played.after
    if stop in trajectory.boundaries:
        _check_end(found[0].before, state, trajectory.state(stop), start, stop, tolerance)
        if trajectory.rule.has_moments:
            _check_moments(state, trajectory.state(stop), start, stop, tolerance)
    return found


def train(problem: Problem, rule: Rule, theta: Tensor, steps: Sequence[Step], *, every: int) -> HeldTrajectory:
    """A run of our own from ``theta``, with the states of every ``every`` steps and of the end."""
    state = rule.fresh(theta)
    states = {0: state}
    for step in steps:
        state = play(problem, rule, state, step).after
        if (step.index + 1) % every == 0 or step.index + 1 == len(steps):
            states[step.index + 1] = state
    return HeldTrajectory(problem=problem, rule=rule, steps=steps, states=states)


def weighted_losses(step: Step, losses: Tensor) -> Iterator[float]:
    """``sum_i w_i l_i`` of every micro-batch, as the trainer back-propagated it."""
    first = 0
    for micro in step.micros:
        count = len(micro)
        own = losses[first : first + count].double()
        yield float(own @ step.weights[first : first + count].to(own))
        first += count


def mean_gradient(problem: Problem, theta: Tensor, micros: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Losses of target rows and the gradient of their mean."""
    count = sum(len(micro) for micro in micros)
    weights = torch.full((count,), 1 / count, dtype=theta.dtype, device=theta.device)
    return weighted_gradient(problem, theta, micros, weights)


def _check_step(played: Played, tolerance: float) -> None:
    step = played.step
    norm = float(torch.linalg.vector_norm((played.clip.gradient * played.clip.factor).double()))
    if not (math.isfinite(norm) and bool(torch.isfinite(played.losses).all())):
        raise NonFinite(
            f"update {step.index + 1}: its loss or its gradient is NaN or infinite; a run that diverged has no "
            "scores: record one with a lower learning rate"
        )
    pairs = list(zip(step.losses, weighted_losses(step, played.losses), strict=True)) if step.losses else []
    scale = sum(abs(recorded) for recorded, _ in pairs) or 1.0
    for recorded, found in pairs:
        if not abs(recorded - found) <= tolerance * scale:
            raise StoreMismatch(
                f"update {step.index + 1}: the run recorded a loss of {recorded:.6g} for a micro-batch and replaying "
                f"it gives {found:.6g}, off by {abs(found - recorded) / scale:.2g} of it ({tolerance:g} is allowed); "
                "scores of another run would be worthless. Give the model, dtype, attention kernel and library "
                "versions of the recorded run; if they are the same, the record is damaged"
            )
    off = abs(step.norm - norm) / max(step.norm, 1e-12) if step.norm is not None else 0.0
    if not off <= 10 * tolerance:
        raise StoreMismatch(
            f"update {step.index + 1}: the optimizer was given a gradient of norm {step.norm:.6g} and replaying the "
            f"update gives {norm:.6g}, off by {off:.2g} of it ({10 * tolerance:g} is allowed), although the losses "
            "agree; the gradient was changed on the way (by another callback, noise, a frozen part), or rows were "
            "weighted otherwise than the trainer's loss says"
        )


def _check_end(before: State, found: State, recorded: State, start: int, stop: int, tolerance: float) -> None:
    if recorded.count and recorded.count != found.count:
        raise StoreMismatch(
            f"updates {start + 1} to {stop}: the optimizer had taken {recorded.count} steps when they were done, and "
            f"replaying gives {found.count}; it was made anew or loaded from elsewhere on the way"
        )
    moved = float(torch.linalg.vector_norm((recorded.theta - before.theta).double()))
    off = float(torch.linalg.vector_norm((recorded.theta - found.theta).double()))
    # Coordinates that hardly have a gradient take sign steps of Adam, which rounding may turn around. Over runs in 16
    # bits that was a seventieth of the way; what is off by a tenth is another run, whatever its losses are.
    if not off <= min(50 * tolerance, 0.1) * moved + 1e-30:
        raise StoreMismatch(
            f"updates {start + 1} to {stop}: the recorded parameters moved by {moved:.3g} and the replayed ones end "
            f"{off:.3g} away from them; something that is not in the log changed them"
        )


def _check_moments(found: State, recorded: State, start: int, stop: int, tolerance: float) -> None:
    for ours, theirs in zip(found.moments, recorded.moments, strict=True):
        norm = float(torch.linalg.vector_norm(theirs.double()))
        off = float(torch.linalg.vector_norm((theirs - ours).double()))
        # Gradients replayed in 16 bits are a few percent off; moments that were set anew are off by all of themselves.
        if not off <= min(50 * tolerance, 0.5) * max(norm, float(torch.linalg.vector_norm(ours.double()))) + 1e-30:
            raise StoreMismatch(
                f"updates {start + 1} to {stop}: the recorded moments of the optimizer have norm {norm:.3g} when they "
                f"are done, and the replayed ones are {off:.3g} away from them, although the parameters agree; the "
                "optimizer's state was changed on the way (a restart, a reset), which is not in the log"
            )
