import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slow_selection import slow_take_turns
from tamis.budget import parse_budget
from tamis.errors import InvalidSettings, NonFinite
from tamis.selection.choose import choose, target_means, target_shares
from tamis.types import TargetScores

TARGETS = ("maths", "code")


def scores_of(values, rows=None, group=None, names=TARGETS):
    values = np.asarray(values, np.float32)
    return TargetScores(
        rows=np.arange(len(values)) if rows is None else np.asarray(rows),
        values=values,
        group=np.asarray([0] * values.shape[1] if group is None else group),
        target_names=names[: 1 if group is None else max(group) + 1],
    )


VALUES = [[4, 1, 3], [3, 3, 0], [2, 5, 1], [1, 2, 2]]  # two rows of target 0, one of target 1
HUNDRED = np.full(4, 100)


def test_round_robin_by_hand():
    choice = choose(scores_of(VALUES, group=[0, 0, 1]), budget=parse_budget(3), tokens=HUNDRED)
    assert choice.order.tolist() == [
        0,
        3,
        2,
    ]  # maths row 0 takes 0; code, left with 1, 2, 3, takes 3; maths row 1 takes 2
    assert choice.picked_for.tolist() == [0, 1, 0]
    np.testing.assert_allclose(choice.target_scores, [[2.5, 3], [3, 0], [3.5, 1], [1.5, 2]])
    np.testing.assert_allclose(choice.score, [2.75, 1.5, 2.25, 1.75])
    assert choice.rank.tolist() == [1, 4, 3, 2]
    assert choice.example_weights.tolist() == [1, 0, 1, 1]
    assert (choice.tokens, choice.shares, choice.warnings) == (300, (0.5, 0.5), ())


def test_mean_by_hand():
    choice = choose(scores_of(VALUES, group=[0, 0, 1]), budget=parse_budget(2), tokens=HUNDRED, aggregate="mean")
    assert choice.order.tolist() == [2, 0]  # maths' highest mean is row 2, code's highest is row 0


@given(st.data(), st.integers(1, 12), st.sampled_from(["round-robin", "mean"]), st.booleans())
def test_choice_equals_the_plain_loop(data, n, aggregate, by_tokens):
    num_pool = n + data.draw(st.integers(0, 4))
    rows = np.sort(data.draw(st.permutations(range(num_pool)).map(lambda order: np.array(order[:n]))))
    group = np.array([0, 1, 0])
    # Halves: their means are exact, so the oracle's ties are ties.
    values = data.draw(hnp.arrays(np.float32, (n, 3), elements=st.integers(-6, -1).map(lambda k: k / 2)))
    tokens = data.draw(hnp.arrays(np.int64, num_pool, elements=st.integers(1, 9)))
    eligible = data.draw(hnp.arrays(bool, num_pool))
    first_of = np.arange(num_pool)
    for row in range(1, num_pool):
        first_of[row] = data.draw(st.sampled_from([row, row, *np.unique(first_of[:row]).tolist()]))
    budget = data.draw(st.integers(1, int(tokens.sum()) if by_tokens else num_pool))
    shares = {"maths": 3, "code": 1}

    def run():
        return choose(
            scores_of(values, rows, group),
            budget=parse_budget(f"{budget}-tokens" if by_tokens else budget),
            tokens=tokens,
            aggregate=aggregate,
            shares=shares,
            first_of=first_of,
            eligible=eligible,
            block_values=5,
        )

    means = np.stack([values[:, [0, 2]].mean(1), values[:, 1]], axis=1)
    slow = slow_take_turns(
        values if aggregate == "round-robin" else means,
        group if aggregate == "round-robin" else np.array([0, 1]),
        [Fraction(3, 4), Fraction(1, 4)],
        eligible[rows],
        first_of[rows],
        n if by_tokens else budget,
        tokens[rows],
        budget if by_tokens else None,
    )
    if not slow.rows:
        with pytest.raises(InvalidSettings):
            run()
        return
    choice = run()
    assert choice.order.tolist() == rows[slow.rows].tolist()
    assert choice.picked_for.tolist() == slow.target
    assert choice.tokens == tokens[choice.order].sum()
    np.testing.assert_array_equal(choice.target_scores, means)
    np.testing.assert_allclose(choice.score, 0.75 * means[:, 0] + 0.25 * means[:, 1], rtol=1e-6)
    assert sorted(choice.rank) == list(range(1, n + 1))
    np.testing.assert_array_equal(rows[np.argsort(choice.rank)][: len(choice.order)], choice.order)
    np.testing.assert_array_equal(choice.example_weights > 0, choice.rank <= len(choice.order))


@given(hnp.arrays(np.float32, (9, 3), elements=st.integers(-20, 20)))
def test_shift_and_positive_scale_of_a_column_do_not_change_round_robin(values):
    def order(v):
        return choose(scores_of(v, group=[0, 0, 1]), budget=parse_budget(5), tokens=np.ones(9, int)).order.tolist()

    assert order(values) == order(values * np.array([2, 8, 0.5], np.float32) - 7)


