"""Runs are shared out over the ranks so that each is made once, whatever any of them was told first."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from comparison_runs import contender
from tamis.comparison.cells import Cell, make_cell
from tamis.runs.compare_grid import share_out


def cell(number: int, kind: Any, steps: int) -> Cell:
    one = contender(f"{kind}-{number}", kind)
    return make_cell(one, budget="5%", seed=number, steps=steps, rows=np.arange(3), common={})


CELLS = st.lists(st.tuples(st.sampled_from(["selected", "uniform", "online"]), st.integers(1, 9)), max_size=14)


@given(kinds=CELLS, ranks=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_run_is_made_by_one_rank_or_by_all_together(kinds: list[tuple[str, int]], ranks: int, seed: int) -> None:
    cells = [cell(number, kind, steps) for number, (kind, steps) in enumerate(kinds)]
    shares = []
    for rank in range(ranks):
        told = list(cells)
        random.Random(seed + rank).shuffle(told)
        shares.append(share_out(told, rank=rank, ranks=ranks))
    together = {tuple(c.key for c in share[0]) for share in shares}
    assert together == {tuple(sorted(c.key for c in cells if c.contender.kind == "online"))}
    alone = [c.key for share in shares for c in share[1]]
    assert sorted(alone) == sorted(c.key for c in cells if c.contender.kind != "online")
    sizes = [len(share[1]) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all([c.steps for c in share[1]] == sorted((c.steps for c in share[1]), reverse=True) for share in shares)
