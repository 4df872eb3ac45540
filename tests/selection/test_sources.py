"""A sample of every source speaks for all of its rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.budget import parse_budget
from tamis.errors import InvalidInput, InvalidSettings, NonFinite
from tamis.selection.choose import choose
from tamis.selection.sources import carry_to_sources, choose_at_random_among_equals, sample_sources
from tamis.types import TargetScores


def scores_of(rows: list[int], values: object, group: list[int] | None = None) -> TargetScores:
    table = np.asarray(values, dtype=np.float32)
    table = table[:, None] if table.ndim == 1 else table
    of = np.zeros(table.shape[1], np.int64) if group is None else np.array(group)
    names = tuple(f"t{index}" for index in range(int(of.max()) + 1))
    return TargetScores(rows=np.array(rows, np.int64), values=table, group=of, target_names=names)


@settings(max_examples=40, deadline=None)
@given(
    source=st.lists(st.integers(0, 4), min_size=2, max_size=60), per_source=st.integers(1, 9), seed=st.integers(0, 9)
)
def test_every_source_gives_as_many_rows_as_asked_for_or_all(source: list[int], per_source: int, seed: int) -> None:
    index = np.array(source, np.int32)
    rows = np.flatnonzero(np.arange(len(index)) % 7 != 3).astype(np.int64)  # some are not usable
    if len(np.unique(index[rows])) < 2:
        with pytest.raises(InvalidSettings, match="of one source"):
            sample_sources(rows, index, per_source=per_source, seed=seed)
        return
    sampled = sample_sources(rows, index, per_source=per_source, seed=seed)
    assert (np.diff(sampled) > 0).all() and set(sampled) <= set(rows.tolist())
    for one in np.unique(index[rows]):
        assert (index[sampled] == one).sum() == min(per_source, (index[rows] == one).sum())


def test_a_source_is_sampled_at_random_and_independently_of_the_others() -> None:
    index = np.repeat(np.arange(3, dtype=np.int32), 50)
    every = np.arange(150, dtype=np.int64)
    drawn = [sample_sources(every, index, per_source=5, seed=seed) for seed in range(200)]
    often = np.bincount(np.concatenate(drawn), minlength=150)
    assert often.min() > 5 and often.max() < 45, "20 is expected of each row"
    alone = sample_sources(every[50:], index, per_source=5, seed=0)
    assert alone.tolist() == drawn[0][drawn[0] >= 50].tolist()


def test_one_source_is_refused_by_name() -> None:
    with pytest.raises(InvalidSettings, match=r"all 4 usable rows .* of one source \('web'\).*field 'source'"):
        sample_sources(np.arange(4), np.zeros(9, np.int32), per_source=2, seed=0, names=["web"])


def test_every_row_has_the_mean_of_its_source_and_its_own_score_moves_it_no_further() -> None:
    source = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2], np.int32)
    carried, (means,) = carry_to_sources(
        scores_of([0, 2, 5, 6, 8], [1.0, 3.0, 9.0, 0.0, 0.0]), rows=np.arange(10), source=source
    )
    assert carried.rows.tolist() == list(range(9)), "source 2 has no scored row"
    assert carried.values[:, 0].tolist() == [2.0] * 4 + [3.0] * 5
    assert carried.extra["is_landmark"].tolist() == [row in (0, 2, 5, 6, 8) for row in range(9)]
    assert means.source.tolist() == [0, 1]
    np.testing.assert_allclose(means.mean, [2, 3])
    np.testing.assert_allclose(means.error, [1, 3])  # standard deviations of sqrt(2) and sqrt(27), over sqrt(n)
    whole = np.var([1, 3, 9, 0, 0]) * 5
    assert means.explained == pytest.approx(1 - (2 + 54) / whole)


def test_a_target_is_the_mean_of_its_rows_so_one_of_them_alone_calls_no_source() -> None:
    source = np.array([0, 0, 1, 1], np.int32)
    values = [[5.0, -5.0, 1.0], [5.0, -5.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    carried, targets = carry_to_sources(
        scores_of([0, 1, 2, 3], values, group=[0, 0, 1]), rows=np.arange(4), source=source
    )
    assert carried.group.tolist() == [0, 1] and [each.target for each in targets] == ["t0", "t1"]
    assert carried.values.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]


def test_each_target_says_for_itself_whether_sources_differ() -> None:
    source = np.repeat(np.arange(2, dtype=np.int32), 10)
    noise = np.random.default_rng(0).normal(scale=0.1, size=20)
    clear = np.where(source == 0, 1.0, -1.0) + noise
    alternating = np.tile([1.0, -1.0], 10)
    _, (one, opposite, neither) = carry_to_sources(
        scores_of(list(range(20)), np.stack([clear, -clear, alternating], axis=1), group=[0, 1, 2]),
        rows=np.arange(20),
        source=source,
    )
    assert not one.could_be_chance and not opposite.could_be_chance
    assert neither.could_be_chance


def test_rows_without_a_gradient_enter_no_mean() -> None:
    source = np.array([0, 0, 1, 1], np.int32)
    scores = scores_of([0, 1, 2], [4.0, 0.0, 0.0])
    carried, (means,) = carry_to_sources(scores, rows=np.arange(4), source=source, without=np.array([1, 2]))
    assert carried.rows.tolist() == [0, 1] and means.mean.tolist() == [4.0]
    assert carried.extra["is_landmark"].tolist() == [True, False]
    with pytest.raises(InvalidInput, match="none of the 3 sampled rows has a gradient"):
        carry_to_sources(scores, rows=np.arange(4), source=source, without=np.arange(4))


def test_a_score_that_is_no_number_is_named() -> None:
    source = np.array([0, 0, 1, 1], np.int32)
    with pytest.raises(NonFinite, match="pool row 2"):
        carry_to_sources(scores_of([0, 2], [1.0, np.nan]), rows=np.arange(4), source=source)


def test_sources_that_are_alike_are_told_from_those_that_are_not() -> None:
    source = np.repeat(np.arange(6, dtype=np.int32), 8)
    rows = list(range(48))
    alike, unlike = [], []
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(size=48)
        for means, shift in ((alike, 0 * source), (unlike, source)):
            means += carry_to_sources(scores_of(rows, noise + shift), rows=np.arange(48), source=source)[1]
    assert sum(each.could_be_chance for each in alike) >= 50, "one in twenty may look otherwise"
    assert not any(each.could_be_chance for each in unlike)
    assert np.mean([each.explained for each in unlike]) > 0.6 > 0.3 > np.mean([each.explained for each in alike])
    _, (single,) = carry_to_sources(scores_of([0, 8], [0.0, 1.0]), rows=np.arange(48), source=source)
    assert single.could_be_chance and np.isnan(single.error).all(), "one row of each says nothing of their spread"


@pytest.mark.parametrize("means", [(0.9, 0.9001), (0.9, 0.9), (1e-6, 2e-6)])
def test_equal_scores_are_taken_in_random_order_however_close_sources_are(means: tuple[float, float]) -> None:
    size = 20_000
    values = np.repeat(np.array(means, np.float32), size)
    scores = scores_of(list(range(2 * size)), values)
    asked = {"budget": parse_budget("1000"), "tokens": np.ones(2 * size, np.int64)}
    made = choose_at_random_among_equals(scores, seed=0, **asked)
    assert made.rows.tolist() == list(range(2 * size)) and made.score.tolist() == values.tolist()
    assert made.example_weights.sum() == 1000 and set(np.flatnonzero(made.example_weights)) == set(made.order.tolist())
    assert made.rank[made.order].tolist() == list(range(1, 1001))
    first = 0 if means[0] == means[1] else size
    assert made.order.min() >= first, "rows of the worse source were taken"
    share = (made.order - first) / (2 * size - first)
    assert 0.45 < share.mean() < 0.55 and np.corrcoef(share, np.arange(1000))[0, 1] < 0.1
    again = choose_at_random_among_equals(scores, seed=0, **asked)
    other = choose_at_random_among_equals(scores, seed=1, **asked)
    assert again.order.tolist() == made.order.tolist() != other.order.tolist()


def test_without_equal_scores_the_choice_is_the_plain_one() -> None:
    draw = np.random.default_rng(3)
    scores = scores_of(list(range(0, 120, 2)), draw.normal(size=(60, 3)), group=[0, 0, 1])
    asked = {"budget": parse_budget("11"), "tokens": np.ones(120, np.int64), "first_of": np.arange(120) // 4 * 4}
    plain, shuffled = choose(scores, **asked), choose_at_random_among_equals(scores, seed=5, **asked)
    for name in ("rows", "order", "picked_for", "score", "rank", "example_weights"):
        assert getattr(plain, name).tolist() == getattr(shuffled, name).tolist(), name
