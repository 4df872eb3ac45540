"""The verbs that look and do not select, as Python calls them: keywords, files or rows in memory, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tamis
from tamis.errors import InvalidInput, InvalidSettings
from tiny_run import TinyRun, make_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_doctor_counts_rows_in_memory_as_it_counts_their_files(tiny: TinyRun) -> None:
    chosen: dict[str, Any] = {"model": tiny.model, "numeric": False, "device": "cpu"}
    read = tamis.doctor(pool=tiny.pool, target={"sums": tiny.target}, **chosen)
    held = tamis.doctor(pool=rows_of(tiny.pool), target={"sums": rows_of(tiny.target)}, **chosen)
    assert isinstance(read, tamis.DoctorResult)
    assert read.target is not None and held.target is not None
    for one, other in ((read.pool, held.pool), (read.target, held.target)):
        assert (one.rows, one.tokens, one.exact_copies) == (other.rows, other.tokens, other.exact_copies)
    assert (read.pool.rows, read.pool.exact_copies, read.target.rows) == (60, 2, 4)  # as make_run plants them


def test_plan_costs_rows_in_memory_what_their_files_cost(tiny: TinyRun) -> None:
    chosen: dict[str, Any] = {"model": tiny.model, "budget": 0.1, "device": "cpu"}
    read = tamis.plan(pool=[tiny.pool], target=tiny.target, **chosen)
    held = tamis.plan(pool=rows_of(tiny.pool), target=rows_of(tiny.target), **chosen)
    assert isinstance(read, tamis.PlanResult)
    assert read.budget_rows == held.budget_rows == 6
    assert [each.tflops for each in read.methods] == [each.tflops for each in held.methods]
    assert max(each.tflops for each in read.methods) > 0


@pytest.mark.parametrize("verb", [tamis.doctor, tamis.plan])
def test_a_verb_that_looks_refuses_a_folder_and_names_the_nearest_setting(
    verb: Callable[..., object], tiny: TinyRun, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": tiny.model, "pool": tiny.pool}
    with pytest.raises(InvalidSettings, match=r"out: tamis.(doctor|plan) writes nothing; leave it out"):
        verb(**given, out=tmp_path / "found")
    with pytest.raises(InvalidSettings, match=r"unknown setting 'smaple'.*sample"):
        verb(**given, smaple=5)
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("name", ["", "a/b", "a=b", "c[d]"])
def test_a_target_name_that_would_be_taken_for_a_path_is_refused(name: str, tiny: TinyRun) -> None:
    with pytest.raises(InvalidSettings, match="cannot be a name"):
        tamis.doctor(model=tiny.model, pool=tiny.pool, target={name: tiny.target})
    with pytest.raises(InvalidInput, match="the name in NAME=PATH has no slash and no wildcard"):
        tamis.doctor(model=tiny.model, pool=tiny.pool, target=f"a/b={tiny.target}")


def test_methods_of_the_other_verb_are_sent_there_before_anything_is_read(tiny: TinyRun, tmp_path: Path) -> None:
    """Both have a TracIn, a Less and a Uniform."""
    given: dict[str, Any] = {"model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": tmp_path / "out"}
    with pytest.raises(InvalidSettings, match=r"baselines.TracIn chooses while training, with tamis.train; expected"):
        tamis.select(method=tamis.online.TracIn(), **given)
    with pytest.raises(InvalidSettings, match=r"TracIn scores a pool, with tamis.select; expected one such as tamis"):
        tamis.train(method=tamis.methods.TracIn(), steps=1, **given)
    with pytest.raises(InvalidSettings, match=r"expected a name or a method object such as .*, got type"):
        tamis.select(method=tamis.methods.TracIn, **given)
    assert not (tmp_path / "out").exists()


def test_what_is_no_path_is_no_path_called_none(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"pool": tiny.pool, "target": tiny.target}
    with pytest.raises(InvalidSettings, match="out: expected a text or a path, got NoneType"):
        tamis.select(model=tiny.model, out=None, **given)
    with pytest.raises(InvalidSettings, match="model: expected a text or a path, got NoneType"):
        tamis.select(model=None, **given)
    with pytest.raises(InvalidSettings, match="run: expected a text or a path, got NoneType"):
        tamis.attribute(run=None, target=tiny.target)
    assert list(tmp_path.iterdir()) == []


def test_errors_are_found_without_importing_them_by_name() -> None:
    assert issubclass(tamis.errors.InvalidInput, tamis.TamisError)


def test_progress_is_said_on_standard_error_where_it_is_asked_for(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tamis.progress._SECONDS_BETWEEN_LINES", 0.0)
    chosen: dict[str, Any] = {"model": tiny.model, "pool": tiny.pool, "target": tiny.target, "device": "cpu"}
    tamis.select(**chosen, method="bm25", out=tmp_path / "silent")
    assert "rows" not in capsys.readouterr().err
    tamis.select(**chosen, method="tracin", out=tmp_path / "said", progress=True)
    said = capsys.readouterr()
    assert "60 of 60 rows (100%)" in said.err and said.out == ""
    with pytest.raises(InvalidSettings, match="progress=1: expected True for a bar"):
        tamis.select(**chosen, out=tmp_path / "no", progress=1)
    assert not (tmp_path / "no").exists()
