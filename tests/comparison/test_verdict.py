"""What is concluded from finished runs: signs, pairs by seed, corrections, and words that fit the numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from comparison_runs import contender, made_run
from tamis.comparison.records import Run
from tamis.comparison.result import SelectionFacts
from tamis.comparison.statistics import holm
from tamis.comparison.verdict import compare_pairs, standings_of
from tamis.report.conclude import conclude
from tamis.runs.compare import _of_runs

MATCHED = "full at tracin's cost"
CONTENDERS = [
    contender("tracin", "selected"),
    contender(MATCHED, "equal-cost", of="tracin"),
    contender("uniform", "uniform"),
    contender("bm25", "selected"),
    contender("full", "full"),
]


def runs_of(levels: dict[str, float], *, seeds: int = 3, noise: float = 0.01, rows: int = 12) -> dict[Any, list[Run]]:
    """Every contender's rows around its level; uniform has one draw more."""
    draw = np.random.default_rng(0)
    hard = draw.normal(size=rows)
    found = {}
    for name, level in levels.items():
        count = seeds + (name == "uniform")
        losses = [(level + hard + noise * draw.normal(size=rows)).tolist() for _ in range(count)]
        found[name, "5%"] = [made_run(name, seed, own) for seed, own in enumerate(losses)]
    return found


def concluded(runs: dict[Any, list[Run]], *, contenders: Any = CONTENDERS, **more: Any) -> Any:
    by_name = {one.name: one for one in contenders}
    rows = len(next(iter(runs.values()))[0].row_losses)
    spent = {("tracin", "5%"): (3.0, 9.0)}
    standings = standings_of(runs, by_name, spent, metric="loss", task_of=more.pop("task_of", ["task"] * rows))
    content_of = more.pop("content_of", np.arange(rows))
    differences = compare_pairs(runs, contenders, budget="5%", metric="loss", content_of=content_of)
    values: dict[str, Any] = {"budget": "5%", "metric": "loss", "seeds": 3, "held_out_rows": 12, **more}
    return standings, differences, conclude(standings, differences, values.pop("selections", ()), **values)


LEVELS = {"tracin": 1.0, MATCHED: 1.1, "uniform": 1.4, "bm25": 1.2, "full": 1.3}


def test_standings_come_best_first_with_the_cost_of_selecting() -> None:
    standings, _, _ = concluded(runs_of(LEVELS))
    assert [s.name for s in standings] == ["tracin", MATCHED, "bm25", "full", "uniform"]
    assert standings[0].tflops == 4.0 and standings[0].select_seconds == 9.0
    assert standings[0].mean == pytest.approx(float(np.mean(standings[0].values)), rel=1e-12)
    assert standings[0].std == pytest.approx(float(np.std(standings[0].values, ddof=1)), rel=1e-12)
    assert len(standings[-1].values) == 4 and standings[0].keys == ("tracin-0", "tracin-1", "tracin-2")


def test_differences_are_scipys_paired_tests_over_common_seeds_and_over_rows() -> None:
    runs = runs_of(LEVELS)
    _, differences, _ = concluded(runs)
    assert [d.against for d in differences] == ["full at equal cost", "full", "uniform", "bm25"]
    assert differences[0].opponent == MATCHED
    for d in differences:
        mine, theirs = runs["tracin", "5%"], runs[d.opponent, "5%"][:3]
        seeds = stats.ttest_rel([r.loss for r in theirs], [r.loss for r in mine])
        rows = stats.ttest_rel(
            np.mean([r.row_losses for r in theirs], axis=0), np.mean([r.row_losses for r in mine], axis=0)
        )
        assert d.gain > 0 and d.over_seeds.n == 3 and d.over_rows.n == 12
        assert d.over_seeds.p == pytest.approx(float(seeds.pvalue), rel=1e-9)
        assert d.over_rows.p == pytest.approx(float(rows.pvalue), rel=1e-9)
    assert [d.seeds_p for d in differences] == holm([d.over_seeds.p for d in differences])
    assert [d.rows_p for d in differences] == holm([d.over_rows.p for d in differences])


def test_a_free_selection_has_full_as_its_equal_at_equal_cost() -> None:
    runs = runs_of({name: level for name, level in LEVELS.items() if name != MATCHED})
    _, differences, _ = concluded(runs)
    assert (differences[0].against, differences[0].opponent) == ("full at equal cost", "full")


