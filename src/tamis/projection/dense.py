"""A dense matrix of random signs, made block by block from the seed and never kept whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tamis.seeds import child_seed, random_signs
from tamis.types import LayerSpec

__all__ = ["RademacherProjector"]

_ALGORITHM = "rademacher-v1"

# Gradient entries per block of signs. Part of the algorithm: another number would be another matrix.
_BLOCK_COLUMNS = 1024


class RademacherProjector:
    """``x -> S x / √K`` with independent ±1 entries ``S: (K, P)``; inner products are unbiased.

    The variance of ``<y, y'>`` is ``(‖x‖²‖x'‖² + <x, x'>² - 2 Σ x²x'²) / K``, the best of all projections here and the
    dearest: every batch costs ``K * P`` signs. Meant for small models, adapters and checks; larger ones take
    "hadamard", which is as accurate. Project large batches at once, since the signs are made per call.

    Args:
        dim: numbers per sample, K.
        seed: root seed; the block of a layer depends on it, on the layer's name and on ``dim``.
        cache_bytes: signs kept between calls, one byte each; the rest is made again. Changes no number.
    """

    def __init__(self, *, dim: int, seed: int, cache_bytes: int = 64 << 20) -> None:
        self.dim = dim
        self.seed = seed
        self._cache: dict[tuple[str, int, int], npt.NDArray[np.int8]] = {}
        self._cache_left = cache_bytes

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the space."""
        return {"algorithm": _ALGORITHM, "dim": self.dim, "seed": self.seed}

    def output_dim(self, layers: Sequence[LayerSpec]) -> int:
        """Numbers per sample."""
        return self.dim

    def project_layer(self, layer: LayerSpec, grads: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """The part of the features that comes from one layer; their sum over all layers, in any order, is the whole.

        Only the gradients of one layer need to exist at a time. float32, or float64 for float64 gradients.
        """
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        flat = grads.flatten(1)  # (B, O * I)
        out = torch.zeros(grads.shape[0], self.dim, dtype=dtype, device=grads.device)
        for start, signs in self._blocks(layer):
            block = flat[:, start : start + signs.shape[1]].to(dtype)
            out.addmm_(block, torch.from_numpy(signs).to(grads.device).to(dtype).T)
        return out.mul_(self.dim**-0.5)

    def _blocks(self, layer: LayerSpec) -> Iterator[tuple[int, npt.NDArray[np.int8]]]:
        """``(first entry, (K, columns) signs)`` for consecutive entries of the layer's flattened matrix."""
        for index, start in enumerate(range(0, layer.numel, _BLOCK_COLUMNS)):
            columns = min(_BLOCK_COLUMNS, layer.numel - start)
            key = (layer.name, index, columns)
            signs = self._cache.get(key)
            if signs is None:
                seed = child_seed(self.seed, _ALGORITHM, layer.name, self.dim, index)
                signs = random_signs(seed, self.dim * columns).reshape(self.dim, columns)
                if signs.nbytes <= self._cache_left:
                    self._cache[key] = signs
                    self._cache_left -= signs.nbytes
            yield start, signs
