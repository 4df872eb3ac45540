"""A trajectory: the steps of a training run, the states it passed through, and how its optimizer makes one of the next.

In memory or on disk, whoever walks along it sees the same: ``Trajectory``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tamis.gradients.functional import Problem
from tamis.maths.step_derivative import AdamSettings, AdamStep, Coefficient, SgdStep, StepDerivative
from tamis.types import IntArray

__all__ = ["TOLERANCES", "Group", "HeldTrajectory", "Rule", "State", "Step", "Trajectory"]

# Of losses, relatively. float32 sums in another order differ by about 1e-6; autocast to 16 bits by up to a percent,
# because a replay takes another attention kernel and other paddings.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}

OptimizerKind = Literal["adamw", "adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The constants of one parameter group; its parameters are neighbours in the flat vector."""

    numel: int
    beta1: float = 0.9  # of SGD: the momentum
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0  # decoupled for AdamW, part of the gradient for Adam and SGD


@dataclass(frozen=True, kw_only=True)
class State:
    """Parameters and the optimizer's moments before a step, flat: one moment for SGD, two for Adam."""

    theta: Tensor
    moments: tuple[Tensor, ...]
    count: int  # steps the optimizer has taken


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one update was made of.

    The raw gradient is ``sum_i w_i grad l_i`` over the rows of all micro-batches: the effective batch, whatever
    accumulation or token counts made of it.
    """

    index: int  # from 0
    micros: tuple[Any, ...]  # rows that went through the model together, as the problem takes them
    rows: IntArray  # (B,) which row of the run each is, over the micro-batches one after the other
    weights: Tensor  # (B,) w_i
    rates: tuple[float, ...]  # learning rate of each group in this step
    losses: tuple[float, ...] = ()  # recorded: sum_i w_i l_i of each micro-batch; empty if not recorded
    norm: float | None = None  # recorded: of the gradient that the optimizer saw


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the optimizer turns a state and a raw gradient into the next state."""

    kind: OptimizerKind
    groups: tuple[Group, ...]
    clip: float | None = None  # largest norm of the raw gradient; None: not clipped

    @property
    def has_moments(self) -> bool:
        """Whether a step depends on the gradients of earlier ones; plain SGD's does not."""
        return self.kind != "sgd" or all(group.beta1 > 0 for group in self.groups)

    def fresh(self, theta: Tensor) -> State:
        """The state before the first step."""
        count = 1 if self.kind == "sgd" else 2
        return State(theta=theta, moments=tuple(torch.zeros_like(theta) for _ in range(count)), count=0)

    def seen(self, theta: Tensor, clipped: Tensor) -> Tensor:
        """The gradient as the optimizer sees it: with the L2 term, which is added after clipping."""
        if self.kind == "adamw" or all(group.decay == 0 for group in self.groups):
            return clipped
        return clipped + self.over(clipped, [group.decay for group in self.groups]) * theta

    def advance(self, state: State, g: Tensor, rates: Sequence[float]) -> State:
        """The state after a step with the gradient ``g`` of ``seen``."""
        theta, *moments = self._settings(g, state.count + 1, rates).apply((state.theta, *state.moments), g)
        return State(theta=theta, moments=tuple(moments), count=state.count + 1)

    def derivative(self, after: State, g: Tensor, rates: Sequence[float]) -> StepDerivative:
        """The derivative of the step that led to ``after``."""
        settings = self._settings(g, after.count, rates)
        return settings if isinstance(settings, SgdStep) else AdamStep(settings, g, *after.moments)

    def as_plain_sgd(self, g: Tensor, rates: Sequence[float]) -> SgdStep:
        """The step as SGD-influence sees it: the run's rates alone, without decay; an SGD run's own step as it is.

        Clipping is not part of it: the adjoint puts its derivative in for every method, which the published form lacks.
        """
        if self.kind == "sgd":
            own = self._settings(g, 1, rates)
            assert isinstance(own, SgdStep)
            return own
        return SgdStep(lr=self.over(g, rates))

    def _settings(self, like: Tensor, count: int, rates: Sequence[float]) -> Any:
        def over(name: str) -> Coefficient:
            return self.over(like, [getattr(group, name) for group in self.groups])

        lr = self.over(like, rates)
        if self.kind == "sgd":
            return SgdStep(lr=lr, momentum=over("beta1"), coupled=over("decay"))
        key = "decay" if self.kind == "adamw" else "coupled"
        options: dict[str, Any] = {key: over("decay")}
        options |= {"beta1": over("beta1"), "beta2": over("beta2"), "eps": over("eps")}
        return AdamSettings(count=count, lr=lr, **options)

    def over(self, like: Tensor, values: Sequence[float]) -> Coefficient:
        """One value per group as one number where all agree, as one per coordinate otherwise."""
        if len(set(values)) == 1:
            return float(values[0])
        return torch.cat(
            [
                torch.full((group.numel,), value, dtype=like.dtype, device=like.device)
                for group, value in zip(self.groups, values, strict=True)
            ]
        )


class Trajectory(Protocol):
    """A run from beginning to end."""

    @property
    def problem(self) -> Problem:
        """What was trained."""
        ...

    @property
    def measured(self) -> Problem:
        """The same, as losses are measured: in float32 at least, whatever the run computed in."""
        ...

    @property
    def rule(self) -> Rule:
        """How it was updated."""
        ...

    @property
    def tolerance(self) -> float:
        """How far a replay of it may be from what was recorded, relatively."""
        ...

    @property
    def num_steps(self) -> int:
        """T."""
        ...

    @property
    def boundaries(self) -> Sequence[int]:
        """Steps before which the state is known, ascending, the first 0 and the last T."""
        ...

    def step(self, index: int) -> Step:
        """The step ``index``."""
        ...

    def state(self, index: int) -> State:
        """The state before step ``index``, one of ``boundaries``."""
        ...


@dataclass(kw_only=True)
class HeldTrajectory:
    """A trajectory in memory."""

    problem: Problem
    rule: Rule
    steps: Sequence[Step]
    states: Mapping[int, State]

    @property
    def measured(self) -> Problem:
        """The problem itself: nothing here computes in 16 bits."""
        return self.problem

    @property
    def tolerance(self) -> float:
        """By the kind of its numbers."""
        return TOLERANCES[self.states[0].theta.dtype]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.steps)

    @property
    def boundaries(self) -> Sequence[int]:
        """Steps before which the state is held."""
        return sorted(self.states)

    def step(self, index: int) -> Step:
        """The step ``index``."""
        return self.steps[index]

    def state(self, index: int) -> State:
        """The state before it."""
        return self.states[index]