def test_copies_of_a_held_out_row_are_one_observation() -> None:
    """Three times the same rows say no more of other rows than once, whatever the test of six times as many would."""
    runs = runs_of(LEVELS, noise=0.3)
    _, once, _ = concluded(runs)
    again = {key: [replace(run, row_losses=run.row_losses * 3) for run in own] for key, own in runs.items()}
    _, thrice, _ = concluded(again, content_of=np.tile(np.arange(12), 3))
    for one, three in zip(once, thrice, strict=True):
        assert three.over_rows.n == 12 and three.over_rows.p == pytest.approx(one.over_rows.p, rel=1e-9)
    _, taken_apart, _ = concluded(again)
    assert taken_apart[0].over_rows.p < 0.2 * once[0].over_rows.p  # what ignoring it would claim


def test_tasks_are_told_apart_by_the_rows_of_this_call() -> None:
    runs = runs_of(LEVELS)
    standings, _, _ = concluded(runs, task_of=["sums"] * 4 + ["prose"] * 8)
    own = np.array([run.row_losses for run in runs["tracin", "5%"]])
    assert standings[0].by_task == {
        "sums": pytest.approx(own[:, :4].mean(), rel=1e-12),
        "prose": pytest.approx(own[:, 4:].mean(), rel=1e-12),
    }


def test_training_that_harms_is_called_so_and_not_recommended() -> None:
    contenders = [*CONTENDERS, contender("untouched model", "untouched")]
    for level, harms in ((0.5, True), (2.0, False)):
        runs = runs_of({**LEVELS, "tracin": 0.8, "untouched model": level})
        _, _, conclusion = concluded(runs, contenders=contenders)
        assert ("made the model worse" in conclusion.title) == harms
        advice = " ".join(conclusion.next_steps)
        assert ("lower --learning-rate" in advice) == harms and ("Train on that selection" in advice) != harms


def test_one_held_out_row_asks_for_rows_and_not_for_seeds() -> None:
    _, _, conclusion = concluded(runs_of(LEVELS, rows=1), held_out_rows=1)
    assert "one held-out row cannot exclude chance" in conclusion.title
    assert "Give more held-out rows by --eval (there is one)" in conclusion.next_steps[0]
    assert not any("--seeds" in step for step in conclusion.next_steps)


def test_equal_differences_of_few_seeds_ask_for_more() -> None:
    def matched(name: str, hits: int) -> list[Run]:
        row = tuple([True] * hits + [False] * (8 - hits))
        return [made_run(name, s, [1.0] * 8, exact_match=hits / 8, row_matches=row) for s in range(3)]

    runs = {("tracin", "5%"): matched("tracin", 4), ("full", "5%"): matched("full", 2)}
    standings = standings_of(
        runs, {one.name: one for one in CONTENDERS}, {}, metric="exact-match", task_of=["task"] * 8
    )
    pairs = compare_pairs(runs, CONTENDERS, budget="5%", metric="exact-match", content_of=np.arange(8))
    assert pairs[0].over_seeds.std == 0 and pairs[0].seeds_p == 0.25
    conclusion = conclude(standings, pairs, (), budget="5%", metric="exact-match", seeds=3, held_out_rows=8)
    assert any("--seeds 6: all 3 differ by the same amount" in step for step in conclusion.next_steps)


def test_a_metric_that_nobody_scores_on_is_said_to_tell_nothing() -> None:
    def missed(name: str) -> list[Run]:
        return [made_run(name, s, [1.0] * 4, exact_match=0.0, row_matches=(False,) * 4) for s in range(2)]

    runs = {("tracin", "5%"): missed("tracin"), ("full", "5%"): missed("full")}
    standings = standings_of(
        runs, {one.name: one for one in CONTENDERS}, {}, metric="exact-match", task_of=["task"] * 4
    )
    pairs = compare_pairs(runs, CONTENDERS, budget="5%", metric="exact-match", content_of=np.arange(4))
    conclusion = conclude(standings, pairs, (), budget="5%", metric="exact-match", seeds=2, held_out_rows=4)
    assert "not" not in conclusion.warnings[0].split(",")[0] and "single right answer" in conclusion.warnings[0]


def test_exact_match_counts_upwards() -> None:
    def matched(name: str, hits: list[bool]) -> list[Run]:
        share = sum(hits) / len(hits)
        return [made_run(name, s, [1.0] * 4, exact_match=share, row_matches=tuple(hits)) for s in range(2)]

    runs = {
        ("tracin", "5%"): matched("tracin", [True, True, True, False]),
        ("full", "5%"): matched("full", [True] + [False] * 3),
    }
    (difference,) = compare_pairs(runs, CONTENDERS, budget="5%", metric="exact-match", content_of=np.arange(4))
    assert difference.gain == pytest.approx(0.5) and difference.relative == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("level", "noise", "seeds", "title"),
    [
        (0.8, 0.01, 3, "tracin beats training on everything at equal cost"),
        (1.3, 0.01, 3, "At equal cost, training on everything beats tracin"),
        (1.09, 0.4, 3, "which chance could explain"),
        (0.8, 0.01, 1, "one run cannot exclude chance"),
    ],
)
def test_the_title_says_who_won_and_whether_by_chance(level: float, noise: float, seeds: int, title: str) -> None:
    _, _, conclusion = concluded(runs_of({**LEVELS, "tracin": level}, noise=noise, seeds=seeds), seeds=seeds)
    assert title in conclusion.title
    assert conclusion.next_steps


