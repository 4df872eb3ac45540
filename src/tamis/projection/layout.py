"""How a whole gradient is one vector: the layers' (O, I) matrices flattened row by row, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from tamis.types import LayerSpec

__all__ = ["split_by_layer", "total_numel"]


def total_numel(layers: Sequence[LayerSpec]) -> int:
    """P, the entries of all layers' gradients."""
    return sum(layer.numel for layer in layers)


def split_by_layer(grads: Float[Tensor, "B P"], layers: Sequence[LayerSpec]) -> Iterator[tuple[LayerSpec, Tensor]]:
    """Each layer with its part of ``grads`` as ``(B, O, I)``, a view.

    Raises:
        ValueError: the layers have another number of entries than ``grads``.
    """
    if grads.shape[1] != total_numel(layers):
        raise ValueError(f"the layers have {total_numel(layers)} entries, the gradients {grads.shape[1]}")
    start = 0
    for layer in layers:
        yield layer, grads[:, start : start + layer.numel].reshape(-1, *layer.shape)
        start += layer.numel