def test_of_copies_one_is_taken_and_it_is_the_best_scored():
    scores = scores_of([[1], [5], [9], [5]])
    first_of = np.array([0, 1, 0, 1])
    choice = choose(scores, budget=parse_budget("100%"), tokens=HUNDRED, first_of=first_of)
    assert choice.order.tolist() == [2, 1]
    assert choice.warnings == (
        "2 rows were selected though the budget (100%) allows 4: no more rows were left after copies, "
        "filters and the shortlist.",
    )
    assert choose(scores, budget=parse_budget("100%"), tokens=HUNDRED).order.tolist() == [2, 1, 3, 0]


def test_ineligible_row_does_not_stand_in_for_its_copies():
    choice = choose(
        scores_of([[9], [8], [1]]),
        budget=parse_budget(2),
        tokens=np.ones(3, int),
        first_of=np.array([0, 0, 2]),
        eligible=np.array([False, True, True]),
    )
    assert choice.order.tolist() == [1, 2]


def test_shares_divide_the_selection():
    values = np.zeros((40, 2))
    choice = choose(
        scores_of(values, group=[0, 1]),
        budget=parse_budget(20),
        tokens=np.ones(40, int),
        shares={"code": 1, "maths": 3},
    )
    assert np.bincount(choice.picked_for).tolist() == [15, 5]
    assert choice.shares == (0.75, 0.25)


def test_share_budget_counts_the_pool_not_the_shortlist():
    choice = choose(scores_of([[1], [2], [3]], rows=[2, 5, 9]), budget=parse_budget("20%"), tokens=np.ones(10, int))
    assert choice.order.tolist() == [9, 5]


def test_token_budget_is_never_exceeded_and_stops_at_the_first_row_that_does_not_fit():
    tokens = np.array([10, 300, 10, 10])
    choice = choose(scores_of([[4], [3], [2], [1]]), budget=parse_budget("100-tokens"), tokens=tokens)
    assert choice.order.tolist() == [0]
    assert choice.tokens == 10
    with pytest.raises(InvalidSettings, match="budget of 9-tokens is below the best row"):
        choose(scores_of([[4], [3], [2], [1]]), budget=parse_budget("9-tokens"), tokens=tokens)


def test_token_budget_left_over_for_want_of_rows_is_said():
    choice = choose(scores_of([[4], [3]], rows=[0, 1]), budget=parse_budget("25-tokens"), tokens=np.array([10, 10, 10]))
    assert choice.warnings[0].startswith("20 tokens were selected though the budget allows 25")


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ({"maths": 1, "cod": 1}, "share for 'cod', but the targets are 'maths', 'code'"),
        ({"maths": 1}, "no share for target 'code'"),
        ({"maths": 1, "code": 0}, "share of target 'code' is 0; shares must be above zero"),
        ({"maths": float("nan"), "code": 1}, "share of target 'maths' is nan"),
    ],
)
def test_impossible_shares_are_refused(shares, problem):
    with pytest.raises(InvalidSettings, match=re.escape(problem)):
        target_shares(TARGETS, shares)


def test_settings_that_cannot_select_are_refused():
    scores = scores_of(VALUES, group=[0, 0, 1])
    with pytest.raises(InvalidSettings, match="budget of 5 rows, but the pool has 4"):
        choose(scores, budget=parse_budget(5), tokens=HUNDRED)
    with pytest.raises(InvalidSettings, match="no row can be selected: 4 rows in the pool, 4 scored, none of them"):
        choose(scores, budget=parse_budget(1), tokens=HUNDRED, eligible=np.zeros(4, bool))
    with pytest.raises(InvalidSettings, match="aggregate 'median' is unknown; choose one of round-robin, mean"):
        choose(scores, budget=parse_budget(1), tokens=HUNDRED, aggregate="median")
    lonely = scores_of([[1], [2]])
    lonely = TargetScores(rows=lonely.rows, values=lonely.values, group=lonely.group, target_names=TARGETS)
    with pytest.raises(InvalidSettings, match="target 'code' has no row to score against"):
        choose(lonely, budget=parse_budget(1), tokens=np.ones(2, int))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_score_that_is_no_number_is_refused_by_row_and_target(bad):
    values = np.ones((6, 3), np.float32)
    values[4, 2] = bad
    scores = scores_of(values, rows=[10, 11, 12, 13, 14, 15], group=[0, 0, 1])
    with pytest.raises(NonFinite, match=rf"score of pool row 14 for target 'code' \(column 2\) is {bad}"):
        target_means(scores, block_values=6)


def test_largest_finite_scores_are_accepted():
    values = np.full((2, 3), np.finfo(np.float32).max)
    np.testing.assert_array_equal(target_means(scores_of(values)), values[:, :1])


def test_one_row_and_one_column_is_enough():
    choice = choose(scores_of([[-3.0]]), budget=parse_budget(1), tokens=np.array([7]))
    assert (choice.order.tolist(), choice.rank.tolist(), choice.tokens) == ([0], [1], 7)
