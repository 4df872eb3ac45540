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
    # Sixteen numbers a direction; the budget of rank 2 each is 64. One layer has all in its first direction.
    layers = [spectrum(8, 8, [9, *[0.1] * 7]), spectrum(8, 8, [1] * 8)]
    assert [rank_for(0.5, 8, 8)] * 2 == [2, 2]
    assert share_ranks(layers, 0.5) == [1, 3]


def test_no_layer_is_given_factors_as_large_as_itself() -> None:
    # Rank 4 of 8 x 8 holds all 64 numbers; the layer with its energy in one direction takes what the other cannot use.
    layers = [spectrum(8, 8, [9, *[0.1] * 7]), spectrum(8, 8, [1] * 8)]
    assert [rank_for(0.25, 8, 8)] * 2 == [3, 3]
    assert share_ranks(layers, 0.25) == [3, 3]


def test_the_unit_of_a_layer_does_not_matter() -> None:
    layers = [spectrum(5, 5, [9, 3, 2, 1, 1]), spectrum(5, 5, [5, 4, 1, 1, 1])]
    scaled = [spectrum(5, 5, [9e6, 3e6, 2e6, 1e6, 1e6]), layers[1]]
    assert share_ranks(layers, 0.3) == share_ranks(scaled, 0.3)


@given(
    shapes=st.lists(st.tuples(*[st.one_of(st.integers(2, 200), st.integers(1024, 1030))] * 2), min_size=1, max_size=5),
    sparsity=st.floats(0.05, 0.97),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_shares_never_spend_more_than_the_rule(
    shapes: list[tuple[int, int]], sparsity: float, flat: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    layers = [
        spectrum(m, n, [1.0] * min(m, n) if flat else sorted(draw.random(min(m, n)).tolist(), reverse=True))
        for m, n in shapes
    ]
    ranks = share_ranks(layers, sparsity)
    spent = sum(rank * (m + n) for rank, (m, n) in zip(ranks, shapes, strict=True))
    assert spent <= sum(rank_for(sparsity, m, n) * (m + n) for m, n in shapes)
    assert all(rank == 1 or rank * (m + n) < m * n for rank, (m, n) in zip(ranks, shapes, strict=True))
    assert all(1 <= rank <= min(m, n) for rank, (m, n) in zip(ranks, shapes, strict=True))
