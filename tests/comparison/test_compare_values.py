"""A whole comparison of two tasks: its files agree, and a folder that another run takes meanwhile is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import tamis
from tamis.comparison.contenders import contenders_of
from tamis.comparison.records import Records
from tamis.errors import InvalidSettings
from tamis.progress import NoProgress
from tamis.runs import compare as verb
from tamis.runs import planted
from tiny_run import TinyRun, chat, make_run, write_rows

TASKS = ("talk", "sums")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_run(tmp_path_factory.mktemp("run"), rows=20)
    sums = [chat(f"How much is {a} plus {a + 3}?", f"{a} + {a + 3} = {2 * a + 3}.", id=f"{a}") for a in (11, 12)]
    talk = [chat(f"Say something about {a}.", "harbour meadow copper", id=a) for a in ("rain", "tea", "ink")]
    write_rows(made.pool.with_name("sums.jsonl"), sums)
    write_rows(made.pool.with_name("talk.jsonl"), talk)
    return made


def compare(run: TinyRun, out: Path, **changes: Any) -> tamis.CompareResult:
    values: dict[str, Any] = {
        "model": run.model, "pool": run.pool, "target": run.target, "out": out, "methods": ["bm25"], "budget": 4,
        "seeds": 1, "steps": 1, "lora_rank": 2, "device": "cpu",
        "eval": {task: run.pool.with_name(f"{task}.jsonl") for task in TASKS},
    }  # fmt: skip
    result = tamis.compare(**{**values, **changes})
    assert isinstance(result, tamis.CompareResult)
    return result


@pytest.fixture(scope="module")
def whole(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tamis.CompareResult:
    return compare(run, tmp_path_factory.mktemp("out") / "whole")


def test_losses_by_task_are_the_means_of_the_rows_that_are_written_down(whole: tamis.CompareResult) -> None:
    rows = pq.read_table(whole.out / "rows.parquet").to_pylist()
    task_of = {row["row"]: row["task"] for row in rows}
    assert task_of == {"rain": "talk", "tea": "talk", "ink": "talk", "11": "sums", "12": "sums"}
    for standing in whole.standings:
        for task in TASKS:
            own = [row["loss"] for row in rows if row["key"] in standing.keys and row["task"] == task]
            assert len(own) == len(standing.keys) * {"talk": 3, "sums": 2}[task]
            assert standing.by_task[task] == pytest.approx(sum(own) / len(own), rel=1e-9)
        assert standing.by_task["talk"] != pytest.approx(standing.by_task["sums"], rel=1e-4)
    kept = Records(whole.out / "records")
    for key in {row["key"] for row in rows}:
        assert tuple(row["loss"] for row in rows if row["key"] == key) == kept.read(key).row_losses


def test_the_way_attention_is_computed_makes_other_runs(run: TinyRun, whole: tamis.CompareResult) -> None:
    before = {path.name for path in (whole.out / "records").iterdir()}
    other = compare(run, whole.out, attention="eager")
    added = {path.name for path in (whole.out / "records").iterdir()} - before
    used = {f"{key}.json" for standing in other.standings for key in standing.keys}
    assert used == added and len(added) == len(before)


def claimed_meanwhile(out: Path) -> None:
    path = out / "identity.json"
    identity = json.loads(path.read_text())
    path.write_text(json.dumps({**identity, "model": "another"}))


def test_a_comparison_whose_folder_another_run_claims_meanwhile_writes_nothing(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, finished = tmp_path / "out", verb._foretell

    def last(*args: Any) -> Any:
        claimed_meanwhile(out)
        return finished(*args)

    monkeypatch.setattr(verb, "_foretell", last)
    with pytest.raises(InvalidSettings, match="was claimed by another run while this one worked"):
        compare(run, out)
    assert not any((out / name).exists() for name in ("results.csv", "verdict.json", "report.html", "manifest.json"))


def test_a_check_with_planted_rows_whose_folder_another_run_claims_meanwhile_writes_nothing(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, finished = tmp_path / "out", planted._standings

    def last(*args: Any) -> Any:
        claimed_meanwhile(out)
        return finished(*args)

    monkeypatch.setattr(planted, "_standings", last)
    with pytest.raises(InvalidSettings, match="was claimed by another run while this one worked"):
        tamis.compare(
            model=run.model, pool=run.pool, target=run.target, methods=["bm25"], planted=True, out=out, device="cpu"
        )
    assert not any((out / name).exists() for name in ("results.csv", "verdict.json", "report.html", "manifest.json"))


def test_methods_that_see_the_whole_pool_select_before_those_behind_a_shortlist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the latter find the features of their rows in the store."""
    settings = tamis.CompareSettings(
        model="m", pool=("p",), target=("t",), budgets=("10%",),
        methods=("a=bm25:3x+tracin", "tracin", "b=bm25:2x+mid-ppl", "mid-ppl", "online:tilt"),
    )  # fmt: skip
    made: list[tuple[str, str]] = []

    def selected(own: Any, text: Any, budget: str, **more: Any) -> tuple[str, str]:
        made.append((text.label, budget))
        return text.label, budget

    monkeypatch.setattr(verb, "select_rows", selected)
    chosen: Any = verb._select_all(settings, contenders_of(settings), NoProgress(), {})
    order = [label for label, _ in made]
    assert set(order[:8]) == {"tracin", "mid-ppl", "bm25", "length"} and set(order[8:]) == {"a", "b"}
    assert sorted(made) == sorted(chosen) and len(made) == 12 and all(key == value for key, value in chosen.items())
    assert list(dict.fromkeys(name for name, _ in chosen)) == ["a", "tracin", "b", "mid-ppl", "bm25", "length"]
