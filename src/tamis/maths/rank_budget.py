"""How many directions each layer keeps: the same share of every layer, or more where they carry more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LayerSpectrum", "rank_for", "share_ranks"]

# On wide layers ranks are multiples that matrix units like; narrow layers would lose too much to rounding.
_MULTIPLES = ((1024, 128), (128, 8), (1, 1))


@dataclass(frozen=True, kw_only=True)
class LayerSpectrum:
    """What the allocation looks at in one layer."""

    rows: int
    columns: int
    values: npt.NDArray[np.float64]  # weighted singular values, largest first

    @property
    def per_rank(self) -> int:
        """Numbers that one more direction costs."""
        return self.rows + self.columns


def rank_for(sparsity: float, rows: int, columns: int) -> int:
    """The rank at which two factors hold ``1 - sparsity`` of the matrix's numbers: ``(1 - s) m n / (m + n)``.

    Rounded to a multiple of 128 on layers of at least 1,024 in both directions, of 8 from 128 on; to a finer multiple
    where nothing would be left. At least 1.

    >>> rank_for(0.5, 172, 64), rank_for(0.5, 64, 64), rank_for(0.5, 32, 64)
    (23, 16, 11)
    """
    exact = (1 - sparsity) * rows * columns / (rows + columns)
    smaller = min(rows, columns)
    for least, multiple in _MULTIPLES:
        rank = multiple * round(exact / multiple)
        if smaller >= least and rank:
            return min(rank, smaller)
    return 1


def share_ranks(layers: Sequence[LayerSpectrum], sparsity: float) -> list[int]:
    """As many numbers in all as ``rank_for`` spends, given where a layer's directions hold most of *its* energy.

    Greedy by (squared singular value over the layer's sum of them) per number, in steps of the layer's multiple.
    Energy is compared as a share because raw energies of layers differ by their units.
    """
    budget = sum(rank_for(sparsity, layer.rows, layer.columns) * layer.per_rank for layer in layers)
    ranks, gains = [], []
    for index, layer in enumerate(layers):
        step = _step(layer)
        squares = layer.values**2
        shares = squares / total if (total := squares.sum()) else squares
        ranks.append(1 if step == 1 else min(step, len(shares)))
        for first in range(ranks[-1], len(shares), step):
            size = min(step, len(shares) - first)
            gains.append((float(shares[first : first + size].sum()) / (size * layer.per_rank), index, first, size))
    left = budget - sum(rank * layer.per_rank for rank, layer in zip(ranks, layers, strict=True))
    full: set[int] = set()
    for _, index, first, size in sorted(gains, key=lambda gain: (-gain[0], gain[1], gain[2])):
        cost = size * layers[index].per_rank
        if index in full or cost > left:
            full.add(index)  # its later steps gain less: taking one of them would leave a gap
            continue
        assert ranks[index] == first
        ranks[index] += size
        left -= cost
    return ranks


def _step(layer: LayerSpectrum) -> int:
    smaller = min(layer.rows, layer.columns)
    return next(multiple for least, multiple in _MULTIPLES if smaller >= least)
