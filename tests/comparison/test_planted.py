"""Planted pools hold what they say, and selections from them are counted right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tamis.comparison.planted import KINDS, PlantedPool, answer, plant, score_selection
from tamis.errors import InvalidInput
from tiny_run import chat


def sums(count: int) -> list[tuple[str, Any]]:
    return [("sums", chat(f"What is {i} plus one?", f"It is of course {i + 1}.")) for i in range(count)]


def talk(count: int, source: str = "talk") -> list[tuple[str, Any]]:
    return [(source, chat(f"Tell me of {i}.", f"Number {i} is a fine number indeed.")) for i in range(count)]


def test_counts_of_a_planted_pool() -> None:
    pool = plant(sums(8), talk(20) + talk(3, "rare"), seed=0)
    assert pool.counts() == {
        "relevant": 8,
        "copy": 2,
        "wrong answer": 4,
        "truncated": 2,
        "irrelevant": 8,
        "background": 18,
        "background, wrong answer": 5,  # a quarter of talk; rare has too few rows
    }
    assert pool.relevant == 8 and len({row["id"] for row in pool.rows}) == len(pool.rows) == 47


def test_every_row_is_what_its_kind_says() -> None:
    relevant, background = sums(8), talk(20)
    originals = [given for _, given in relevant]
    pool = plant(relevant, background, seed=3)
    of_background = {given["messages"][0]["content"]: answer(given) for _, given in background}
    for row, kind, of in zip(pool.rows, pool.kinds, pool.of, strict=True):
        prompt, said = row["messages"][0]["content"], answer(row)
        if kind in ("relevant", "copy"):
            assert row["messages"] == originals[of]["messages"]
        elif kind == "wrong answer":
            assert prompt == originals[of]["messages"][0]["content"]
            assert said != answer(originals[of]) and said in [answer(one) for one in originals]
        elif kind == "truncated":
            assert answer(originals[of]).startswith(said) and len(said) < len(answer(originals[of]))
        elif kind == "background":
            assert of_background[prompt] == said and of == -1
        elif kind == "background, wrong answer":
            assert of_background[prompt] != said and said in of_background.values()
        else:
            assert prompt not in of_background and kind == "irrelevant"
    assert sums(8)[0][1] == originals[0]  # the user's rows are left as they were


def test_the_seed_alone_decides() -> None:
    assert plant(sums(6), talk(9), seed=1) == plant(sums(6), talk(9), seed=1)
    assert plant(sums(6), talk(9), seed=1).kinds != plant(sums(6), talk(9), seed=2).kinds


def test_too_few_relevant_rows_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at least 2"):
        plant(sums(1), talk(4), seed=0)


def hand_pool() -> PlantedPool:
    kinds = ("relevant", "relevant", "copy", "wrong answer", "wrong answer", "background", "truncated")
    group = ("a", "a", "a", "a", "a", "pool", "a")
    return PlantedPool(rows=(), kinds=kinds, of=(0, 1, 0, 0, 1, -1, 1), group=group, relevant=2)


def test_a_selection_is_counted_by_hand() -> None:
    score = np.array([0.9, 0.1, 0.9, 0.5, 0.2, np.nan, 0.3])
    found = score_selection(hand_pool(), np.array([0, 2, 3]), score)
    assert (found.selected, found.found, found.both_copies) == (3, 1, 1)
    assert found.precision == pytest.approx(1 / 3) and found.recall == 0.5 and found.of_the_task == 1.0
    assert found.taken == {**dict.fromkeys(KINDS, 0), "relevant": 1, "copy": 1, "wrong answer": 1}
    assert found.wrong_auc == 0.5  # .9 beats both wrong answers, .1 neither
    assert found.background_auc == 1.0  # a row that was not scored comes last
    assert found.source_auc is None


def test_a_perfect_selection_has_precision_and_recall_one() -> None:
    found = score_selection(hand_pool(), np.array([0, 1]), np.array([1.0, 1, 1, 0, 0, 0, 0]))
    assert found.precision == found.recall == found.wrong_auc == 1.0


def unequal_groups() -> PlantedPool:
    """Task a has one wrong answer, task b three; two sources of the pool likewise."""
    kinds = ("relevant", "wrong answer", "relevant", "wrong answer", "wrong answer", "wrong answer")
    pool = ("background", "background, wrong answer", "background", *["background, wrong answer"] * 3)
    return PlantedPool(
        rows=(), kinds=(*kinds, *pool), of=(0, 0, 1, 1, 1, 1, *[-1] * 6),
        group=("a", "a", "b", "b", "b", "b", "x", "x", "y", "y", "y", "y"), relevant=2,
    )  # fmt: skip


def test_areas_of_groups_count_as_much_as_they_have_wrong_answers() -> None:
    tasks = [0.5, 0.1, 0.2, 0.3, 0.4, 0.1]  # all right in a; one of three in b
    sources = [0.1, 0.5, 0.9, 0.3, 0.4, 0.1]  # all wrong in x; all right in y
    found = score_selection(unequal_groups(), np.array([0]), np.array([*tasks, *sources]))
    assert found.wrong_auc == pytest.approx((1 * 1 + 3 * (1 / 3)) / 4)
    assert found.source_auc == pytest.approx((1 * 0 + 3 * 1) / 4)


def test_rows_that_were_not_scored_come_last_below_any_score() -> None:
    """By hand, with scores below zero: an unscored wrong answer loses, an unscored right one does not win."""
    lost = np.array([-1.0, np.nan, -1.0, np.nan, -2.0, -0.5, -1.0, np.nan, -1.0, -2.0, -2.0, np.nan])
    found = score_selection(unequal_groups(), np.array([0]), lost)
    assert found.wrong_auc == pytest.approx((1 + 3 * (2 / 3)) / 4)
    assert found.source_auc == 1.0
    unscored = np.where(np.arange(12) == 0, np.nan, -1.0)
    found = score_selection(unequal_groups(), np.array([0]), unscored)
    assert found.wrong_auc == pytest.approx((1 * 0 + 3 * 0.5) / 4)
    assert found.background_auc == pytest.approx((0 + 0 + 0.5 + 0.5) / 4)
