"""Subsampled randomized Hadamard transform: as accurate as dense signs, at a cost that hardly depends on the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tamis.maths.hadamard import fwht
from tamis.projection.layout import total_numel
from tamis.seeds import child_seed, random_signs, random_subset
from tamis.types import LayerSpec

__all__ = ["HadamardProjector"]

_ALGORITHM = "hadamard-v1"

# Entries transformed together: small vectors share the passes over memory, large ones go one by one.
_CHUNK_NUMBERS = 1 << 20

# Coordinates per stratum of the pre-mask; part of the algorithm.
_STRATUM = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Transform:
    """What a dimension and a seed determine. ``mask`` and its ``scale`` apply only above ``max_elements``."""

    padded: int  # N
    signs: Tensor  # (d,) int8
    rows: Tensor  # (K,) int64, which of the N outputs are kept, ascending
    mask: Tensor | None  # (d,) int64, coordinates that are kept before the transform
    mask_scale: Tensor | None  # (d,) float64, 1 / sqrt(probability of being kept)


class HadamardProjector:
    """``y = (1/√K) (H D x_pad)[idx]`` of the whole gradient ``x``, as a vector of ``d`` entries.

    ``H`` is the ±1 Sylvester matrix of size ``N = 2^⌈log2 d⌉``, ``D`` random signs on the ``d`` entries, ``idx`` a set
    of ``K`` of all ``N`` outputs without replacement. Then ``E <y, y'> = <x, x'>`` exactly: with ``H`` normalised by
    1/√N the factor is √(N/K), and √(d/K) would shrink every product by d/N. Two-sided forms ``H_m X H_n`` are this
    same transform of the flattened matrix. Signs and ``idx`` depend on the seed, ``d`` and ``K`` only.

    With ``dim >= N`` all outputs are kept: the features are a rotation of the gradients, and products are exact.

    Above ``max_elements`` entries, that many are taken first, a fixed number at random out of every 2^20 consecutive
    ones, each divided by the root of its probability, so that products stay unbiased.

    Args:
        dim: numbers per sample, K.
        seed: root seed.
        max_elements: longest vector transformed, a power of two.
    """

    def __init__(self, *, dim: int, seed: int, max_elements: int = 2**30) -> None:
        if max_elements < 1 or max_elements & (max_elements - 1):
            raise ValueError(f"max_elements must be a power of two, got {max_elements}")
        self.dim = dim
        self.seed = seed
        self.max_elements = max_elements
        self._transforms: dict[tuple[int, torch.device], _Transform] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the space, together with the number of gradient entries."""
        return {"algorithm": _ALGORITHM, "dim": self.dim, "seed": self.seed, "max_elements": self.max_elements}

    def output_dim(self, layers: Sequence[LayerSpec]) -> int:
        """Numbers per sample: ``dim``, or N if that is less."""
        return min(self.dim, self._padded(total_numel(layers)))

    def project(self, grads: Float[Tensor, "B P"]) -> Float[Tensor, "B K"]:
        """Features of whole gradients; takes about two vectors of N numbers of memory besides input and output.

        float32 for half-precision and float32 gradients, float64 for float64. Zero gradients give zero features.
        """
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        transform = self._transform(grads.shape[1], grads.device)
        kept = len(transform.signs)
        out = torch.empty(grads.shape[0], len(transform.rows), dtype=dtype, device=grads.device)
        chunk = max(1, _CHUNK_NUMBERS // transform.padded)
        for start in range(0, grads.shape[0], chunk):
            part = grads[start : start + chunk]
            x = torch.zeros(part.shape[0], transform.padded, dtype=dtype, device=grads.device)
            x[:, :kept] = part if transform.mask is None else part[:, transform.mask]
            x[:, :kept] *= transform.signs
            if transform.mask_scale is not None:
                x[:, :kept] *= transform.mask_scale.to(dtype)
            out[start : start + chunk] = fwht(x, overwrite=True)[:, transform.rows]
        return out.mul_(len(transform.rows) ** -0.5)

    def _padded(self, numel: int) -> int:
        return 1 << (min(numel, self.max_elements) - 1).bit_length() if numel else 1

    def _transform(self, numel: int, device: torch.device) -> _Transform:
        key = (numel, device)
        if key not in self._transforms:
            padded = self._padded(numel)
            outputs = min(self.dim, padded)
            mask, scale = self._pre_mask(numel) if numel > self.max_elements else (None, None)
            signs = random_signs(child_seed(self.seed, _ALGORITHM, "signs", numel), min(numel, self.max_elements))
            rows = random_subset(child_seed(self.seed, _ALGORITHM, "rows", numel, self.dim), padded, outputs)
            self._transforms[key] = _Transform(
                padded=padded,
                signs=torch.from_numpy(signs).to(device),
                rows=torch.from_numpy(rows).to(device),
                mask=None if mask is None else mask.to(device),
                mask_scale=None if scale is None else scale.to(device),
            )
        return self._transforms[key]

    def _pre_mask(self, numel: int) -> tuple[Tensor, Tensor]:
        """``max_elements`` coordinates out of ``numel``, spread evenly over strata, and their scales."""
        coordinates, scales = [], []
        for index, start in enumerate(range(0, numel, _STRATUM)):
            size = min(_STRATUM, numel - start)
            # Cumulative rounding: the quotas of all strata add up to max_elements exactly.
            quota = (start + size) * self.max_elements // numel - start * self.max_elements // numel
            seed = child_seed(self.seed, _ALGORITHM, "mask", numel, index)
            coordinates.append(random_subset(seed, size, quota) + start)
            scales.append(np.full(quota, (size / quota) ** 0.5 if quota else 1.0))
        return torch.from_numpy(np.concatenate(coordinates)), torch.from_numpy(np.concatenate(scales))
