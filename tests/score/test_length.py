import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_task import FakeCorpus, FakeTask
from tamis.errors import InvalidSettings
from tamis.score.length import Length
from tamis.types import TokenizedExample


def pool_of(masks):
    return FakeCorpus(
        "pool",
        [
            TokenizedExample(input_ids=np.zeros(len(m), np.int32), supervised=np.array(m, bool), truncated=0)
            for m in masks
        ],
    )


def task_of(masks, tmp_path, **more):
    return FakeTask(pool=pool_of(masks), target=pool_of([[0, 1]]), store=tmp_path, **more)


def test_length_counts_supervised_tokens_not_prompt_tokens(tmp_path):
    # The first token is never predicted, so its label does not count.
    task = task_of([[0, 0, 0, 0, 1], [0, 1, 1], [1, 1, 1, 1]], tmp_path)
    assert Length().score(task).values[:, 0].tolist() == [1, 2, 3]
    assert Length(order="shortest").score(task).values[:, 0].tolist() == [-1, -2, -3]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_shortest_is_longest_upside_down_for_every_target(tmp_path_factory, masks):
    task = task_of(masks, tmp_path_factory.getbasetemp(), target_names=("a", "b"))
    longest, shortest = Length().score(task), Length(order="shortest").score(task)
    np.testing.assert_array_equal(longest.values, -shortest.values)
    np.testing.assert_array_equal(longest.values, np.repeat([[sum(m[1:])] for m in masks], 2, axis=1))


def test_only_the_rows_of_the_task_are_scored(tmp_path):
    task = task_of([[0, 1], [0, 1, 1], [0, 1, 1, 1]], tmp_path, rows=np.array([0, 2]))
    assert Length().score(task).values[:, 0].tolist() == [1, 3]


def test_unknown_order_is_refused():
    with pytest.raises(InvalidSettings, match="order='middle': expected one of longest, shortest"):
        Length(order="middle")
