import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import rankdata

from tamis.maths.ranks import mean_ranks

VALUES = st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6)


@given(hnp.arrays(np.float64, st.integers(0, 30), elements=VALUES))
def test_ranks_are_those_of_scipy(values):
    np.testing.assert_array_equal(mean_ranks(values), rankdata(values))


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=VALUES))
def test_ranks_add_up_whatever_the_ties(values):
    assert mean_ranks(values).sum() == len(values) * (len(values) + 1) / 2


def test_ties_share_the_mean_of_their_ranks():
    assert mean_ranks(np.array([5, 1, 5, 5, 9])).tolist() == [3, 1, 3, 3, 5]
