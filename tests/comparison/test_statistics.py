"""Tests of differences against SciPy, Holm's correction against its definition, and areas under curves by counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tamis.comparison.statistics import area_under_curve, holm, paired_test

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 40))
def test_paired_test_is_scipys(seed: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=n), draw.normal(size=n)
    found, wanted = paired_test(a, b), stats.ttest_rel(a, b)
    assert found.n == n
    # Both are the same double-precision formula in another order of operations.
    assert found.t == pytest.approx(float(wanted.statistic), rel=1e-9, abs=1e-12)
    assert found.p == pytest.approx(float(wanted.pvalue), rel=1e-9, abs=1e-12)
    interval = wanted.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((float(interval.low), float(interval.high)), rel=1e-9, abs=1e-12)


def test_a_single_pair_says_nothing_of_chance() -> None:
    found = paired_test([1.0], [0.5])
    assert found.difference == 0.5 and found.n == 1
    assert found.p is None and found.std is None and found.low is None


def test_equal_differences_are_as_likely_as_coins_that_fall_alike() -> None:
    assert paired_test([2.0, 3.0], [2.0, 3.0]).p == 1.0
    for n in (2, 3, 6):
        found = paired_test([k + 1.0 for k in range(n)], [float(k) for k in range(n)])
        assert found.p == pytest.approx(float(stats.binomtest(n, n).pvalue), rel=1e-12)
        assert found.t is None and found.low is None and found.std == 0.0


def test_equal_shares_of_right_answers_are_equal_whatever_their_last_bits_say() -> None:
    mine, theirs = [3 / 20, 7 / 20, 19 / 20], [2 / 20, 6 / 20, 18 / 20]
    assert len({a - b for a, b in zip(mine, theirs, strict=True)}) > 1
    assert paired_test(mine, theirs).p == 0.25
    assert paired_test([0.1 + 0.2, 0.5], [0.3, 0.5]).p == 1.0


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and no adjusted value falls below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-12)
    assert holm([0.4, None, 0.6]) == [0.8, None, 0.8]
    assert holm([]) == []


@given(P_VALUES)
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float]) -> None:
    adjusted = [p for p in holm(values) if p is not None]
    for level in (0.01, 0.05, 0.3):
        rejected, still = set(), True
        for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
            still = still and values[index] * (len(values) - place) <= level
            if still:
                rejected.add(values[index])
        assert {value for value, p in zip(values, adjusted, strict=True) if p <= level} == rejected


@given(P_VALUES)
def test_holm_never_helps_and_never_exceeds_one(values: list[float]) -> None:
    assert all(value <= p <= 1 for value, p in zip(values, holm(values), strict=True) if p is not None)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_area_is_the_share_of_pairs_in_the_right_order(higher: list[int], lower: list[int]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in higher for b in lower]
    assert area_under_curve(higher, lower) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_area_of_nothing_is_unknown() -> None:
    assert area_under_curve([], [1.0]) is None
