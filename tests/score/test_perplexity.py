import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fake_task import FakeCorpus, FakeTask, random_tokens
from tamis.errors import NonFinite
from tamis.score.losses import row_losses
from tamis.score.perplexity import MidPpl, middle_scores
from tiny_models import tiny_model


def slow_losses(model, corpus, rows):
    """Token by token, one row at a time."""
    losses = []
    for row in rows:
        tokens = corpus[int(row)]
        ids = torch.from_numpy(tokens.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        labelled = [t for t in range(1, ids.shape[1]) if tokens.supervised[t]]
        losses.append(-sum(float(log_probs[t - 1, ids[0, t]]) for t in labelled) / len(labelled))
    return losses


@pytest.fixture
def task(tmp_path):
    pool = FakeCorpus("pool", random_tokens([9, 4, 12, 7, 15, 3, 8], seed=1))
    target = FakeCorpus("target", random_tokens([5, 6], seed=2))
    return FakeTask(pool=pool, target=target, store=tmp_path, model=tiny_model("llama", dtype=torch.float64))


def test_row_losses_equal_a_loop_over_tokens_and_are_computed_once(task):
    rows = np.array([0, 2, 3, 6])
    np.testing.assert_allclose(
        row_losses(task, task.pool, rows), slow_losses(task.model, task.pool, rows), rtol=1e-6
    )  # stored in float32
    row_losses(task, task.pool, rows)
    assert task.stages_run == [("losses", "pool")]


def test_row_with_a_loss_that_is_no_number_is_named(task):
    with torch.no_grad():
        task.model.get_input_embeddings().weight[int(task.pool[4].input_ids[0])] = math.nan
    with pytest.raises(NonFinite) as caught:
        row_losses(task, task.pool, np.array([4]))
    assert caught.value.rows == (4,)


def test_mid_ppl_takes_the_middle_of_the_sorted_perplexities(task):
    scores = MidPpl().score(task)
    expected = np.argsort(slow_losses(task.model, task.pool, range(7)))
    assert np.argsort(-scores.values[:, 0])[0] == expected[3]
    assert set(np.argsort(-scores.values[:, 0])[:3]) == set(expected[2:5])
    np.testing.assert_allclose(scores.extra["loss"], slow_losses(task.model, task.pool, range(7)), rtol=1e-6)


def test_middle_by_hand():
    np.testing.assert_allclose(middle_scores(np.array([0.5, 9.0, 1.0, 2.0])), [1 / 4, 1 / 4, 3 / 4, 3 / 4])
    np.testing.assert_allclose(middle_scores(np.array([3.0, 1.0, 1.0])), [1 / 3, 2 / 3, 2 / 3])  # ties share rank 1.5
    np.testing.assert_allclose(middle_scores(np.array([7.0])), [1])


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(0, 20, width=32)), st.integers(1, 30))
def test_best_rows_are_an_interval_of_the_losses_with_as_many_below_as_above(losses, k):
    losses = np.unique(losses)  # without ties
    k = min(k, len(losses))
    taken = np.sort(np.argsort(-middle_scores(losses), kind="stable")[:k])
    np.testing.assert_array_equal(taken, np.arange(taken[0], taken[0] + k))
    assert abs(int(taken[0]) - (len(losses) - k - int(taken[0]))) <= 1


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(0, 5, width=16)))
def test_perplexity_and_loss_have_the_same_middle(losses):
    np.testing.assert_array_equal(middle_scores(np.exp(losses.astype(np.float64))), middle_scores(losses))