def test_what_to_run_next_follows_from_the_numbers() -> None:
    _, _, lost = concluded(runs_of({**LEVELS, "tracin": 1.15}))
    assert any("ahead only while updates are limited" in step for step in lost.next_steps)
    _, _, won = concluded(runs_of({**LEVELS, "tracin": 0.8}))
    assert won.next_steps == (
        "Train on that selection: its selected.jsonl lies in the folder named below under Selections.",
    )
    _, _, open_ = concluded(runs_of({**LEVELS, "bm25": 0.8}))
    assert any(step.startswith("bm25 costs no model pass") for step in open_.next_steps)


def test_what_to_run_next_fits_an_online_method() -> None:
    contenders = [replace(one, kind="online") if one.name == "tracin" else one for one in CONTENDERS]
    _, _, lost = concluded(runs_of({**LEVELS, "tracin": 1.15}), contenders=contenders)
    assert any("online:METHOD@sources:K" in step and "bm25:5x" not in step for step in lost.next_steps)
    _, _, won = concluded(runs_of({**LEVELS, "tracin": 0.8}), contenders=contenders)
    assert won.next_steps == ("Train like that: tamis train, with the settings that online/tracin-0/run.yaml has.",)


def test_the_spread_of_uniform_does_not_grow_with_its_draws() -> None:
    draws = [1.3, 1.5, 1.4, 1.4, 1.35, 1.45, 1.4, 1.4]
    runs = runs_of(LEVELS, seeds=8)
    runs["uniform", "5%"] = [made_run("uniform", seed, [loss] * 12) for seed, loss in enumerate(draws)]
    runs["tracin", "5%"] = [made_run("tracin", seed, [loss - 0.1] * 12) for seed, loss in enumerate(draws)]
    _, _, conclusion = concluded(runs, seeds=8)
    assert not any("spread of uniform" in warning for warning in conclusion.warnings)


def test_the_seeds_that_are_asked_for_show_the_difference_after_correction() -> None:
    runs = {("tracin", "5%"): [made_run("tracin", seed, [1.0, 1.0]) for seed in range(3)]}
    for name in (MATCHED, "full", "uniform", "bm25"):
        runs[name, "5%"] = [made_run(name, seed, [1.02 + 0.03 * (seed - 1)] * 2) for seed in range(3)]
    _, differences, conclusion = concluded(runs)
    assert differences[0].over_seeds.std == pytest.approx(0.03)
    (step,) = [step for step in conclusion.next_steps if "--seeds" in step]
    asked = int(step.split("--seeds ")[1].split(":")[0])
    # Exact power of a two-sided paired t-test at a quarter of 0.05, the share of each of four tests.
    power = {
        n: float(stats.nct.sf(stats.t.ppf(1 - 0.05 / 8, n - 1), n - 1, 0.02 / 0.03 * np.sqrt(n)))
        for n in (asked - 3, asked + 3)
    }
    assert power[asked - 3] < 0.8 < power[asked + 3]
    _, _, single = concluded(runs_of(LEVELS, seeds=1), seeds=1)
    assert any("one cannot show chance" in step for step in single.next_steps)


def test_a_share_of_nothing_has_no_relative_gain_and_equal_ends_are_called_level() -> None:
    def matched(name: str, hits: list[bool]) -> list[Run]:
        share = sum(hits) / len(hits)
        return [made_run(name, s, [1.0] * 4, exact_match=share, row_matches=tuple(hits)) for s in range(2)]

    runs = {("tracin", "5%"): matched("tracin", [True] + [False] * 3), ("full", "5%"): matched("full", [False] * 4)}
    by_name = {one.name: one for one in CONTENDERS}
    for own, title in (
        (runs, "by 0.25, which chance could explain"),
        ({**runs, ("tracin", "5%"): matched("tracin", [False] * 4)}, "end level"),
    ):
        standings = standings_of(own, by_name, {}, metric="exact-match", task_of=["task"] * 4)
        (difference,) = differences = compare_pairs(
            own, CONTENDERS, budget="5%", metric="exact-match", content_of=np.arange(4)
        )
        assert difference.relative is None
        conclusion = conclude(standings, differences, (), budget="5%", metric="exact-match", seeds=2, held_out_rows=4)
        assert title in conclusion.title
        json.dumps([asdict(difference), conclusion.title], allow_nan=False)


