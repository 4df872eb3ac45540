import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import rankdata, spearmanr

from tamis.maths.ranks import mean_ranks, rank_correlation

VALUES = st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6)


@given(hnp.arrays(np.float64, st.integers(0, 30), elements=VALUES))
def test_ranks_are_those_of_scipy(values):
    np.testing.assert_array_equal(mean_ranks(values), rankdata(values))


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=VALUES))
def test_ranks_add_up_whatever_the_ties(values):
    assert mean_ranks(values).sum() == len(values) * (len(values) + 1) / 2


def test_ties_share_the_mean_of_their_ranks():
    assert mean_ranks(np.array([5, 1, 5, 5, 9])).tolist() == [3, 1, 3, 3, 5]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_rank_correlation_is_scipys_or_none_of_a_constant(pairs):
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    found = rank_correlation(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found is None
    else:
        assert abs(found - spearmanr(x, y).statistic) < 1e-12


def test_rank_correlation_of_opposite_orders_is_minus_one():
    assert rank_correlation(np.array([1.0, 5.0, 9.0]), np.array([0.3, 0.2, 0.1])) == -1
