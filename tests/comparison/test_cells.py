"""Equal updates and equal cost: what is counted, and how many updates a cost buys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.comparison.cells import Price, make_cell, rows_seen_in, seen_rows, updates_at_cost, updates_for
from tamis.comparison.contenders import Contender
from tamis.errors import InvalidSettings
from tamis.model.flops import Matrix, ModelShape, TrainedMatrices
from tamis.training.loop import TrainSettings

SHAPE = ModelShape(
    name="tiny", blocks=1, hidden=4, vocabulary=10, params=0,
    matrices=(Matrix(out_features=4, in_features=8, count=1),),
    gradient_matrices=(Matrix(out_features=4, in_features=8, count=1),), attention_width=4,
)  # fmt: skip
PRICE = Price(shape=SHAPE, trained=TrainedMatrices(body=0.0, head=0.0))


def corpus(lengths: list[int]) -> Any:
    array = np.array(lengths, dtype=np.int64)
    return SimpleNamespace(lengths=array, supervised=np.maximum(1, array // 2))


def test_updates_are_passes_over_the_budget() -> None:
    sizes = {"rows": 1000, "tokens": 90_000, "update_rows": 8}
    assert updates_for("5%", epochs=2, **sizes) == 2 * 7  # 50 rows in updates of 8
    assert updates_for("40", epochs=1, **sizes) == 5
    assert updates_for("3600-tokens", epochs=1, **sizes) == 5  # as many as 40 rows of 90 tokens


def test_a_budget_above_the_pool_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="pool has 10"):
        updates_for("11", rows=10, tokens=100, epochs=1, update_rows=4)


def test_cost_of_training_by_hand() -> None:
    # One row of 3 tokens, one of them supervised: blocks 2*32*3, attention 4*4*9, head 2*4*10*1; backward the same but
    # for attention, which counts twice.
    seen = seen_rows(corpus([3]), np.array([0]))
    assert (seen.rows, seen.tokens, seen.squared_tokens, seen.supervised_tokens) == (1, 3, 9, 1)
    forward = 2 * 32 * 3 + 4 * 4 * 9 + 2 * 4 * 10 * 1
    backward = 2 * 32 * 3 + 4 * 4 * 18 + 2 * 4 * 10 * 1
    nothing, adapter = TrainedMatrices(body=0.0, head=0.0), TrainedMatrices(body=5.0, head=0.0)
    everything = TrainedMatrices(body=32.0, head=40.0)  # the head's gradient is formed at one of three tokens
    for trained, products in ((nothing, 0), (adapter, 2 * 5 * 3), (everything, 2 * 32 * 3 + 2 * 40 * 1)):
        wanted = (forward + backward + products) / 1e12
        assert Price(shape=SHAPE, trained=trained).tflops(seen) == pytest.approx(wanted, rel=1e-12)


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12),
    update_rows=st.integers(1, 5),
    times=st.floats(0, 6),
    seed=st.integers(0, 99),
)
def test_updates_at_cost_are_the_nearest_of_all(lengths: list[int], update_rows: int, times: float, seed: int) -> None:
    pool, rows = corpus(lengths), np.arange(len(lengths))
    settings, price = TrainSettings(steps=1, update_rows=update_rows), PRICE
    wanted = times * price.tflops(seen_rows(pool, rows))
    found = updates_at_cost(wanted, price, pool, rows, settings, seed=seed)

    def off(steps: int) -> float:
        own = rows_seen_in(settings, rows, steps=steps, seed=seed)
        return abs(price.tflops(seen_rows(pool, own)) - wanted)

    most = 8 * -(-len(lengths) // update_rows)
    assert found >= 1
    assert off(found) <= min(off(steps) for steps in range(1, most)) + 1e-18  # nearest, up to rounding of tiny sums


def cell(kind: Any, name: str, **changes: Any) -> str:
    values = {"budget": "5%", "seed": 0, "steps": 4, "rows": np.arange(3), "common": {"model": "m"}, **changes}
    return make_cell(Contender(name=name, kind=kind, is_baseline=True), **values).key


def test_a_run_is_known_by_what_determines_it() -> None:
    assert cell("selected", "bm25") == cell("selected", "bm25")
    others = [{"seed": 1}, {"steps": 5}, {"rows": np.arange(4)}, {"common": {"model": "n"}}, {"budget": "6%"}]
    assert len({cell("selected", "bm25"), *(cell("selected", "bm25", **change) for change in others)}) == 6


def test_full_at_equal_cost_shares_the_run_of_full_with_as_many_updates() -> None:
    assert cell("full", "full") == cell("equal-cost", "full at tracin's cost", budget="1%")
    assert cell("full", "full") != cell("equal-cost", "full at tracin's cost", steps=5)
