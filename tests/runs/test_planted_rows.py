"""Which rows are planted and which are background, and what is said of methods on such a pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import tamis
from planted_reports import table
from tamis.comparison.planted import KINDS, PlantedPool, Score, plant
from tamis.corpora import Sources
from tamis.data.examples import read_examples
from tamis.errors import InvalidInput, InvalidSettings
from tamis.progress import NoProgress
from tamis.runs import planted
from tamis.runs.compare_selections import PoolTable
from tamis.runs.planted import PlantedStanding, _conclusion, _standings
from tamis.runs.planted_rows import planted_rows
from tiny_run import chat, write_rows


def settings(**changes: Any) -> tamis.CompareSettings:
    return tamis.CompareSettings(
        **{"model": "m", "pool": ("p",), "target": ("t",), "methods": ("tracin",), "planted": True, **changes}
    )


def talk(count: int, source: str = "talk") -> list[Any]:
    return [chat(f"Tell me of {source} {i}.", f"{source} {i} is fine indeed.", source=source) for i in range(count)]


def sums(numbers: Sequence[int]) -> list[Any]:
    return [chat(f"What is {i} plus one?", f"It is of course {i + 1}.") for i in numbers]


def sources(folder: Path, *pools: Sequence[Any], target: Sequence[Any]) -> Sources:
    paths = [str(write_rows(folder / f"pool-{place}.jsonl", rows)) for place, rows in enumerate(pools)]
    shown = read_examples([str(write_rows(folder / "target.jsonl", target))])
    return Sources(
        pool=read_examples(paths), target=shown, target_names=("sums",),
        target_group=np.zeros(len(shown), dtype=np.int64),
    )  # fmt: skip


def given(folder: Path, rows: Sequence[Any]) -> Any:
    return read_examples([str(write_rows(folder / "relevant.jsonl", rows))])


def texts(pool: PlantedPool, kind: str) -> set[str]:
    """The prompts of the rows of one kind."""
    return {row["messages"][0]["content"] for row, own in zip(pool.rows, pool.kinds, strict=True) if own == kind}


def prompts(rows: Sequence[Any]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def test_relevant_rows_that_the_target_shows_and_copies_of_others_are_left_out_and_counted(tmp_path: Path) -> None:
    relevant = given(tmp_path, [*sums(range(6)), *sums([2, 2, 4]), *sums([20, 21])])
    read = sources(tmp_path, talk(9), target=sums([20, 21, 22]))
    pool, targets, warnings = planted_rows(settings(), read, relevant)
    assert pool.relevant == 6 and texts(pool, "relevant") == prompts(sums(range(6)))
    assert [prompts(own) for own in targets] == [prompts(sums([20, 21, 22]))], "the target keeps all of its rows"
    assert [said for said in warnings if "left out:" in said] == [
        "2 relevant rows left out: the target has the same text, so it is no test.",
        "3 relevant rows left out: copies of other relevant rows.",
    ]


def test_distinct_relevant_rows_are_planted_without_a_word(tmp_path: Path) -> None:
    read = sources(tmp_path, talk(9), target=sums([20]))
    pool, _, warnings = planted_rows(settings(), read, given(tmp_path, sums(range(6))))
    assert pool.relevant == 6 and not any("left out" in said for said in warnings)


def test_relevant_rows_that_are_all_in_the_target_are_refused(tmp_path: Path) -> None:
    read = sources(tmp_path, talk(9), target=sums([20, 21, 22]))
    with pytest.raises(InvalidInput, match="relevant: every row is a row of the target; give other rows"):
        planted_rows(settings(), read, given(tmp_path, sums([22, 20, 20])))


@pytest.mark.parametrize("by_file", [True, False])
def test_background_has_no_row_of_the_target_and_none_that_is_planted(tmp_path: Path, by_file: bool) -> None:
    """Beside twelve rows of talk the pool holds target rows, a target prompt with another answer, and relevant rows."""
    shown, extra = sums(range(10, 18)), sums(range(4))
    prompt = chat(shown[0]["messages"][0]["content"], "I do not know.")
    leaks = [*shown[:3], prompt, *(extra if by_file else [])]
    read = sources(tmp_path, [*talk(12), *leaks], target=shown)
    pool, _, warnings = planted_rows(settings(), read, given(tmp_path, extra) if by_file else None)
    behind = texts(pool, "background") | texts(pool, "background, wrong answer")
    assert behind == prompts(talk(12))
    assert not any(said.startswith("Not in the background") for said in warnings), "leaks could be used"


def test_rows_without_turns_or_answer_are_no_background_and_counted_apart_from_leaks(tmp_path: Path) -> None:
    shown = sums(range(10, 18))
    plain = [{"text": f"The number {i} is a fine one."} for i in range(3)]
    read = sources(tmp_path, [*talk(12), *shown[:4]], plain, target=shown)
    pool, _, warnings = planted_rows(settings(), read, None)
    assert pool.counts()["background"] + pool.counts()["background, wrong answer"] == 12
    (said,) = [said for said in warnings if said.startswith("Not in the background")]
    assert said == "Not in the background, for want of turns or of an answer: 3 rows of the pool."


def test_sources_of_the_targets_kind_are_no_background_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    read = sources(tmp_path, [*talk(12), *talk(5, "sums")], target=sums(range(8)))
    pool, _, _ = planted_rows(settings(relevant_sources=("sums",)), read, None)
    assert texts(pool, "background") | texts(pool, "background, wrong answer") == prompts(talk(12))
    with pytest.raises(InvalidSettings, match="no source 'sum'"):
        planted_rows(settings(relevant_sources=("sum",)), read, None)


def test_half_of_the_target_is_held_back_and_planted(tmp_path: Path) -> None:
    shown = sums(range(9))
    pool, (kept,), _ = planted_rows(settings(), sources(tmp_path, talk(9), target=shown), None)
    assert len(kept) == 5 and pool.relevant == 4
    assert prompts(kept) | texts(pool, "relevant") == prompts(shown)


def made_pool() -> PlantedPool:
    relevant = [("sums", row) for row in sums(range(6))]
    return plant(relevant, [("talk", row) for row in talk(9)], seed=0)


def planted_table(pool: PlantedPool) -> pa.Table:
    return table(len(pool.rows), score=np.linspace(1, 0, len(pool.rows)), source=list(pool.group))


def test_blind_draws_are_those_of_the_seed_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = made_pool()
    own = settings(seed=7, duplicates="keep")
    chosen = SimpleNamespace(table=planted_table(pool), rows=np.arange(6), seconds=1.0, tflops=2.0, folder=tmp_path)
    monkeypatch.setattr(planted, "select_rows", lambda *args, **more: chosen)
    found = {s.name: s.score for s in _standings(own, pool, (tmp_path, ()), NoProgress())}
    drawn = [PoolTable.of(chosen.table, own).uniform("6", seed=seed) for seed in range(7, 11)]
    kinds = np.asarray(pool.kinds, dtype=object)
    for draw, rows in enumerate(drawn, start=1):
        assert found[f"uniform, draw {draw}"].taken == {kind: int((kinds[rows] == kind).sum()) for kind in KINDS}
    taken = [tuple(found[f"uniform, draw {draw}"].taken.values()) for draw in range(1, 5)]
    assert len(set(taken)) == 4, "draws alike could be of any seed"


def standing(name: str, found: int, *, auc: float | None = None) -> PlantedStanding:
    score = Score(
        selected=6, found=found, precision=found / 6, recall=found / 6, of_the_task=1.0, taken=dict.fromkeys(KINDS, 0),
        both_copies=0, wrong_auc=auc, source_auc=None, background_auc=None,
    )  # fmt: skip
    baseline = name == "bm25" or name.startswith("uniform")
    return PlantedStanding(name=name, is_baseline=baseline, score=score, seconds=0.0, tflops=0.0, folder="")


@pytest.mark.parametrize(
    ("auc", "said"),
    [
        (0.0, "tracin prefers wrong answers to right ones (AUC 0.00)"),
        (0.39, "tracin prefers wrong answers to right ones (AUC 0.39)"),
        (0.4, "tracin hardly tells wrong answers from right ones (AUC 0.40)"),
        (0.59, "tracin hardly tells wrong answers from right ones (AUC 0.59)"),
        (0.6, None),
        (None, None),
    ],
)
def test_a_method_that_prefers_wrong_answers_is_told_so(auc: float | None, said: str | None) -> None:
    standings = [standing("tracin", 5, auc=auc), standing("bm25", 3, auc=0.1), standing("uniform, draw 1", 1)]
    title, _, steps = _conclusion(standings, made_pool())
    assert title == "tracin finds 5 of 6 relevant rows"
    about = [step for step in steps if "wrong answers" in step]
    assert len(about) == (said is not None) and (said is None or about[0].startswith(said))
    assert any("The method sees what is relevant here" in step for step in steps)