def test_warnings_of_spread_sources_and_tokens() -> None:
    runs = runs_of(LEVELS)
    runs["uniform", "5%"] = [made_run("uniform", s, [1.0 + s] * 12, tokens=800) for s in range(4)]
    facts = SelectionFacts(
        name="tracin", budget="5%", folder="f", rows=9, largest_source="sums", largest_share=0.9, pool_rows=180,
        pool_share=0.2, warnings=(),
    )  # fmt: skip
    _, _, conclusion = concluded(runs, selections=[facts], warnings=["3 rows leak"])
    said = "\n".join(conclusion.warnings)
    assert conclusion.warnings[0] == "3 rows leak"
    assert "smaller than the spread of uniform's own draws (a standard deviation of 1.3)" in said
    assert "90% of its rows come from one source ('sums'), which is 20% of the pool" in said
    assert "Random rows of the same sources" not in said, "none was trained beside it"
    _, _, conclusion = concluded(runs, selections=[replace(facts, largest_share=1.0, pool_share=1.0)])
    assert not any("one source" in warning for warning in conclusion.warnings), "the pool has no other"
    _, _, conclusion = concluded(runs, selections=[replace(facts, pool_share=0.88)])
    assert not any("one source" in warning for warning in conclusion.warnings), "a blind draw does as much"
    assert "Of what an update of uniform sees: tracin 50%" in said


def test_what_is_known_of_the_data_is_not_said_again_of_every_run() -> None:
    runs = [made_run("online:greats", seed, [1.0], warnings=("No template.", "It never starts.")) for seed in range(2)]
    assert _of_runs(runs, known=["No template."]) == ["online:greats: It never starts."]


def test_supervised_tokens_a_row_are_of_rows_as_often_as_they_were_seen() -> None:
    """Ten rows, four times each, with 200 supervised tokens in all of these forty."""
    runs = {("tracin", "5%"): [made_run("tracin", seed, [1.0], rows=10, seen_rows=40) for seed in (0, 1)]}
    runs["untouched", "5%"] = [made_run("untouched", 0, [1.0], rows=0, seen_rows=0, tokens=0, supervised_tokens=0)]
    by_name = {"tracin": contender("tracin", "selected"), "untouched": contender("untouched", "untouched")}
    standings = standings_of(runs, by_name, {}, metric="loss", task_of=["task"])
    assert {s.name: (s.supervised_a_row, s.rows) for s in standings} == {"tracin": (5.0, 10), "untouched": (0.0, 0)}


def test_the_most_answers_right_stand_first_within_each_budget() -> None:
    shares = {"tracin": 0.25, "uniform": 0.75, "full": 0.5}
    runs = {
        (name, budget): [
            made_run(name, 0, [2.0] * 4, exact_match=share, row_matches=tuple(i < 4 * share for i in range(4)))
        ]
        for budget in ("5%", "20%")
        for name, share in shares.items()
    }
    by_name = {one.name: one for one in CONTENDERS}
    standings = standings_of(runs, by_name, {}, metric="exact-match", task_of=["task"] * 4)
    order = [(s.budget, s.name, s.mean) for s in standings]
    best = [("uniform", 0.75), ("full", 0.5), ("tracin", 0.25)]
    assert order == [(budget, name, share) for budget in ("5%", "20%") for name, share in best]
    for share, gain in ((0.25, -0.5), (1.0, 0.25)):
        own = [made_run("tracin", 0, [2.0] * 4, exact_match=share, row_matches=tuple(i < 4 * share for i in range(4)))]
        pair = {("tracin", "5%"): own, ("uniform", "5%"): runs["uniform", "5%"]}
        (found,) = compare_pairs(pair, CONTENDERS, budget="5%", metric="exact-match", content_of=np.arange(4))
        assert (found.gain, found.over_rows.difference) == (gain, gain), "a gain is in favour of the method"


def test_the_loss_by_task_is_the_mean_over_the_tasks_own_rows() -> None:
    runs = {("tracin", "5%"): [made_run("tracin", 0, [1.0, 2.0, 6.0]), made_run("tracin", 1, [3.0, 4.0, 8.0])]}
    by_name = {"tracin": contender("tracin", "selected")}
    (standing,) = standings_of(runs, by_name, {}, metric="loss", task_of=["b", "b", "a"])
    assert standing.by_task == {"b": 2.5, "a": 7.0}
