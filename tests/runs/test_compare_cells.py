"""The cells of a grid by hand: seeds, what they are known by, and how long ``full`` trains at equal cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tamis
from comparison_runs import contender, made_run
from tamis.comparison.cells import Price, rows_seen_in, seen_rows
from tamis.comparison.contenders import contenders_of
from tamis.model.flops import Matrix, ModelShape, TrainedMatrices
from tamis.runs.compare_grid import Grid, common_spec
from tamis.runs.compare_selections import PoolTable
from tamis.runs.compare_training import training_settings

SHAPE = ModelShape(
    name="tiny", blocks=1, hidden=4, vocabulary=10, params=0,
    matrices=(Matrix(out_features=40, in_features=80, count=1),), gradient_matrices=(), attention_width=4,
)  # fmt: skip
PRICE = Price(shape=SHAPE, trained=TrainedMatrices(body=20.0, head=0.0))
MATCHED = contender("full at bm25's cost", "equal-cost", of="bm25")


def settings(**changes: Any) -> tamis.CompareSettings:
    return tamis.CompareSettings(
        **{"model": "m", "pool": ("p",), "target": ("t",), "update_rows": 2, "steps": 4, **changes}
    )


def grid(own: tamis.CompareSettings, lengths: Any, *, chosen: Any = (0, 1, 2), tflops: float = 0.0) -> Grid:
    """A pool of rows of ``lengths``, of two sources, of which bm25 chose some."""
    array = np.array(lengths, dtype=np.int64)
    count = len(array)
    table = PoolTable(
        tokens=array,
        source=np.array(["a", "b"] * count, dtype=object)[:count],
        usable=np.ones(count, dtype=bool),
        first_of=None,
    )

    class Pool(SimpleNamespace):
        def __len__(self) -> int:
            return count

    made = SimpleNamespace(rows=np.array(chosen), tflops=tflops)
    return Grid(
        settings=own,
        contenders=contenders_of(own),
        chosen={(name, own.budget): made for name in ("bm25", "tracin", "length")},  # type: ignore[misc]
        table=table,
        pool=Pool(lengths=array, supervised=np.maximum(1, array // 2)),  # type: ignore[arg-type]
        price=PRICE,
        common=common_spec(own),
        target="the target",
    )


def by_name(own: tamis.CompareSettings) -> dict[str, Any]:
    return {one.name: one for one in contenders_of(own)}


def test_the_seeds_of_runs_begin_at_the_seed_that_was_asked_for() -> None:
    own = settings(seed=7, seeds=2, methods=("tracin", "online:tilt"))
    made = grid(own, [5] * 12)
    for name, one in by_name(own).items():
        if one.kind == "equal-cost":
            continue
        wanted = {"uniform": [7, 8, 9, 10], "untouched model": [7]}.get(name, [7, 8])
        cells = made.cells(one, own.budget)
        assert [cell.seed for cell in cells] == [cell.spec["seed"] for cell in cells] == wanted


def test_draws_of_rows_are_those_of_their_runs_seed() -> None:
    own = settings(seed=7, seeds=2, budget="6")
    made = grid(own, [5] * 40)
    contenders = by_name(own)
    for cell in made.cells(contenders["uniform"], "6"):
        assert cell.rows is not None
        assert cell.rows.tolist() == made.table.uniform("6", seed=cell.seed).tolist() and len(cell.rows) == 6
    drawn = made.cells(contenders["random, tracin's sources"], "6")
    for cell in drawn:
        assert cell.rows is not None
        assert cell.rows.tolist() == made.table.same_sources(np.array([0, 1, 2]), seed=cell.seed).tolist()
    assert len({cell.spec["rows"] for cell in drawn}) == 2
    for name in ("tracin", "bm25"):
        assert all(
            cell.rows is not None and cell.rows.tolist() == [0, 1, 2] for cell in made.cells(contenders[name], "6")
        )
    full = made.cells(contenders["full"], "6")
    assert all(cell.rows is not None and cell.rows.tolist() == list(range(40)) for cell in full)


def own_run(made: Grid, rows: Any, *, seed: int, steps: int = 4) -> Any:
    """A run of bm25 on ``rows``, at the price that such a run has."""
    training = training_settings(made.settings, steps=1)
    seen = seen_rows(made.pool, rows_seen_in(training, np.array(rows), steps=steps, seed=seed))
    return made_run("bm25", seed, [1.0], steps=steps, tflops=PRICE.tflops(seen))


def nearest(made: Grid, tflops: float, seed: int) -> int:
    """By trying them all."""
    training, rows = training_settings(made.settings, steps=1), made.table.all_rows()

    def off(steps: int) -> float:
        seen = seen_rows(made.pool, rows_seen_in(training, rows, steps=steps, seed=seed))
        return abs(PRICE.tflops(seen) - tflops)

    return min(range(1, 60), key=off)


def test_a_free_selection_of_longer_rows_has_its_own_full_at_equal_cost() -> None:
    made = grid(settings(seeds=2), [30] * 4 + [10] * 20, chosen=(0, 1, 2, 3))
    runs = [own_run(made, (0, 1, 2, 3), seed=seed) for seed in (0, 1)]
    cells = made.matched_cells(MATCHED, "5%", runs)
    assert [cell.seed for cell in cells] == [0, 1] and all(cell.steps > 4 for cell in cells)
    assert [cell.steps for cell in cells] == [nearest(made, run.tflops, run.seed) for run in runs]
    assert all(cell.rows is not None and len(cell.rows) == 24 for cell in cells)


def test_a_free_selection_of_rows_as_long_as_all_has_plain_full_as_its_equal() -> None:
    made = grid(settings(seeds=2), [10] * 24, chosen=(0, 1, 2, 3))
    assert made.matched_cells(MATCHED, "5%", [own_run(made, (0, 1, 2, 3), seed=seed) for seed in (0, 1)]) == []


def test_a_selection_that_costs_an_update_or_more_is_matched_by_as_many_more() -> None:
    dear = grid(settings(seeds=1), [10] * 24)
    run = own_run(dear, (0, 1, 2, 3), seed=0)
    dear = grid(settings(seeds=1), [10] * 24, tflops=0.76 * run.tflops)  # three updates of the four
    (cell,) = dear.matched_cells(MATCHED, "5%", [run])
    assert cell.steps == 7
    online = contender("full at online:tilt's cost", "equal-cost", of="online:tilt")  # its selection is in the run
    assert dear.matched_cells(online, "5%", [run]) == []


def test_updates_at_equal_cost_follow_the_order_of_rows_of_the_runs_own_seed() -> None:
    lengths = [4] * 11 + [200]
    made = grid(settings(seeds=6), lengths, chosen=(0, 1, 2, 3))
    price = PRICE.tflops(seen_rows(made.pool, np.array([0, 11])))  # an update with the long row
    runs = [made_run("bm25", seed, [1.0], steps=2, tflops=price) for seed in range(6)]
    steps = [cell.steps for cell in made.matched_cells(MATCHED, "5%", runs)]
    assert steps == [nearest(made, price, seed) for seed in range(6)]
    assert len(set(steps)) > 2, "the long row comes early at some seeds, late at others"


def key(name: str = "tracin", **changes: Any) -> str:
    own = settings(methods=("tracin", "online:tilt"), **changes)
    return grid(own, [5] * 40).cells(by_name(own)[name], own.budget)[0].key


@pytest.mark.parametrize(
    "change",
    [
        {"lora_rank": 3},
        {"lora_alpha": 3.0},
        {"lora_targets": ("q_proj",)},
        {"tune": "full"},
        {"learning_rate": 1e-3},
        {"weight_decay": 0.1},
        {"clip": 0.5},
        {"warmup_share": 0.2},
        {"update_rows": 3},
        {"metric": "exact-match"},
        {"steps": 5},
        {"seed": 1},
    ],
)
def test_a_setting_that_changes_a_run_changes_what_every_run_is_known_by(change: dict[str, Any]) -> None:
    for name in ("tracin", "online:tilt", "full"):
        assert key(name) != key(name, **change)
        assert key(name, **change) == key(name, **change)


def test_what_is_asked_of_answers_counts_where_answers_are_written() -> None:
    asked = {"metric": "exact-match"}
    assert len({key(**asked), key(**asked, answer_tokens=9), key(**asked, answer_pattern="x")}) == 3
    assert key() == key(answer_tokens=9), "no answer is written, so how many tokens it may have changes nothing"


@pytest.mark.parametrize("change", [{"drop_leaks": True}, {"oversample": 6}, {"set": {"online:tilt.cold_start": 5}}])
def test_what_only_online_runs_read_changes_what_they_are_known_by_alone(change: dict[str, Any]) -> None:
    assert key("online:tilt") != key("online:tilt", **change)
    assert key("tracin") == key("tracin", **change)


@pytest.mark.parametrize("change", [{"save_steps": 7}, {"batch_tokens": 300}, {"seeds": 3}])
def test_what_changes_no_number_keeps_the_runs(change: dict[str, Any]) -> None:
    assert key() == key(**change) and key("online:tilt") == key("online:tilt", **change)
