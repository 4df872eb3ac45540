"""Gradient clipping by norm and its exact derivative, which removes the radial part of every change of a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CLIP_DELTA", "Clip", "clip_at", "clip_factor", "clip_factors"]

CLIP_DELTA = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True, kw_only=True)
class Clip:
    """``clip(ḡ) = κ ḡ`` with ``κ = min(1, τ / (n + δ))`` at one raw gradient; n is its norm over all coordinates."""

    factor: float  # κ
    norm: float  # n
    gradient: Float[Tensor, " P"]  # ḡ, raw

    @property
    def is_active(self) -> bool:
        """Whether the gradient was shortened."""
        return self.factor < 1.0

    def jacobian(self, vector: Float[Tensor, "*V P"]) -> Float[Tensor, "*V P"]:
        """``J x`` with ``J = κ (I - ḡ ḡᵀ / (n (n + δ)))`` where clipping was active and ``J = I`` otherwise; symmetric.

        Always of whole vectors: a mask is laid on the result.
        """
        if not self.is_active:
            return vector
        aligned = (vector @ self.gradient)[..., None] / (self.norm * (self.norm + CLIP_DELTA))
        return self.factor * (vector - self.gradient * aligned)

    def curvature(self, vector: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """``½ ∇² clip[x, x]``: the second order of clipping along ``x``; zero where it was not active."""
        if not self.is_active:
            return torch.zeros_like(vector)
        s = self.norm + CLIP_DELTA
        first = (vector @ self.gradient) / self.norm  # dn
        second = (vector @ vector - first**2) / self.norm  # d²n
        return self.factor * s * (self.gradient * (first**2 / s**3 - second / (2 * s**2)) - vector * (first / s**2))


def clip_at(gradient: Float[Tensor, " P"], most: float | None) -> Clip:
    """What clipping to the norm ``most`` does to ``gradient``; None or 0: nothing."""
    norm = float(torch.linalg.vector_norm(gradient.double()))
    factor = min(1.0, most / (norm + CLIP_DELTA)) if most else 1.0
    return Clip(factor=factor, norm=norm, gradient=gradient)


def clip_factor(gradient: Mapping[str, Tensor], most: float | None) -> float:
    """What clipping to the norm ``most`` (None or 0: no clipping) will multiply a gradient by, given by parameter."""
    if not most:
        return 1.0
    norm = torch.stack([grad.double().square().sum().cpu() for grad in gradient.values()]).sum().sqrt()
    return float(clip_factors(norm, most))


def clip_factors(norms: Float[Tensor, "*B"], most: float) -> Float[Tensor, "*B"]:
    """The same for gradients of these norms."""
    return (most / (norms + CLIP_DELTA)).clamp(max=1.0)
