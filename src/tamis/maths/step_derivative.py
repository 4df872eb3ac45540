"""One optimizer step as a map of its state, and the derivative of that map: AdamW, Adam with L2 decay, SGD.

A state is ``(θ, m, v)`` for Adam and ``(θ, m)`` for SGD, all flat. Everything is coordinate-wise, so every setting is a
number or one number per coordinate (parameter groups). The gradient's own dependence on θ (the Hessian) and clipping
are left to the caller: what is here is the derivative in the state at a fixed gradient, ``A⁰``, and in the gradient the
optimizer saw, ``K``. Derived for *How Faithful Is Trajectory-Based Data Attribution?* (equations 7 to 11 there), with ε
outside the root and the optimizer's own counter, as in torch.optim.AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["AdamSettings", "AdamStep", "Coefficient", "SgdStep", "StepDerivative"]

Coefficient = float | Tensor  # the same for all coordinates, or one for each

# Where the root of the second moment is below this share of ε, the update is m̂/ε and does not depend on v.
_LEAST_ROOT = 1e-4


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """The settings of one step of Adam, each a number or one per coordinate."""

    count: int  # the optimizer's own: steps taken, this one included
    lr: Coefficient
    beta1: Coefficient
    beta2: Coefficient
    eps: Coefficient
    decay: Coefficient = 0.0  # λ of decoupled decay
    coupled: Coefficient = 0.0  # λ of Adam's L2 term, which is part of the gradient

    @property
    def c1(self) -> Coefficient:
        """Bias correction of the first moment after the step."""
        return 1 / (1 - self.beta1**self.count)

    @property
    def c2(self) -> Coefficient:
        """Bias correction of the second moment after the step."""
        return 1 / (1 - self.beta2**self.count)

    def apply(self, state: tuple[Tensor, ...], g: Float[Tensor, " P"]) -> tuple[Tensor, ...]:
        """``(θ, m, v)`` after the step, ``g`` being all that the optimizer saw, an L2 term included.

        In PyTorch's order: the decay first, then the update, roots before their correction.
        """
        theta, m, v = state
        m = m + (1 - self.beta1) * (g - m)
        v = self.beta2 * v + (1 - self.beta2) * g * g
        root = v.sqrt() * (self.c2**0.5) + self.eps
        return theta * (1 - self.lr * self.decay) - (self.lr * self.c1) * (m / root), m, v


class AdamStep:
    """The derivative of one step of Adam, at its gradient ``g`` and its moments after the step, ``m`` and ``v``."""

    def __init__(
        self, settings: AdamSettings, g: Float[Tensor, " P"], m: Float[Tensor, " P"], v: Float[Tensor, " P"]
    ) -> None:
        self.settings, self.g, self.m, self.v = settings, g, m, v
        self.m_hat = settings.c1 * m
        self.root = (settings.c2 * v).clamp_min(0).sqrt()  # √v̂
        self.d = 1 / (self.root + settings.eps)
        # 0/0 at a coordinate that was never touched. Multiplied in this order, because D² alone can overflow.
        e = self.m_hat * self.d * self.d / (2 * self.root)
        self.live = self.root >= _LEAST_ROOT * settings.eps  # elsewhere v does not matter
        self.e = torch.where(self.live, e, torch.zeros_like(e))
        self.k_theta = self._k_theta()

    def at(self, places: Tensor) -> AdamStep:
        """The same for some coordinates only."""
        s = self.settings
        vectors = {f.name: getattr(s, f.name) for f in fields(s)}
        own: dict[str, Any] = {k: value[places] for k, value in vectors.items() if isinstance(value, Tensor)}
        return AdamStep(replace(s, **own), self.g[places], self.m[places], self.v[places])

    def advanced(self, *, count: int, lr: Coefficient) -> AdamStep:
        """The same standing for a later step: bias corrections and rate move on, D, E and the gradient do not."""
        found = AdamStep(self.settings, self.g, self.m, self.v)
        found.settings = replace(self.settings, count=count, lr=lr)
        found.k_theta = found._k_theta()
        return found

    def _k_theta(self) -> Tensor:
        s = self.settings
        if s.count == 1:
            # Fresh moments: m̂ = g, v̂ = g², a sign step. The two terms below cancel to this, and in float32 to noise.
            return -s.lr * s.eps / (self.g.abs() + s.eps) ** 2
        return -s.lr * (s.c1 * (1 - s.beta1) * self.d - 2 * s.c2 * (1 - s.beta2) * self.e * self.g)

    def inject(self, adjoint: tuple[Tensor, ...]) -> Float[Tensor, "*V P"]:
        """``Kᵀ (a, b, c)``: derivative of the final value in the gradient that the optimizer saw."""
        a, b, c = adjoint
        return self.k_theta * a + (1 - self.settings.beta1) * b + 2 * (1 - self.settings.beta2) * self.g * c

    def back(self, adjoint: tuple[Tensor, ...], curvature: Tensor | float) -> tuple[Tensor, ...]:
        """``Aᵀ (a, b, c)``, the adjoint before the step; ``curvature`` is ``H J Kᵀ (a, b, c)``."""
        a, b, c = adjoint
        s = self.settings
        before = (1 - s.lr * s.decay) * a + curvature
        if _is_set(s.coupled):
            before = before + s.coupled * self.inject(adjoint)
        return before, s.beta1 * (b - s.lr * s.c1 * self.d * a), s.beta2 * (c + s.lr * s.c2 * self.e * a)

    def push(self, change: tuple[Tensor, ...], g_change: Tensor) -> tuple[Tensor, ...]:
        """``A⁰ (θ', m', v') + K g'``: the change of the state after the step."""
        theta, m, v = change
        s = self.settings
        if _is_set(s.coupled):
            g_change = g_change + s.coupled * theta
        carried = s.c1 * s.beta1 * self.d * m - s.c2 * s.beta2 * self.e * v
        return (
            (1 - s.lr * s.decay) * theta - s.lr * carried + self.k_theta * g_change,
            s.beta1 * m + (1 - s.beta1) * g_change,
            s.beta2 * v + 2 * (1 - s.beta2) * self.g * g_change,
        )

    def update_change(self, m: Float[Tensor, "*B P"], v: Float[Tensor, "*B P"]) -> Float[Tensor, "*B P"]:
        """``u(m, v)`` less the step's own: what other moments after the step would have changed in Adam's update."""
        s = self.settings
        return s.c1 * m / ((s.c2 * v).sqrt() + s.eps) - self.m_hat * self.d


@dataclass(frozen=True, kw_only=True)
class SgdStep:
    """The derivative of ``m ← μ m + g``, ``θ ← (1 - ηλ) θ - η m``; with ``μ = 0`` the momentum carries nothing.

    ``coupled`` is the λ of an L2 term that is part of ``g``, as torch.optim.SGD has it.
    """

    lr: Coefficient
    momentum: Coefficient = 0.0
    decay: Coefficient = 0.0
    coupled: Coefficient = 0.0

    def apply(self, state: tuple[Tensor, ...], g: Float[Tensor, " P"]) -> tuple[Tensor, ...]:
        """``(θ, m)`` after the step, ``g`` being all that the optimizer saw, an L2 term included."""
        theta, m = state
        m = self.momentum * m + g
        return theta * (1 - self.lr * self.decay) - self.lr * m, m

    def inject(self, adjoint: tuple[Tensor, ...]) -> Float[Tensor, "*V P"]:
        """``Kᵀ (a, b)``."""
        a, b = adjoint
        return b - self.lr * a

    def back(self, adjoint: tuple[Tensor, ...], curvature: Tensor | float) -> tuple[Tensor, ...]:
        """``Aᵀ (a, b)``."""
        a, b = adjoint
        before = (1 - self.lr * self.decay) * a + curvature
        if _is_set(self.coupled):
            before = before + self.coupled * self.inject(adjoint)
        return before, self.momentum * (b - self.lr * a)

    def push(self, change: tuple[Tensor, ...], g_change: Tensor) -> tuple[Tensor, ...]:
        """``A⁰ (θ', m') + K g'``."""
        theta, m = change
        after = self.momentum * m + g_change + self.coupled * theta
        return (1 - self.lr * self.decay) * theta - self.lr * after, after


StepDerivative = AdamStep | SgdStep


def _is_set(coupled: Coefficient) -> bool:
    return isinstance(coupled, Tensor) or coupled != 0
