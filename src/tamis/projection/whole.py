"""Project gradients that exist in full, whatever the projection: Adam directions, mean target gradients, checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import Unsupported
from tamis.projection.factorized import FactorizedProjector
from tamis.projection.layout import split_by_layer, total_numel
from tamis.protocols import LayerwiseProjector, Projector, VectorProjector
from tamis.types import LayerSpec

__all__ = ["project_gradients"]


def project_gradients(
    projector: Projector, grads: Float[Tensor, "B P"], layers: Sequence[LayerSpec]
) -> Float[Tensor, "B K"]:
    """Features of whole gradients: the layers' ``(O, I)`` matrices flattened row by row, in the order of ``layers``.

    The same numbers, up to rounding, as the projections fused with the backward pass give. float32, or float64 for
    float64 gradients.

    Raises:
        ValueError: ``grads`` has another number of entries than the layers.
        Unsupported: the projector has no way to project a gradient that exists in full.
    """
    parts = split_by_layer(grads, layers)
    if isinstance(projector, FactorizedProjector):
        return torch.cat([projector.project_gradient(layer, part) for layer, part in parts], dim=1)
    if isinstance(projector, LayerwiseProjector):
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        features = torch.zeros(grads.shape[0], projector.output_dim(layers), dtype=dtype, device=grads.device)
        for layer, part in parts:
            features += projector.project_layer(layer, part)
        return features
    if isinstance(projector, VectorProjector):
        if grads.shape[1] != total_numel(layers):
            raise ValueError(f"the layers have {total_numel(layers)} entries, the gradients {grads.shape[1]}")
        return projector.project(grads)
    raise Unsupported(f"projector {type(projector).__name__} cannot project gradients that exist in full")
