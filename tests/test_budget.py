import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.budget import describe_budget, parse_budget, rows_for, times, tokens_for
from tamis.errors import InvalidSettings
from tamis.types import Budget


@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        (500, "rows", 500),
        (np.int64(7), "rows", 7),
        ("500", "rows", 500),
        (" 12_000 ", "rows", 12_000),
        ("10k", "rows", 10_000),
        ("500-rows", "rows", 500),
        ("1 row", "rows", 1),
        (0.05, "share", 0.05),
        (np.float32(0.5), "share", 0.5),
        ("0.05", "share", 0.05),
        (".05", "share", 0.05),
        ("5%", "share", 0.05),
        ("12.5 %", "share", 0.125),
        ("100%", "share", 1.0),
        (1.0, "share", 1.0),
        ("200k-tokens", "tokens", 200_000),
        ("1.5m-tokens", "tokens", 1_500_000),
        ("1.5M tokens", "tokens", 1_500_000),
        ("2b-tokens", "tokens", 2_000_000_000),
        ("4096-tokens", "tokens", 4096),
        (Budget(kind="tokens", value=10.0), "tokens", 10),
    ],
)
def test_budget_is_read_as_written(written, kind, value):
    assert parse_budget(written) == Budget(kind=kind, value=value)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (0, "must be above zero"),
        (-3, "must be above zero"),
        ("0%", "must be above zero"),
        (float("nan"), "must be above zero"),
        (float("inf"), "must be above zero"),
        ("101%", "is a share above the whole pool"),
        (500.0, "a number of rows is written without a decimal point"),
        ("1.5", "is a share above the whole pool"),
        ("0.5-tokens", "not a whole number of tokens"),
        ("2.5-rows", "not a whole number of rows"),
        ("1.0001k", "not a whole number of rows"),
        (True, "is not a number"),
        (None, "budget: expected a number or a text, got None"),
        ([1], "budget: expected a number or a text, got [1]"),
        ("", "cannot read the budget ''"),
        ("five", "cannot read the budget 'five'"),
        ("-5%", "cannot read the budget '-5%'"),
        ("5k%", "cannot read the budget '5k%'"),
        ("200k-token-rows", "cannot read the budget"),
        ("1e3", "cannot read the budget '1e3'"),
    ],
)
def test_budget_that_cannot_be_is_refused(written, problem):
    with pytest.raises(InvalidSettings, match=re.escape(problem)):
        parse_budget(written)


@given(st.sampled_from(["rows", "share", "tokens"]), st.integers(1, 10**9))
def test_budget_can_be_written_out_and_read_again(kind, number):
    budget = Budget(kind=kind, value=number / 10**9 if kind == "share" else float(number))
    assert parse_budget(describe_budget(budget)) == budget


def test_share_is_rounded_to_the_nearest_row_and_is_never_nothing():
    assert rows_for(parse_budget("5%"), 1000) == 50
    assert rows_for(parse_budget("29%"), 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert rows_for(parse_budget("5%"), 30) == 2  # 1.5 rounds up
    assert rows_for(parse_budget("1%"), 3) == 1
    assert rows_for(parse_budget("100%"), 7) == 7


def test_budget_over_the_pool_is_refused_with_both_numbers():
    with pytest.raises(InvalidSettings, match="budget of 500 rows, but the pool has 300"):
        rows_for(parse_budget(500), 300)
    with pytest.raises(InvalidSettings, match="budget of 2000 tokens, but the pool has 1500"):
        tokens_for(parse_budget("2k-tokens"), 1500)


def test_units_are_not_mixed_up():
    with pytest.raises(InvalidSettings, match="counts tokens, but a number of rows is needed"):
        rows_for(parse_budget("10-tokens"), 300)
    with pytest.raises(InvalidSettings, match="counts rows, but a number of tokens is needed"):
        tokens_for(parse_budget("10"), 300)


def test_shortlist_is_a_multiple_of_the_budget_within_the_pool():
    pool = {"num_rows": 100, "num_tokens": 1000}
    assert times(parse_budget(10), 3, **pool) == Budget(kind="rows", value=30)
    assert times(parse_budget("5%"), 2.5, **pool) == Budget(kind="rows", value=13)
    assert times(parse_budget(60), 3, **pool) == Budget(kind="rows", value=100)
    assert times(parse_budget("300-tokens"), 2, **pool) == Budget(kind="tokens", value=600)
    assert times(parse_budget("300-tokens"), 5, **pool) == Budget(kind="tokens", value=1000)
    with pytest.raises(InvalidSettings, match=r"keeps 0\.5 times the budget; the factor must be at least 1"):
        times(parse_budget(10), 0.5, **pool)
