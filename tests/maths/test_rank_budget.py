"""Ranks from a sparsity, the same everywhere or where a layer's own energy lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.maths.rank_budget import LayerSpectrum, rank_for, share_ranks


@pytest.mark.parametrize(
    ("sparsity", "rows", "columns", "rank"),
    [
        (0.5, 172, 64, 23),
        (0.5, 64, 64, 16),
        (0.5, 32, 64, 11),
        (0.9, 2, 2, 1),
        (0.5, 576, 1536, 208),
        (0.7, 4096, 4096, 640),  # 614.4 to the next multiple of 128
        (0.97, 1024, 1024, 16),  # no multiple of 128 is left
    ],
)
def test_ranks_follow_the_rule(sparsity: float, rows: int, columns: int, rank: int) -> None:
    assert rank_for(sparsity, rows, columns) == rank


def spectrum(rows: int, columns: int, values: list[float]) -> LayerSpectrum:
    return LayerSpectrum(rows=rows, columns=columns, values=np.array(values, dtype=np.float64))


def test_shares_give_directions_to_the_layer_whose_energy_is_spread() -> None:
    # Ten numbers a direction; the budget of rank 2 each is 40. One layer has all in its first direction.
    layers = [spectrum(5, 5, [9, 0.1, 0.1, 0.1, 0.1]), spectrum(5, 5, [1, 1, 1, 1, 1])]
    assert [rank_for(0.2, 5, 5)] * 2 == [2, 2]
    assert share_ranks(layers, 0.2) == [1, 3]


def test_the_unit_of_a_layer_does_not_matter() -> None:
    layers = [spectrum(5, 5, [9, 3, 2, 1, 1]), spectrum(5, 5, [5, 4, 1, 1, 1])]
    scaled = [spectrum(5, 5, [9e6, 3e6, 2e6, 1e6, 1e6]), layers[1]]
    assert share_ranks(layers, 0.3) == share_ranks(scaled, 0.3)


@given(
    shapes=st.lists(st.tuples(st.integers(2, 200), st.integers(2, 200)), min_size=1, max_size=6),
    sparsity=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_shares_never_spend_more_than_the_rule(shapes: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    layers = [spectrum(m, n, sorted(draw.random(min(m, n)).tolist(), reverse=True)) for m, n in shapes]
    ranks = share_ranks(layers, sparsity)
    spent = sum(rank * (m + n) for rank, (m, n) in zip(ranks, shapes, strict=True))
    allowed = sum(rank_for(sparsity, m, n) * (m + n) for m, n in shapes)
    # The one direction (or step of eight) that every layer has may alone be more than a tiny budget.
    least = sum((8 if min(m, n) >= 128 else 1) * (m + n) for m, n in shapes)
    assert spent <= max(allowed, least)
    assert all(1 <= rank <= min(m, n) for rank, (m, n) in zip(ranks, shapes, strict=True))
