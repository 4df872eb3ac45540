"""Finite removal: Adam's own nonlinearity in the removed sample, exactly, for the first W steps after it.

The first-order score has a relative error that does not vanish with the learning rate, because Adam is nonlinear in
``g_z / (B √v̂)``. So the direct change of the moments is carried exactly and Adam's true update is differenced; all that
follows from the changed parameters stays linear, in the adjoint. W = 0 is the first-order score. The kink of clipping
and renormalised removal are exact too. Needs every sample's own gradient.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidSettings
from tamis.maths.clip import clip_at
from tamis.maths.step_derivative import AdamStep
from tamis.trajectory.replay import Played

__all__ = ["Later", "SecantWindow"]


@dataclass(frozen=True, kw_only=True)
class Later:
    """A step that was swept already: its derivative, and the adjoint after it."""

    step: AdamStep
    adjoint: tuple[Float[Tensor, "V P"], ...]
    rates: tuple[float, ...]  # from which the step can be made again


class SecantWindow:
    """The last ``width`` steps of a sweep that goes backwards.

    Args:
        width: W, about ``1 / (1 - β1)`` = 10.

    Raises:
        InvalidSettings: it is below 1.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise InvalidSettings(f"the window of finite removal must be at least 1 step, got {width}")
        self.width = width
        self.later: deque[Later] = deque(maxlen=width)  # the nearest first

    def enter(self, played: Played, adjoint: tuple[Tensor, ...]) -> None:
        """The next step on the way back, with the adjoint after it; call before the adjoint moves."""
        derivative = played.derivative()
        if not isinstance(derivative, AdamStep):
            raise InvalidSettings("finite removal is about Adam's nonlinearity; an SGD run has none, leave it out")
        self.later.appendleft(Later(step=derivative, adjoint=adjoint, rates=played.step.rates))

    def scores(
        self, played: Played, grads: Float[Tensor, "n P"], weights: Float[Tensor, " n"], *, renormalise: bool = False
    ) -> Float[Tensor, "n V"]:
        """Scores of some samples of the step that entered last, from their gradients and weights."""
        removed = self._clipped_without(played, grads, weights, renormalise=renormalise)
        first, clipped = self.later[0].step, played.clip.gradient * played.clip.factor
        seen = removed + (first.g - clipped)  # by the optimizer; any L2 term stays
        s = first.settings
        dm, dv = (1 - s.beta1) * (removed - clipped), (1 - s.beta2) * (seen**2 - first.g**2)
        # Adam's updates are those of the moments as they would have been, never of m + dm and v + dv: where the sample
        # is most of a young gradient, v + dv is what rounding leaves, and its root is divided by.
        m, v = played.before.moments
        m, v = s.beta1 * m + (1 - s.beta1) * seen, s.beta2 * v + (1 - s.beta2) * seen**2
        total = -(s.lr * first.update_change(m, v)) @ self.later[0].adjoint[0].T
        for later in islice(self.later, 1, None):
            s, g = later.step.settings, later.step.g
            dm, dv = s.beta1 * dm, s.beta2 * dv
            m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g**2
            total -= (s.lr * later.step.update_change(m, v)) @ later.adjoint[0].T
        _, b, c = self.later[-1].adjoint
        return total + dm @ b.T + dv @ c.T

    @staticmethod
    def _clipped_without(played: Played, grads: Tensor, weights: Tensor, *, renormalise: bool) -> Tensor:
        w, raw = weights.to(grads)[:, None], played.clip.gradient
        without = raw - w * grads
        if renormalise:
            total = played.step.weights.to(grads).sum()
            without = without * (total / (total - w))
        factors = [clip_at(row, played.rule.clip).factor for row in without]
        return without * torch.tensor(factors, dtype=grads.dtype, device=grads.device)[:, None]
