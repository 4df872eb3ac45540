"""How many directions each layer keeps: the same share of every layer, or more where they carry more."""

from __future__ import annotations

import heapq
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
    """At most the numbers that ``rank_for`` spends, given where a layer's directions hold most of *its* energy.

    Greedy by (squared singular value over the layer's sum of them) per number, in steps of the layer's multiple, from
    one step each or what ``rank_for`` gives if that is less. No step makes a layer's factors as large as the layer:
    those numbers are better spent elsewhere.
    Energy is compared as a share because raw energies of layers differ by their units.
    """
    ruled = [rank_for(sparsity, layer.rows, layer.columns) for layer in layers]
    ranks = [min(_step(layer), rank) for layer, rank in zip(layers, ruled, strict=True)]
    left = sum((rule - rank) * layer.per_rank for layer, rule, rank in zip(layers, ruled, ranks, strict=True))
    waiting = [(-gain, index) for index, layer in enumerate(layers) if (gain := _gain(layer, ranks[index]))]
    heapq.heapify(waiting)
    while waiting:  # a layer's next step enters as the one before is taken, so that none leaves a gap
        _, index = heapq.heappop(waiting)
        layer = layers[index]
        size = _next_size(layer, ranks[index])
        if size * layer.per_rank > left:
            continue
        ranks[index] += size
        left -= size * layer.per_rank
        if gain := _gain(layer, ranks[index]):
            heapq.heappush(waiting, (-gain, index))
    return ranks


def _gain(layer: LayerSpectrum, rank: int) -> float:
    """Share of the layer's energy per number that the step after ``rank`` adds; 0 where there is no such step."""
    size = _next_size(layer, rank)
    squares = layer.values**2
    added = float(squares[rank : rank + size].sum())
    return added / (float(squares.sum()) * size * layer.per_rank) if added else 0.0


def _next_size(layer: LayerSpectrum, rank: int) -> int:
    """Directions of the step after ``rank``, which ends at the last rank that still saves something."""
    most = (layer.rows * layer.columns - 1) // layer.per_rank
    most -= most % min(_step(layer), 8)
    return max(0, min(_step(layer), most - rank))


def _step(layer: LayerSpectrum) -> int:
    smaller = min(layer.rows, layer.columns)
    return next(multiple for least, multiple in _MULTIPLES if smaller >= least)
