"""The numbers of the report against hand counts, and its text against what the rows say."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from planted_reports import chat, edge, huge, inputs, plain, realistic, table
from tamis.errors import InvalidInput
from tamis.report.content import build_content
from tamis.report.measures import score_distribution


def test_headline_counts_rows_tokens_and_targets() -> None:
    headline = build_content(plain()).headline
    assert headline.title == "4 of 20 rows selected for maths"
    assert [(entry.value, entry.label) for entry in headline.numbers[:3]] == [
        ("4", "rows selected"),
        ("400", "tokens selected"),
        ("4", "target rows"),
    ]
    assert headline.numbers[1].detail == "20% of the pool; 160 carry loss"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("tracin", "how much training on it should lower the loss on the target: higher is better"),
        ("mid-ppl", "the target plays no part in it"),
        ("length", "a number of supervised tokens"),
        ("uniform", "a random number"),
        ("bm25", "promises nothing about the loss"),
    ],
)
def test_only_scores_that_predict_the_loss_are_said_to(method: str, said: str) -> None:
    given = plain()
    settings = {**given.manifest["settings"], "method": method}
    headline = build_content(replace(given, manifest={**given.manifest, "settings": settings})).headline
    assert said in headline.score_means
    assert ("should lower the loss" in headline.score_means) == (method == "tracin")


def test_the_headline_says_the_budget_and_what_the_models_passes_cost() -> None:
    given = plain()
    stages = [{"name": "a", "seconds": 2.0, "tokens": 10, "tflops": 1.5}, {"name": "b", "seconds": 1.0, "tflops": 2}]
    manifest = {
        **given.manifest,
        "settings": {**given.manifest["settings"], "budget": "20%"},
        "cost": {"stages": stages},
    }
    numbers = {entry.label: entry for entry in build_content(replace(given, manifest=manifest)).headline.numbers}
    assert numbers["rows selected"].detail == "20% of 20; budget 20%"
    assert (numbers["time spent"].value, numbers["time spent"].detail) == ("3.0\u00a0s", "3.5 TFLOPs of model work")
    none = build_content(replace(given, manifest={**manifest, "cost": {"stages": []}})).headline.numbers[-1]
    assert none.detail == "no model ran"


def test_a_target_called_target_is_not_named_twice() -> None:
    content = build_content(replace(plain(picked_for=["target"] * 4 + [None] * 16), target_names=["target"]))
    assert [group.label for group in content.lengths] == ["the pool", "the selection", "the target"]
    assert build_content(plain()).lengths[-1].label == "target maths"


def test_composition_counts_before_and_after() -> None:
    source = ["a"] * 3 + ["b"] * 7 + ["c"] * 10  # selected: rows 0 to 3
    shares = {entry.name: entry for entry in build_content(plain(source=source)).sources}
    assert (shares["a"].pool_rows, shares["a"].selected_rows, shares["a"].selected_tokens) == (3, 3, 300)
    assert shares["a"].ratio == pytest.approx(0.75 / 0.15)
    assert (shares["c"].pool_share, shares["c"].selected_share, shares["c"].ratio) == (0.5, 0, 0)


def test_many_sources_are_summed_beyond_the_first_two_dozen() -> None:
    sources = build_content(plain(source=[f"s{index}" for index in range(20)])).sources
    assert len(sources) == 20
    rows = table(60, source=[f"s{index}" for index in range(60)], selected=np.arange(60) < 5)
    sources = build_content(inputs(rows)).sources
    assert sources[-1].is_rest
    assert sources[-1].name == "36 other sources"
    assert sum(entry.pool_rows for entry in sources) == 60
    assert sum(entry.selected_rows for entry in sources) == 5


def test_null_sources_are_counted_too() -> None:
    shares = build_content(plain(source=[None] * 10 + ["a"] * 10)).sources
    assert {entry.name: entry.pool_rows for entry in shares} == {"(no source)": 10, "a": 10}


def test_lengths_describe_pool_selection_and_target() -> None:
    content = build_content(plain(supervised_tokens=[10, 20, 30, 40] + [100] * 16))
    pool, selected, target = content.lengths
    assert (selected.mean, selected.median, selected.longest) == (25, 25, 40)
    assert pool.mean == pytest.approx(85)
    assert (target.name, target.rows, target.mean) == ("maths", 4, 40)
    for group in content.lengths:
        assert sum(group.shares) == pytest.approx(1)
        assert len(group.shares) == len(content.length_edges) - 1


def test_overlap_is_the_share_of_selected_rows_and_draws_are_averaged() -> None:
    given = replace(
        plain(),
        baselines={"uniform:0": np.array([0, 1, 8, 9]), "uniform:1": np.array([10, 11, 12, 13]), "bm25": np.arange(3)},
    )
    uniform, bm25 = build_content(given).agreements
    assert (uniform.name, uniform.draws, uniform.overlap, uniform.lowest, uniform.highest) == (
        "uniform",
        2,
        0.25,
        0,
        0.5,
    )
    assert (bm25.overlap, bm25.chance, bm25.spearman) == (0.75, 0.15, None)


def test_overlap_counts_another_copy_of_the_same_text_as_the_same_row() -> None:
    copies = np.full(20, -1)
    copies[[10, 11]] = [0, 1]
    given = replace(plain(duplicate_of=copies), baselines={"bm25": np.array([10, 11, 12, 13])})
    assert build_content(given).agreements[0].overlap == 0.5


def test_spearman_uses_only_rows_that_both_have_scored() -> None:
    score = [0.9, 0.8, 0.7, 0.6, None, 0.1] + [None] * 14
    other = np.full(20, np.nan, dtype=np.float32)
    other[[0, 1, 2, 3, 4]] = [1, 2, 3, 4, 9]
    given = replace(plain(score=score), baselines={"bm25": np.arange(4)}, baseline_scores={"bm25": other})
    assert build_content(given).agreements[0].spearman == pytest.approx(-1)
    few = replace(given, baseline_scores={"bm25": np.where(np.arange(20) < 2, other, np.nan)})
    assert build_content(few).agreements[0].spearman is None  # two rows say nothing


@for_all(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False) | st.just(float("nan")), min_size=1, max_size=80),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_histograms_hold_every_scored_row(values: list[float], random: object) -> None:
    score = np.array(values)
    selected = np.array([random.random() < 0.5 for _ in values])  # type: ignore[attr-defined]  # Hypothesis' stand-in
    result = score_distribution("t", score, selected)
    assert result.scored == np.isfinite(score).sum()
    if result.scored:
        assert sum(result.pool_shares) == pytest.approx(1)
        assert np.all(np.diff(result.edges) > 0)
    if (selected & np.isfinite(score)).any():
        assert sum(result.selected_shares) == pytest.approx(1)


def test_a_single_far_score_does_not_squeeze_the_others() -> None:
    score = np.append(np.random.default_rng(0).normal(size=5000), 1e6)
    result = score_distribution("t", score, np.zeros(5001, dtype=bool))
    assert result.edges[-1] < 100
    assert result.outside >= 1
    assert result.highest == 1e6


def test_best_last_and_worst_rows_come_with_their_text() -> None:
    content = build_content(plain())
    (target,) = content.targets
    assert [card.rank for card in target.best] == [1, 2, 3, 4]
    assert [turn.text for turn in target.best[0].turns] == ["question 0", "answer 0"]
    assert [card.place for card in target.worst] == [f"pool/a.jsonl, row {row}" for row in (19, 18, 17)]
    assert [card.turns[0].text for card in target.shown] == ["target question 0", "target question 1"]


def test_rows_are_listed_under_the_target_that_picked_them() -> None:
    content = build_content(realistic(800))
    for index, target in enumerate(content.targets):
        ranks = [card.rank or 0 for card in target.best]
        assert ranks == sorted(ranks)
        assert all(rank % 2 == 1 - index for rank in ranks)  # planted: round robin, gsm8k first, ranks from 1
        assert all(card.source == target.name for card in target.best)


def test_long_text_is_cut_and_the_rest_is_counted() -> None:
    given = replace(plain(), read_example=lambda index: chat(index, "short", "x" * 100_000))
    turn = build_content(given).targets[0].best[0].turns[1]
    assert (len(turn.text), turn.characters, turn.left_out) == (3000, 100_000, 97_000)


def test_a_long_note_is_broken_into_lines_and_nothing_of_it_is_lost() -> None:
    by_target = ", ".join(f"target number {i} {i / 1000:.3f}" for i in range(200))
    long, short = f"Expected of each target ({by_target})", "A short note, as it is; in one line"
    notes = build_content(replace(plain(), notes=(long, short, "x" * 5000))).notes
    assert notes[-2] == short and len(notes[-1]) == 600 and notes[-1].endswith("…")  # a word without end is cut
    lines = notes[:-2]
    assert len(lines) > 5 and max(map(len, lines)) <= 600
    assert [line.startswith("… ") for line in lines] == [False, *[True] * (len(lines) - 1)]
    assert " ".join(line.removeprefix("… ") for line in lines) == long


def test_pairs_show_both_texts_and_those_both_selected_first() -> None:
    near = np.full(20, -1)
    near[[9, 3]] = [8, 1]
    exact = np.full(20, -1)
    exact[12] = 11
    pairs = build_content(plain(near_duplicate_of=near, duplicate_of=exact)).pairs
    assert [(pair.kind, pair.both_selected) for pair in pairs] == [("near", True), ("near", False), ("exact", False)]
    assert [card.turns[0].text for card in (pairs[0].first, pairs[0].second)] == ["question 1", "question 3"]


def test_exact_copies_are_not_listed_again_as_near_copies() -> None:
    of = np.full(20, -1)
    of[12] = 11
    pairs = build_content(plain(near_duplicate_of=of, duplicate_of=of)).pairs
    assert [pair.kind for pair in pairs] == ["exact"]


def test_suspicious_rows_are_shown_by_loss() -> None:
    loss = [1.0, 5.0, 2.0, 9.0] + [1.0] * 16
    cards = build_content(plain(flagged=np.arange(20) < 4, loss=loss)).flagged
    assert [card.loss for card in cards] == [9.0, 5.0, 2.0, 1.0]


def test_an_almost_empty_report_can_be_built() -> None:
    content = build_content(edge())
    assert content.headline.title == "3 of 30 rows selected for maths"
    assert content.agreements == ()
    assert content.cost.total_seconds is None
    (scores,) = content.scores
    assert (scores.scored, scores.selected) == (4, 3)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_selected_is_told_and_not_an_error(rows: int) -> None:
    content = build_content(inputs(table(rows)))
    assert "nothing-selected" in {finding.key for finding in content.findings}


def test_a_missing_column_is_named() -> None:
    given = replace(plain(), table=plain().table.drop_columns(["flagged"]))
    with pytest.raises(InvalidInput, match="lacks the column 'flagged'"):
        build_content(given)


def test_an_unknown_target_and_a_duplicate_outside_the_pool_are_refused() -> None:
    with pytest.raises(InvalidInput, match="'picked_for' names the target 'law'"):
        build_content(plain(picked_for=["law"] + [None] * 19))
    with pytest.raises(InvalidInput, match="'duplicate_of' points at row 20, but the pool has 20 rows"):
        build_content(plain(duplicate_of=[20] + [-1] * 19))


def test_chunks_and_dictionaries_of_the_table_do_not_matter() -> None:
    given = realistic(400)
    pieces = pa.concat_tables([given.table.slice(0, 150), given.table.slice(150)])
    encoded = pieces.set_column(pieces.column_names.index("source"), "source", pieces["source"].dictionary_encode())
    assert build_content(replace(given, table=encoded)) == build_content(given)


def test_manifest_is_listed_without_the_parts_shown_elsewhere() -> None:
    groups = dict(build_content(realistic(400)).provenance)
    assert ("torch", "2.7.0") in groups["versions"]
    assert ("pool[0].sha256", "ab" * 32) in groups["data"]
    assert "cost" not in groups
    many = replace(plain(), manifest={"data": {f"k{index}": index for index in range(5000)}})
    assert build_content(many).provenance[0][1][-1] == ("…", "4840 more in manifest.json")


@pytest.mark.slow
def test_a_million_rows_take_seconds() -> None:
    given = huge()
    started = time.process_time()  # not the clock: the machine may be busy with other things
    content = build_content(given)
    spent_s = time.process_time() - started
    assert spent_s < 12  # 2 s as measured
    assert sum(len(entry.edges) for entry in content.scores) < 1000  # binned: independent of the number of rows
