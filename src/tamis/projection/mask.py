"""A fixed subset of the gradient's coordinates: crude, but it commutes with coordinate-wise operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tamis.projection.layout import total_numel
from tamis.seeds import child_seed, random_subset
from tamis.types import LayerSpec

__all__ = ["MaskProjector"]

_ALGORITHM = "mask-v1"


class MaskProjector:
    """``x -> √(P/K) x[idx]`` with K coordinates ``idx`` drawn without replacement.

    Inner products are unbiased, but their error depends on how evenly the energy is spread: a gradient that lives in
    a few coordinates is mostly missed. With ``dim >= P`` every coordinate is kept and products are exact.

    Args:
        dim: numbers per sample, K.
        seed: root seed; ``idx`` depends on it, on P and on ``dim``.
    """

    def __init__(self, *, dim: int, seed: int) -> None:
        self.dim = dim
        self.seed = seed
        self._coordinates: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the space, together with the number of gradient entries."""
        return {"algorithm": _ALGORITHM, "dim": self.dim, "seed": self.seed}

    def output_dim(self, layers: Sequence[LayerSpec]) -> int:
        """Numbers per sample: ``dim``, or P if that is less."""
        return min(self.dim, total_numel(layers))

    def coordinates(self, numel: int, device: torch.device | str = "cpu") -> Int[Tensor, " K"]:
        """Which of ``numel`` entries are kept, ascending; made once per size and device."""
        key = (numel, torch.device(device))
        if key not in self._coordinates:
            seed = child_seed(self.seed, _ALGORITHM, numel, self.dim)
            chosen = random_subset(seed, numel, min(self.dim, numel))
            self._coordinates[key] = torch.from_numpy(chosen).to(device)
        return self._coordinates[key]

    def project(self, grads: Float[Tensor, "B P"]) -> Float[Tensor, "B K"]:
        """The kept coordinates of whole gradients, scaled; float32 at least."""
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        chosen = self.coordinates(grads.shape[1], grads.device)
        scale = (grads.shape[1] / max(len(chosen), 1)) ** 0.5
        return grads[:, chosen].to(dtype).mul_(scale)
