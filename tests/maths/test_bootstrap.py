"""The interval of a rank correlation: draws with replacement, ranked anew, against SciPy on the rows written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tamis.maths.bootstrap import DRAWS, FEWEST_ROWS, draw_rows, middle, rank_agreement, resampled_correlation


@given(seed=st.integers(0, 9999), ties=st.booleans())
def test_a_resampled_correlation_is_that_of_the_rows_written_out(seed: int, ties: bool) -> None:
    draw = np.random.default_rng(seed)
    x, y = (draw.normal(size=30).astype(np.float32) for _ in range(2))
    if ties:
        x, y = np.round(x), np.round(y)
    counts = np.stack([np.bincount(draw.integers(0, 30, 30), minlength=30) for _ in range(3)])
    written = [np.repeat(np.arange(30), line) for line in counts]
    expected = [stats.spearmanr(x[rows], y[rows]).statistic for rows in written]
    np.testing.assert_allclose(resampled_correlation(x, y, counts), expected, rtol=0, atol=1e-12)


def test_a_draw_in_which_one_side_is_constant_has_no_correlation() -> None:
    x = np.array([0.0, 0.0, 0.0, 5.0])
    counts = np.array([[1, 2, 1, 0], [0, 0, 0, 4], [1, 1, 1, 1]])
    np.testing.assert_array_equal(resampled_correlation(x, x, counts), [np.nan, np.nan, 1])


def test_every_draw_has_as_many_rows_as_there_are_and_all_rows_are_drawn_alike() -> None:
    counts = draw_rows(10, seed=3)
    assert counts.shape == (DRAWS, 10) and (counts.sum(axis=1) == 10).all()
    # Every row: 10000 draws at 1 in 10, so 1000 with a deviation of 30; the seed is fixed, five of them are generous.
    np.testing.assert_allclose(counts.sum(axis=0), 1000, rtol=0, atol=150)
    np.testing.assert_array_equal(counts, draw_rows(10, seed=3))
    assert (counts != draw_rows(10, seed=4)).any()


def test_the_middle_is_that_of_95_percent() -> None:
    assert middle(np.arange(1000.0), rows=20) == pytest.approx((24.975, 974.025))  # 0.025 and 0.975 times 999


def test_the_mean_and_its_interval_are_of_the_columns_that_have_a_ranking() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(50, 2))
    y = x + draw.normal(size=(50, 2))
    found = rank_agreement(x, y, seed=1)
    expected = [stats.spearmanr(x[:, j], y[:, j]).statistic for j in range(2)]
    assert found.columns == pytest.approx(tuple(expected)) and found.mean == pytest.approx(np.mean(expected))
    assert found.middle is not None and found.middle[0] < np.mean(expected) < found.middle[1] and found.draws == DRAWS
    blank = np.ones((50, 1))
    with_blank = rank_agreement(np.hstack([x, blank]), np.hstack([y, y[:, :1]]), seed=1)
    assert with_blank.columns[2] is None
    assert (with_blank.mean, with_blank.middle) == (found.mean, found.middle)
    nothing = rank_agreement(blank, y[:, :1], seed=1)
    assert (nothing.columns, nothing.mean, nothing.middle, nothing.draws) == ((None,), None, None, 0)


def test_three_rows_that_agree_have_a_correlation_and_no_interval() -> None:
    x = np.arange(float(FEWEST_ROWS))[:, None]
    for rows in (3, FEWEST_ROWS - 1):
        found = rank_agreement(x[:rows], x[:rows] ** 3, seed=0)
        assert found.mean == pytest.approx(1) and found.middle is None
    assert rank_agreement(x, x**3, seed=0).middle == pytest.approx((1, 1))


def test_draws_without_a_ranking_are_left_out_and_counted() -> None:
    few = np.zeros((20, 1))
    few[:2] = [[1.0], [2.0]]  # a draw without both has only zeros: 12 in 100 have neither
    found = rank_agreement(few, few, seed=0)
    assert found.mean == 1 and found.middle == pytest.approx((1, 1))
    expected = DRAWS * (1 - 0.9**20)
    assert abs(found.draws - expected) < 5 * np.sqrt(expected * 0.9**20)  # five deviations, and the seed is fixed


def test_there_is_no_interval_if_most_draws_have_no_ranking() -> None:
    x, y = np.zeros((20, 1)), np.zeros((20, 1))
    x[0], y[1] = 1, 1  # both rows must be drawn: four draws in ten
    found = rank_agreement(x, y, seed=0)
    assert found.mean == pytest.approx(-1 / 19) and found.middle is None
    assert 0.3 * DRAWS < found.draws < 0.5 * DRAWS
