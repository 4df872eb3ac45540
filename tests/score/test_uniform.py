from dataclasses import replace

import numpy as np
import pytest

from fake_task import FakeCorpus, FakeTask, random_tokens
from tamis.score.uniform import Uniform


@pytest.fixture
def task(tmp_path):
    pool, target = FakeCorpus("pool", random_tokens([5] * 400)), FakeCorpus("target", random_tokens([4] * 3))
    return FakeTask(
        pool=pool, target=target, store=tmp_path, target_names=("a", "b"), target_group=np.array([0, 1, 1]), seed=3
    )


def test_scores_are_the_same_for_every_target_and_look_uniform(task):
    scores = Uniform().score(task)
    assert scores.values.shape == (400, 2)
    np.testing.assert_array_equal(scores.values[:, 0], scores.values[:, 1])
    assert scores.group.tolist() == [0, 1]
    # Mean of 400 uniform numbers: standard error 0.0144; four of them.
    assert abs(scores.values[:, 0].mean() - 0.5) < 0.058
    assert scores.values.min() >= 0
    assert scores.values.max() < 1


def test_a_rows_score_does_not_depend_on_which_other_rows_are_scored(task):
    everything = Uniform().score(task).values
    some = np.array([1, 7, 399])
    np.testing.assert_array_equal(Uniform().score(replace(task, rows=some)).values, everything[some])


def test_another_seed_is_another_draw(task):
    assert not np.array_equal(Uniform().score(task).values, Uniform().score(replace(task, seed=4)).values)
