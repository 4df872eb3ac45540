"""Draws that no method makes keep the rules of selections, and a selection costs all of its stages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tamis
from planted_reports import table
from tamis.progress import NoProgress
from tamis.runs.compare_selections import PoolTable, select_rows
from tamis.settings.compare import method_parts
from tiny_run import make_run

SOURCES = ["a", "a", "a", "a", "b", "b", "b", "b", "b", "c"]
COPIES = np.array([-1, 0, -1, -1, -1, 2, -1, -1, -1, -1])  # 1 copies 0, and 5 copies 2
LEAK, EMPTY = 7, 3


def settings(**changes: Any) -> tamis.CompareSettings:
    return tamis.CompareSettings(**{"model": "m", "pool": ("p",), "target": ("t",), **changes})


def pool(**changes: Any) -> PoolTable:
    """Ten rows: two exact copies, one leak, one row with nothing to learn, one near copy of another kind."""
    made = table(
        10,
        source=SOURCES,
        tokens=np.arange(10, 20),
        supervised_tokens=np.where(np.arange(10) == EMPTY, 0, 5),
        leaked=np.arange(10) == LEAK,
        duplicate_of=COPIES,
        near_duplicate_of=np.where(np.arange(10) == 8, 6, COPIES),
    )
    return PoolTable.of(made, settings(**changes))


def test_all_rows_lack_leaks_only_where_leaks_are_dropped_and_never_have_rows_with_nothing_to_learn() -> None:
    assert pool(drop_leaks=True).all_rows().tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert pool().all_rows().tolist() == [0, 1, 2, 4, 5, 6, LEAK, 8, 9]
    np.testing.assert_array_equal(pool().tokens, np.arange(10, 20))


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, [{0, 1}, {2, 5}, {4}, {6}, {7}, {8}, {9}]),
        ({"drop_leaks": True}, [{0, 1}, {2, 5}, {4}, {6}, {8}, {9}]),
        ({"duplicates": "near"}, [{0, 1}, {2, 5}, {4}, {6, 8}, {7}, {9}]),
        ({"duplicates": "keep"}, [{row} for row in (0, 1, 2, 4, 5, 6, 7, 8, 9)]),
    ],
)
def test_a_uniform_draw_of_all_there_is_has_one_of_every_copy(changes: Any, alike: list[set[int]]) -> None:
    drawn = pool(**changes).uniform(str(len(alike)), seed=0).tolist()
    assert drawn == sorted(drawn)
    assert sorted(next(i for i, group in enumerate(alike) if row in group) for row in drawn) == list(range(len(alike)))


def test_uniform_draws_differ_by_seed_and_every_row_is_as_likely() -> None:
    own = pool(drop_leaks=True, duplicates="keep")
    drawn = [own.uniform("2", seed=seed).tolist() for seed in range(400)]
    assert drawn[0] == own.uniform("2", seed=0).tolist() and all(len(rows) == 2 for rows in drawn)
    times = Counter(row for rows in drawn for row in rows)
    assert set(times) == set(own.all_rows().tolist())
    assert max(abs(count - 100) for count in times.values()) < 40, (
        "800 draws from 8 rows: over four standard deviations"
    )


def test_a_draw_from_the_chosen_sources_has_as_many_rows_of_each_and_no_copy_and_no_leak() -> None:
    own = pool(drop_leaks=True)
    chosen = np.array([0, 2, 4, 6])  # two of a, two of b
    drawn = [own.same_sources(chosen, seed=seed) for seed in range(60)]
    for rows in drawn:
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert Counter(own.source[rows]) == Counter(own.source[chosen]) == {"a": 2, "b": 2}
    assert {int(row) for rows in drawn for row in rows} == {0, 2, 4, 6, 8}
    kept = pool(duplicates="keep")
    again = {int(row) for seed in range(60) for row in kept.same_sources(np.array([0, 1, 9]), seed=seed)}
    assert again == {0, 1, 2, 9}, "copies that are kept may be drawn"


def test_a_draw_finds_the_copies_that_a_source_has_of_another_ones_rows_and_no_text_twice() -> None:
    source = np.array(["a"] * 3 + ["b"] * 3, dtype=object)
    own = PoolTable(
        tokens=np.full(6, 5), source=source, usable=np.ones(6, dtype=np.bool_), first_of=np.array([0, 1, 2, 0, 1, 5])
    )
    for seed in range(20):
        assert own.same_sources(np.array([3, 4, 5]), seed=seed).tolist() == [3, 4, 5]
        mixed = own.same_sources(np.array([0, 1, 3, 5]), seed=seed)
        assert len(mixed) == len({*own.first_of[mixed]}) and Counter(source[mixed])["a"] == 2  # type: ignore[index]
    without = PoolTable(**{**vars(own), "usable": np.array([False] * 3 + [True] * 3)})
    assert without.same_sources(np.array([3, 4]), seed=0).size == 2, "also where the first of the copies is left out"


def test_a_selection_costs_the_sum_of_its_stages(tmp_path: Path) -> None:
    """With ``less``: a warm-up, gradients of the target and directions of the pool."""
    run = make_run(tmp_path / "run", rows=20)
    own = settings(
        model=str(run.model), pool=(str(run.pool),), target=(str(run.target),), out=str(tmp_path / "out"),
        methods=("less",), set={"less.warmup_epochs": 1, "less.projection_dim": 4}, budget="4", device="cpu",
    )  # fmt: skip
    chosen = select_rows(own, method_parts("less"), "4", progress=NoProgress(), held={})
    manifest = json.loads((chosen.folder / "manifest.json").read_text())
    spent = {stage["name"]: stage["tflops"] for stage in manifest["cost"]["stages"] if stage["tflops"]}
    assert len(spent) >= 3 and len(chosen.rows) == 4
    assert chosen.tflops == pytest.approx(sum(spent.values()), rel=1e-9) and chosen.tflops > 1.1 * max(spent.values())
    assert chosen.seconds == pytest.approx(sum(stage["seconds"] for stage in manifest["cost"]["stages"]), rel=0.01)


@pytest.mark.parametrize("name", ["manifest.json", "scores.parquet", "selected.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_selection_is_said_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    run = make_run(tmp_path / "run", rows=20)
    own = settings(
        model=str(run.model), pool=(str(run.pool),), target=(str(run.target),), out=str(tmp_path / "out"),
        methods=("bm25",), budget="4", device="cpu",
    )  # fmt: skip
    before = select_rows(own, method_parts("bm25"), "4", progress=NoProgress(), held={})
    path = before.folder / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[:middle] + (b"" if damage == "cut" else bytes([content[middle] ^ 255]) + content[middle + 1 :])
        )
    again = select_rows(own, method_parts("bm25"), "4", progress=NoProgress(), held={})
    assert np.array_equal(again.rows, before.rows) and again.table.equals(before.table)
    assert path.is_file() and (name == "manifest.json" or path.read_bytes() == content)
    assert (f"{path} is damaged" in caplog.text) == ((name, damage) != ("manifest.json", "gone"))
