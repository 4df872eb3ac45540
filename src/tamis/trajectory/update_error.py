"""How wrong the first-order change of the final parameters is, sample by sample, without retraining.

The error of ``θ'_T`` is ``δ_T = θ_T(1) - θ_T(0) - θ'_T``, proposition 2 of *How Faithful Is Trajectory-Based Data
Attribution?*. ``ErrorProxy`` is element-wise and costs nothing but per-sample gradients; ``SecondOrder`` is the exact
second order ``½ d²θ_T/dε²``, with two Hessian products and one third derivative a step and sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidSettings
from tamis.gradients.functional import Problem, hessian_vector, per_sample_gradients, third_derivative
from tamis.maths.step_derivative import AdamStep
from tamis.trajectory.replay import Played, play_segment, segments
from tamis.trajectory.run import Trajectory

__all__ = ["ErrorProxy", "SecondOrder", "exact_errors"]

_NO_ADAM = "the error estimate is about Adam's nonlinearity in the removed sample; an SGD run has none"


@dataclass(kw_only=True)
class ErrorProxy:
    """``‖sum_t η_t r_t‖`` with the moments fed by the sample's own removal alone (γ = 0, and g' = 0 after its step).

    Then ``r_t = ½ u''`` is ``g'²`` times a factor that is the same for all samples of the step, and its sum over the
    steps that follow is three running vectors on the way back::

        X ← η c2 E                               + β2 X
        Y ← η c1 c2 D² / (2√v̂)                   + β1 β2 Y
        Z ← η c2² ½ m̂ (D²/(4 v̂^1.5) + D³/(2v̂))   + β2² Z
        sum_t η_t r_t = g'² (-(1-β2) X - 2(1-β1)(1-β2) g Y + 4(1-β2)² g² Z)
    """

    x: Tensor | float = 0.0
    y: Tensor | float = 0.0
    z: Tensor | float = 0.0
    _weight: Tensor | None = field(default=None, repr=False)

    def enter(self, played: Played) -> None:
        """The next step on the way back.

        Raises:
            InvalidSettings: the run was not trained by Adam.
        """
        step = played.derivative()
        if not isinstance(step, AdamStep):
            raise InvalidSettings(_NO_ADAM)
        s, cross, square = step.settings, *second_derivatives(step)
        self.x = s.lr * s.c2 * step.e + s.beta2 * self.x
        self.y = s.lr * s.c1 * s.c2 * cross + s.beta1 * s.beta2 * self.y
        self.z = s.lr * s.c2**2 * square + s.beta2**2 * self.z
        rest = 1 - s.beta2
        g = step.g.double()
        weight = -rest * self.x - 2 * (1 - s.beta1) * rest * g * self.y + 4 * rest**2 * g**2 * self.z
        self._weight = weight.to(step.g)

    def norms(self, played: Played, grads: Float[Tensor, "n P"], weights: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Of some samples of the step that entered last."""
        assert self._weight is not None
        changes = played.clip.jacobian(grads * weights.to(grads)[:, None])
        found: Tensor = torch.linalg.vector_norm(changes**2 * self._weight, dim=1)
        return found


@dataclass(kw_only=True)
class SecondOrder:
    """One sample's ``θ'`` and ``Δ = ½ d²/dε²`` of the state, forwards from the step that used it."""

    change: tuple[Tensor, ...]  # (θ', m', v')
    bend: tuple[Tensor, ...]  # the same of Δ

    @classmethod
    def start(cls, played: Played, grad: Float[Tensor, " P"], weight: float) -> SecondOrder:
        """Remove the sample from this step."""
        zero = torch.zeros_like(grad)
        found = cls(change=(zero, zero, zero), bend=(zero, zero, zero))
        found._advance(played, raw=-weight * grad, raw_bend=zero)
        return found

    def follow(self, problem: Problem, played: Played) -> None:
        """One step further."""
        step, theta = played.step, played.before.theta
        raw, raw_bend = third_derivative(problem, theta, step.micros, step.weights, self.change[0])
        if bool(self.bend[0].any()):
            raw_bend = raw_bend + hessian_vector(problem, theta, step.micros, step.weights, self.bend[0])
        self._advance(played, raw=raw, raw_bend=raw_bend)

    def _advance(self, played: Played, *, raw: Tensor, raw_bend: Tensor) -> None:
        """``raw`` and ``raw_bend``: first order and half the second order of the raw gradient in ε."""
        step = played.derivative()
        if not isinstance(step, AdamStep):
            raise InvalidSettings(_NO_ADAM)
        s, cross, square = step.settings, *second_derivatives(step)
        g_change = played.clip.jacobian(raw)
        seen = g_change + s.coupled * self.change[0]  # with the L2 term, which is linear
        bend = step.push(self.bend, played.clip.jacobian(raw_bend) + played.clip.curvature(raw))
        self.change = step.push(self.change, g_change)
        quadratic = (1 - s.beta2) * seen**2  # of v
        m_hat, v_hat = s.c1 * self.change[1], s.c2 * self.change[2]
        update = -s.c2 * step.e * quadratic - cross * m_hat * v_hat + square * v_hat.double() ** 2
        self.bend = (bend[0] - (s.lr * update).to(bend[0]), bend[1], bend[2] + quadratic)


def second_derivatives(step: AdamStep) -> tuple[Tensor, Tensor]:
    """``D²/(2√v̂)`` and ``½ m̂ (D²/(4 v̂^1.5) + D³/(2 v̂))``: mixed and pure second order of u; 0 where v never lived.

    In float64: for a young coordinate, as those of a new adapter's first factors are, they pass float32's range, though
    what they are multiplied by brings them back.
    """
    d, root, m_hat, live = step.d.double(), step.root.double(), step.m_hat.double(), step.live
    safe = torch.where(live, root, torch.ones_like(root))
    cross = torch.where(live, d * d / (2 * safe), torch.zeros_like(d))
    square = m_hat / 2 * (d * d / (4 * safe**3) + d**3 / (2 * safe**2))
    return cross, torch.where(live, square, torch.zeros_like(d))


def exact_errors(
    trajectory: Trajectory,
    uses: Sequence[tuple[int, int]],
    *,
    tolerance: float | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[float]:
    """``‖Δ_T‖`` of the samples at ``(step, place)``, carried forwards together: 6 numbers a parameter and sample."""
    live: dict[tuple[int, int], SecondOrder] = {}
    for start, stop in segments(trajectory):
        for played in play_segment(trajectory, start, stop, tolerance=tolerance):
            for sample in live.values():
                sample.follow(trajectory.problem, played)
            live |= _begin(trajectory.problem, played, [use for use in uses if use[0] == played.step.index])
            advance(1)
    return [float(torch.linalg.vector_norm(live[use].bend[0].double())) for use in uses]


def _begin(problem: Problem, played: Played, uses: Sequence[tuple[int, int]]) -> dict[tuple[int, int], SecondOrder]:
    found, first = {}, 0
    for micro in played.step.micros if uses else ():
        own = [use for use in uses if first <= use[1] < first + len(micro)]
        grads = per_sample_gradients(problem, played.before.theta, micro) if own else torch.zeros(0)
        for use in own:
            found[use] = SecondOrder.start(played, grads[use[1] - first], float(played.step.weights[use[1]]))
        first += len(micro)
    return found
