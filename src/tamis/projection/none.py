"""No projection: the features are the gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.projection.layout import total_numel
from tamis.types import LayerSpec

__all__ = ["NoProjector"]


class NoProjector:
    """Features are the whole gradients. For adapters and small models, where nothing needs to be saved."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the space."""
        return {"algorithm": "none-v1"}

    def output_dim(self, layers: Sequence[LayerSpec]) -> int:
        """Numbers per sample: P."""
        return total_numel(layers)

    def project(self, grads: Float[Tensor, "B P"]) -> Float[Tensor, "B P"]:
        """The gradients, in float32 at least."""
        return grads if grads.dtype == torch.float64 else grads.to(torch.float32)
