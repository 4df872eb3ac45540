"""Each warning fires exactly when it should, on planted tables with numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from planted_reports import inputs, plain, table
from tamis.report.content import ReportInputs, build_content
from tamis.report.finding import Finding


def findings(given: ReportInputs) -> dict[str, Finding]:
    found = build_content(given).findings
    assert len({finding.key for finding in found}) == len(found)
    return {finding.key: finding for finding in found}


def severity(given: ReportInputs, key: str) -> str | None:
    finding = findings(given).get(key)
    return finding.severity if finding else None


def with_changes(given: ReportInputs, **changes: object) -> ReportInputs:
    return inputs(given.table, **changes)


def test_a_plain_selection_raises_no_warning_and_no_note() -> None:
    assert {finding.severity for finding in findings(plain()).values()} == {"passed", "unmeasured"}


@pytest.mark.parametrize(
    ("selected_length", "expected"), [(19, "warning"), (20, "passed"), (40, "passed"), (80, "passed"), (81, "warning")]
)
def test_answer_length_warns_below_half_and_above_twice_the_target(selected_length: int, expected: str) -> None:
    supervised = np.where(np.arange(20) < 4, selected_length, 40)  # the target's rows have 40
    assert severity(plain(supervised_tokens=supervised), "answer-length") == expected


def test_answer_length_is_judged_for_each_target_by_the_rows_picked_for_it() -> None:
    # maths wants 80 and gets 10, trivia wants 10 and gets 80: together the means agree, each target is wronged.
    rows = table(
        8,
        supervised_tokens=[10, 80, 10, 80, 45, 45, 45, 45],
        selected=[True] * 4 + [False] * 4,
        picked_for=["maths", "trivia", "maths", "trivia"] + [None] * 4,
        source=["a", "b"] * 4,
    )
    given = inputs(
        rows,
        target_names=("maths", "trivia"),
        target_group=np.array([0, 1]),
        target_supervised_tokens=np.array([80, 10]),
    )
    finding = findings(given)["answer-length"]
    assert finding.severity == "warning"
    assert "maths: 10 supervised tokens a selected row, 80 a target row" in finding.sentence
    assert "trivia: 80 supervised tokens a selected row, 10 a target row" in finding.sentence


def test_one_source_is_no_warning_where_sources_were_chosen() -> None:
    source = ["a"] * 10 + ["b"] * 10
    given = plain(source=source, selected=np.arange(20) < 10, picked_for=[None] * 20)
    chosen = with_changes(
        given, manifest={**given.manifest, "settings": {**given.manifest["settings"], "shortlist": "sources:4"}}
    )
    assert severity(given, "one-source") == "warning"
    assert severity(chosen, "one-source") == "note"


@pytest.mark.parametrize(("of_one_source", "expected"), [(8, "passed"), (9, "warning")])  # of ten: 80 % is not above
def test_one_source_warns_above_eighty_per_cent(of_one_source: int, expected: str) -> None:
    source = ["a"] * of_one_source + ["b"] * (20 - of_one_source)
    finding = findings(plain(source=source, selected=np.arange(20) < 10, picked_for=[None] * 20))["one-source"]
    assert finding.severity == expected
    assert f"a gives {of_one_source} of 10 selected rows ({10 * of_one_source}%)" in finding.sentence
    if expected == "warning":
        assert f"{5 * of_one_source}% of the pool" in finding.sentence
        assert "not measured here" in finding.advice


def test_a_source_that_fills_the_pool_fills_the_selection_without_a_warning() -> None:
    source = ["b"] + ["a"] * 19
    finding = findings(plain(source=source, selected=np.arange(20) % 2 == 1, picked_for=[None] * 20))["one-source"]
    assert finding.severity == "passed"
    assert "a gives 10 of 10 selected rows (100%); it is 95% of the pool" in finding.sentence
    all_rows = plain(source=source, selected=np.ones(20, bool), picked_for=[None] * 20)
    assert severity(all_rows, "one-source") == "passed"


def test_one_selected_row_does_not_make_a_source_dominant() -> None:
    assert severity(plain(selected=np.arange(20) == 0, picked_for=[None] * 20), "one-source") == "passed"


def test_a_pool_of_one_source_cannot_favour_one() -> None:
    assert severity(plain(source=["a"] * 20), "one-source") == "passed"


def test_exact_copies_warn_only_if_both_are_selected() -> None:
    both = np.full(20, -1)
    both[3] = 1
    finding = findings(plain(duplicate_of=both))["exact-copies"]
    assert finding.severity == "warning"
    assert finding.sentence.startswith("2 selected rows")
    one = np.full(20, -1)
    one[15] = 1
    assert severity(plain(duplicate_of=one), "exact-copies") == "passed"
    siblings = np.full(20, -1)  # rows 1 and 2 are copies of row 9, which is not selected
    siblings[[1, 2]] = 9
    assert severity(plain(duplicate_of=siblings), "exact-copies") == "warning"


def test_near_copies_are_a_note() -> None:
    near = np.full(20, -1)
    near[3] = 1
    assert severity(plain(near_duplicate_of=near), "near-copies") == "note"
    near[3], near[15] = -1, 1
    assert severity(plain(near_duplicate_of=near), "near-copies") is None


@pytest.mark.parametrize(("lengths", "expected"), [([2, 4, 4, 90], "warning"), ([2, 5, 5, 5], "passed")])
def test_format_floor_warns_at_a_median_of_four_supervised_tokens(lengths: list[int], expected: str) -> None:
    given = with_changes(plain(), target_supervised_tokens=np.array(lengths))
    assert severity(given, "format-floor") == expected


def test_what_needs_training_is_never_reported_as_passed() -> None:
    finding = findings(plain())["beats-uniform"]
    assert finding.severity == "unmeasured"
    assert finding.sentence.startswith("Not measured here")


@pytest.mark.parametrize(
    ("shared", "expected"),
    [(8, True), (7, False)],  # of ten selected rows: 70 % is not above 70 %
)
def test_a_baseline_that_finds_almost_the_same_is_named(shared: int, expected: bool) -> None:
    selected = np.arange(20) < 10
    rows = np.concatenate([np.arange(shared), np.arange(10, 20 - shared)])
    given = with_changes(plain(selected=selected, picked_for=[None] * 20), baselines={"bm25": rows})
    found = findings(given)
    assert ("same-as-bm25" in found) is expected
    assert ("agreement" in found) is not expected
    if expected:
        assert found["same-as-bm25"].title == "BM25 (shared words) would have found almost the same"
        assert "80% of the selected rows" in found["same-as-bm25"].sentence
        assert "By chance it would be 50%" in found["same-as-bm25"].sentence


@pytest.mark.parametrize("selected", [20, 19])  # of 20 pool rows
def test_agreement_that_chance_explains_is_no_warning(selected: int) -> None:
    chosen = np.arange(20) < selected
    found = findings(
        with_changes(plain(selected=chosen, picked_for=[None] * 20), baselines={"bm25": np.arange(20 - selected, 20)})
    )
    assert "same-as-bm25" not in found
    assert found["agreement"].severity == "unmeasured"
    assert f"({5 * selected}%); by chance in brackets" in found["agreement"].sentence


def test_a_pool_of_one_row_raises_no_warning_of_copying_the_baselines() -> None:
    one = inputs(table(1, selected=[True], rank=[1]), baselines={"bm25": np.array([0]), "length": np.array([0])})
    assert {finding.severity for finding in findings(one).values()} == {"passed", "unmeasured"}


def test_a_method_is_not_warned_of_agreeing_with_itself() -> None:
    given = with_changes(plain(), baselines={"bm25": np.arange(4)}, manifest={"settings": {"method": {"name": "bm25"}}})
    assert "same-as-bm25" not in findings(given)


def test_high_correlation_beside_low_overlap_warns() -> None:
    score = np.linspace(1, 0.1, 20)
    almost = score.copy()
    almost[:4] = [0.05, 0.04, 0.03, 0.02]  # all in order, except that the four selected rows are last
    low = with_changes(plain(), baselines={"bm25": np.arange(4, 8)}, baseline_scores={"bm25": almost})
    content = build_content(low)
    # Ranks: 16 rows rise by 4 each (d = 4, d² = 16), 4 rows fall by 16 (d² = 256): rho = 1 - 6·1280 / (20·399).
    assert content.agreements[0].spearman == pytest.approx(1 - 6 * 1280 / (20 * 399), abs=1e-6)
    assert severity(low, "correlation") is None  # 0.04 is not high
    almost = score.copy()
    almost[:8] = score[:8][::-1]
    high = with_changes(plain(), baselines={"bm25": np.arange(4, 8)}, baseline_scores={"bm25": almost})
    finding = findings(high)["correlation"]
    assert finding.severity == "warning"
    assert "BM25 (shared words) (Spearman 0." in finding.sentence
    assert "0% of the selected rows are also its choice" in finding.sentence
    agreeing = with_changes(plain(), baselines={"bm25": np.arange(4)}, baseline_scores={"bm25": score})
    assert severity(agreeing, "correlation") is None


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (110, "passed"),
        (112, "note"),
        (124, "note"),  # pool mean (4·100 + 16·124) / 20 = 119.2, less than 1.2 times the selection's 100
        (126, "warning"),  # 120.8
        (80, "note"),  # 84, and 100 is 1.19 times that
        (79, "warning"),  # 83.2
    ],
)
def test_unequal_tokens_are_told_beyond_ten_per_cent_and_warned_of_beyond_a_fifth_of_the_pools_mean(
    tokens: int, expected: str
) -> None:
    column = np.where(np.arange(20) < 4, 100, tokens)
    given = with_changes(plain(tokens=column), baselines={"uniform:0": np.arange(10, 14)})
    assert severity(given, "tokens") == expected


def test_long_rows_that_a_blind_draw_could_have_taken_are_no_warning() -> None:
    tokens = np.where(np.arange(20) % 4 == 0, 400, 10)  # one row of four is long; row 0 alone is selected
    given = with_changes(
        plain(tokens=tokens, selected=np.arange(20) == 0, picked_for=[None] * 20),
        baselines={"uniform:0": np.array([1])},
    )
    assert severity(given, "tokens") == "note"


def test_what_the_run_warns_of_is_among_the_findings_and_counted() -> None:
    given = with_changes(plain(), warnings=[("About the method", "it ran with the plain inner product.")])
    finding = findings(given)["run-0"]
    assert (finding.severity, finding.line) == ("warning", "About the method. it ran with the plain inner product.")
    assert build_content(given).headline.verdict.startswith("One check raises a warning")


def test_tokens_are_compared_with_the_pool_mean_where_no_uniform_draw_is_given() -> None:
    content = build_content(plain(tokens=np.where(np.arange(20) < 4, 200, 100)))
    assert [entry.tokens for entry in content.tokens] == [800, 4 * 120]  # pool mean: (4·200 + 16·100) / 20
    assert {finding.key: finding.severity for finding in content.findings}["tokens"] == "warning"


def test_rows_of_no_help_are_named_for_methods_whose_sign_means_something() -> None:
    score = np.where(np.arange(20) < 2, 1.0, -0.5)
    finding = findings(plain(score=score))["negative-score"]
    assert finding.severity == "warning"
    assert finding.sentence.startswith("2 selected rows")
    lexical = with_changes(plain(score=score), manifest={"settings": {"method": "bm25"}})
    assert "negative-score" not in findings(lexical)
    of_a_run = with_changes(plain(score=score), manifest={"settings": {"method": "adamw-influence"}})
    assert findings(of_a_run)["negative-score"].severity == "note"
    assert "did less for the target than their share" in findings(of_a_run)["negative-score"].sentence


def test_equal_scores_and_missing_scores_are_told() -> None:
    assert severity(plain(score=np.full(20, 0.5)), "constant-score") == "warning"
    score: list[float | None] = [0.5, 0.4, 0.3, None] + [0.1] * 14 + [None] * 2
    found = findings(plain(score=score, supervised_tokens=[40] * 19 + [0]))
    assert found["unscored-selected"].sentence.startswith("1 selected row without")
    assert found["unscored"].sentence.startswith("3 of 20 pool rows without a score, 1 of them")


@pytest.mark.parametrize(("key", "most"), [("flagged", 4), ("truncated", 2)])  # 10 % and 5 % of 40
def test_bad_rows_are_a_note_up_to_a_share_of_the_selection_and_a_warning_above(key: str, most: int) -> None:
    def bad(selected_bad: int) -> ReportInputs:
        rows = table(
            60,
            source=["a", "b"] * 30,
            selected=np.arange(60) < 40,
            **{key: (np.arange(60) < selected_bad).astype(int)},
        )
        return inputs(rows)

    assert severity(bad(most), key) == "note"
    assert severity(bad(most + 1), key) == "warning"
    assert severity(bad(0), key) is None


def test_leaks_warn_if_selected_and_are_a_note_otherwise() -> None:
    assert severity(plain(leaked=np.arange(20) == 0), "leaked") == "warning"
    assert severity(plain(leaked=np.arange(20) == 10), "leaked") == "note"


def test_skipped_rows_are_listed() -> None:
    @dataclass(frozen=True)
    class Bad:
        file: str = "pool.jsonl"
        row: int = 3
        field: str | None = "messages"
        problem: str = "unknown role 'robot'"

    given = with_changes(plain(), skipped=[Bad()])
    assert build_content(given).skipped == ("pool.jsonl, row 3, field messages: unknown role 'robot'",)


def test_the_gravest_findings_come_first() -> None:
    order = ["warning", "note", "unmeasured", "passed"]
    found = [order.index(f.severity) for f in build_content(plain(leaked=[True] * 20, source=["a"] * 20)).findings]
    assert found == sorted(found)
