from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slow_selection import slow_take_turns, slow_turn
from tamis.selection.round_robin import Copies, TokenTurns, take_turns, turns


@st.composite
def pools(draw):
    """Small pools with many ties, copies, unavailable rows and uneven targets."""
    n, targets = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    group = np.array([*range(targets), *draw(st.lists(st.integers(0, targets - 1), max_size=4))])
    value = st.one_of(st.sampled_from([-2.0, -1.0, -0.5, 0.0]), st.floats(-1, 1, width=32))
    first_of = np.arange(n)
    for row in range(1, n):  # a copy points at the first of its group
        first_of[row] = draw(st.sampled_from([row, row, *np.unique(first_of[:row]).tolist()]))
    return {
        "values": draw(hnp.arrays(np.float32, (n, len(group)), elements=value)),
        "group": group,
        "shares": [draw(st.integers(1, 4)) for _ in range(targets)],
        "available": draw(hnp.arrays(bool, n, elements=st.sampled_from([True, True, False]))),
        "first_of": first_of,
        "tokens": draw(hnp.arrays(np.int64, n, elements=st.integers(1, 9))),
    }


@settings(max_examples=300)
@given(pools(), st.integers(1, 20), st.none() | st.integers(0, 60), st.none() | st.integers(1, 3), st.integers(1, 30))
def test_turns_taken_lazily_equal_the_plain_loop(pool, max_rows, max_tokens, first_count, block_values):
    fast = take_turns(
        pool["values"],
        group=pool["group"],
        shares=[share / sum(pool["shares"]) for share in pool["shares"]],
        available=pool["available"],
        max_rows=max_rows,
        copies=Copies(pool["first_of"]),
        tokens=pool["tokens"],
        max_tokens=max_tokens,
        first_count=first_count,
        block_values=block_values,
    )
    slow = slow_take_turns(
        pool["values"],
        pool["group"],
        [Fraction(share) for share in pool["shares"]],
        pool["available"],
        pool["first_of"],
        max_rows,
        pool["tokens"],
        max_tokens,
    )
    assert fast.rows.tolist() == slow.rows
    assert fast.target.tolist() == slow.target
    assert fast.column.tolist() == slow.column
    assert fast.tokens == pool["tokens"][slow.rows].sum()


@given(pools())
def test_available_array_is_left_as_it_was(pool):
    before = pool["available"].copy()
    take_turns(
        pool["values"], group=pool["group"], shares=pool["shares"], available=pool["available"], max_rows=len(before)
    )
    np.testing.assert_array_equal(pool["available"], before)


@given(pools(), st.randoms())
def test_without_ties_the_order_of_rows_in_the_pool_does_not_matter(pool, random):
    n, m = pool["values"].shape
    values = np.random.default_rng(random.randrange(2**32)).permutation(n * m).reshape(n, m).astype(np.float32)
    order = np.array(random.sample(range(n), n))
    take = {"group": pool["group"], "shares": pool["shares"], "max_rows": n}
    straight = take_turns(values, available=pool["available"], **take)
    shuffled = take_turns(values[order], available=pool["available"][order], **take)
    np.testing.assert_array_equal(order[shuffled.rows], straight.rows)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_turns_follow_shares(shares):
    taken = list(islice(turns(shares), 3 * sum(shares)))
    due = [Fraction(0)] * len(shares)
    assert taken == [slow_turn(due, [Fraction(share) for share in shares]) for _ in taken]
    for target, share in enumerate(shares):
        assert taken.count(target) == 3 * share  # exact after whole rounds
        for count in range(1, len(taken)):
            assert taken[:count].count(target) < count * share / sum(shares) + 1


def test_shares_as_rounded_decimals_do_not_drift():
    thirds, tenths = list(islice(turns([1 / 3] * 3), 3000)), list(islice(turns([0.1] * 10), 10_000))
    assert thirds == [0, 1, 2] * 1000
    assert tenths == list(range(10)) * 1000


def test_turns_refuse_shares_that_give_nobody_a_turn():
    with pytest.raises(ValueError, match="at least one above zero"):
        next(turns([0.0, 0.0]))


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
)
def test_token_turns_keep_every_target_less_than_a_row_ahead_of_its_share(shares, lengths):
    order, taken, longest = TokenTurns(shares), [0] * len(shares), [0] * len(shares)
    for length in lengths:
        target = order.next()
        order.pay(target, length)
        taken[target] += length
        longest[target] = max(longest[target], length)
        for own, share, most in zip(taken, shares, longest, strict=True):
            assert Fraction(own) <= Fraction(share, sum(shares)) * sum(taken) + most


def test_token_budget_is_shared_in_tokens_and_not_in_rows():
    # Target 0 wants the long rows, target 1 the short ones: by rows, half of the tokens would be a tenth of the rows.
    tokens = np.array([100] * 50 + [10] * 200)
    values = np.stack([np.linspace(1, 0, 250), np.linspace(0, 1, 250)], axis=1).astype(np.float32)
    take = {"group": np.array([0, 1]), "shares": [3, 1], "available": np.ones(250, bool), "tokens": tokens}
    by_tokens = take_turns(values, max_rows=250, max_tokens=2000, **take)
    spent = [int(tokens[by_tokens.rows[by_tokens.target == target]].sum()) for target in (0, 1)]
    assert spent == [1500, 500]
    by_rows = take_turns(values, max_rows=40, **take)
    assert np.bincount(by_rows.target).tolist() == [30, 10]


def test_rows_of_a_target_each_take_their_own_best():
    # Column 0 loves row 0, column 1 loves row 0 too but must take its second best; column 2 is another target.
    values = np.array([[9, 8, 0], [1, 7, 1], [8, 1, 5], [2, 2, 4]], np.float32)
    picks = take_turns(values, group=np.array([0, 0, 1]), shares=[1, 1], available=np.ones(4, bool), max_rows=4)
    assert picks.rows.tolist() == [0, 2, 1, 3]
    assert picks.target.tolist() == [0, 1, 0, 1]
    assert picks.column.tolist() == [0, 2, 1, 2]


def test_tokens_end_the_selection_at_the_first_row_that_does_not_fit():
    values = np.array([[4], [3], [2], [1]], np.float32)
    tokens = np.array([5, 5, 1, 1])
    take = {"group": np.array([0]), "shares": [1], "available": np.ones(4, bool), "max_rows": 4, "tokens": tokens}
    stopped = take_turns(values, max_tokens=9, **take)
    assert (stopped.rows.tolist(), stopped.tokens, stopped.was_stopped) == ([0], 5, True)  # not 0, 2, 3
    exact = take_turns(values, max_tokens=10, **take)
    assert (exact.rows.tolist(), exact.tokens, exact.was_stopped) == ([0, 1], 10, True)
    everything = take_turns(values, max_tokens=12, **take)
    assert (everything.rows.tolist(), everything.tokens, everything.was_stopped) == ([0, 1, 2, 3], 12, False)


def test_columns_that_want_the_same_rows_are_ranked_further():
    # All columns equal: every list is used up by the others, again and again.
    column = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    values = np.repeat(column[:, None], 7, axis=1)
    picks = take_turns(
        values, group=np.arange(7), shares=[1] * 7, available=np.ones(2000, bool), max_rows=1500, first_count=3
    )
    np.testing.assert_array_equal(picks.rows, np.argsort(-column, kind="stable")[:1500])
