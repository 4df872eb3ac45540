"""The ground truth: the run trained again without one sample in one step (TSLOO, after Hara et al., 2019).

Every step and batch is repeated; only the contribution of the sample to that step is removed. Positive: the final loss
is higher without it, so the sample helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tamis.trajectory.adjoint import final_values
from tamis.trajectory.replay import play
from tamis.trajectory.run import State, Trajectory

__all__ = ["final_parameters_without", "leave_out_effect", "weights_without"]


def weights_without(weights: Tensor, place: int, *, renormalise: bool) -> Tensor:
    """The step's weights with the sample's taken out; the others take it over if ``renormalise``."""
    found = weights.clone()
    found[place] = 0
    return found * (weights.sum() / found.sum()) if renormalise else found


def final_parameters_without(trajectory: Trajectory, index: int, place: int, *, renormalise: bool = False) -> Tensor:
    """``θ_T`` of the run without sample ``place`` in step ``index``."""
    start = max(boundary for boundary in trajectory.boundaries if boundary <= index)
    state: State = trajectory.state(start)
    for number in range(start, trajectory.num_steps):
        step = trajectory.step(number)
        weights = weights_without(step.weights, place, renormalise=renormalise) if number == index else None
        state = play(trajectory.problem, trajectory.rule, state, step, weights).after
    return state.theta


def leave_out_effect(
    trajectory: Trajectory,
    index: int,
    place: int,
    target: Sequence[Any],
    *,
    renormalise: bool = False,
    undisturbed: dict[int, Tensor] | None = None,
) -> Tensor:
    """``ℓ(θ_T without it) - ℓ(θ_T)`` of every target row, both losses computed in float32 at least.

    The undisturbed end is replayed too, from the same state, so that rounding and what replay cannot reproduce of the
    recorded run cancel. ``undisturbed`` remembers its losses, by the state that it was replayed from.
    """
    start = max(boundary for boundary in trajectory.boundaries if boundary <= index)
    known = {} if undisturbed is None else undisturbed
    if start not in known:
        known[start] = final_values(trajectory.measured, _replayed_end(trajectory, start), target)
    without = final_parameters_without(trajectory, index, place, renormalise=renormalise)
    return final_values(trajectory.measured, without, target) - known[start]


def _replayed_end(trajectory: Trajectory, start: int) -> Tensor:
    state = trajectory.state(start)
    for number in range(start, trajectory.num_steps):
        state = play(trajectory.problem, trajectory.rule, state, trajectory.step(number)).after
    return state.theta
