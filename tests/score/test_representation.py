import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_task import FakeCorpus, FakeTask, padded_batch, random_tokens
from tamis.errors import InvalidSettings, NonFinite
from tamis.model.states import last_hidden_states, weighted_mean_states
from tamis.score.representation import RdsPlus
from tiny_models import FAMILIES, padded_by, permuted, random_batch, tiny_model


def slow_embedding(model, tokens, positions):
    """One row alone: Transformers' own hidden states, and the sum written out."""
    ids = torch.from_numpy(tokens.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    total, weights = torch.zeros(states.shape[1], dtype=torch.float64), 0
    for position in range(1, len(states) + 1):
        if positions == "all" or tokens.supervised[position - 1]:
            total += position * states[position - 1].double()
            weights += position
    return (total / weights).numpy()


def slow_cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def make_task(tmp_path, model):
    return FakeTask(
        pool=FakeCorpus("pool", random_tokens([9, 4, 12, 7, 3], seed=1)),
        target=FakeCorpus("target", random_tokens([5, 6, 11], seed=2)),
        store=tmp_path,
        model=model,
        target_names=("a", "b"),
        target_group=np.array([0, 0, 1]),
    )


@pytest.mark.parametrize("positions", ["all", "supervised"])
@pytest.mark.parametrize(("family", "lora"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_scores_equal_one_row_at_a_time(tmp_path, family, lora, positions):
    task = make_task(tmp_path, tiny_model(family, dtype=torch.float32, lora=lora))
    scores = RdsPlus(positions=positions).score(task)
    pool = [slow_embedding(task.model, task.pool[i], positions) for i in range(5)]
    targets = [slow_embedding(task.model, task.target[j], positions) for j in range(3)]
    expected = [[slow_cosine(x, y) for y in targets] for x in pool]
    np.testing.assert_allclose(scores.values, expected, rtol=0, atol=1e-5)  # float32 states, padded and not
    assert scores.group.tolist() == [0, 0, 1]


def test_state_of_one_token_is_its_own_mean():
    model = tiny_model("llama", dtype=torch.float32)
    batch = random_batch([1, 1])
    states = last_hidden_states(model, batch)
    torch.testing.assert_close(weighted_mean_states(model, batch, "all"), states[:, 0])


def test_weights_by_hand(monkeypatch):
    states = torch.eye(3)[None].repeat(2, 1, 1)  # the t-th state is the t-th unit vector
    monkeypatch.setattr("tamis.model.states.last_hidden_states", lambda model, batch: states)
    batch = random_batch([3, 2])
    batch = replace(batch, supervised=torch.tensor([[False, True, True], [False, True, False]]))
    torch.testing.assert_close(
        weighted_mean_states(None, batch, "all"), torch.tensor([[1 / 6, 2 / 6, 3 / 6], [1 / 3, 2 / 3, 0]])
    )
    torch.testing.assert_close(
        weighted_mean_states(None, batch, "supervised"), torch.tensor([[0, 2 / 5, 3 / 5], [0, 1.0, 0]])
    )


@settings(max_examples=25)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=4), st.integers(0, 5), st.randoms())
def test_padding_and_batch_order_have_no_effect(lengths, extra, random):
    model = tiny_model("llama", dtype=torch.float32)
    batch = random_batch(lengths)
    order = random.sample(range(len(lengths)), len(lengths))
    plain = weighted_mean_states(model, batch, "all")
    other = weighted_mean_states(model, padded_by(permuted(batch, order), extra), "all")
    torch.testing.assert_close(other, plain[order], rtol=0, atol=1e-5)  # float32 through two blocks


def test_model_and_its_head_are_left_as_they_were(tmp_path):
    model = tiny_model("gpt2", dtype=torch.float32, dropout=0.5).train()
    task = make_task(tmp_path, model)
    once, again = RdsPlus().score(task).values, RdsPlus().score(replace(task, _stored={})).values
    np.testing.assert_array_equal(once, again)  # no dropout
    assert model.training
    batch = padded_batch(task.pool, np.arange(2))
    assert model(input_ids=batch.input_ids).logits.shape[:2] == batch.input_ids.shape


def test_both_positions_are_stages_of_their_own(tmp_path):
    task = make_task(tmp_path, tiny_model("llama", dtype=torch.float32))
    RdsPlus().score(task)
    RdsPlus().score(task)
    assert task.stages_run == [("hidden-states", "target"), ("hidden-states", "pool")]
    RdsPlus(positions="supervised").score(task)
    assert len(task.stages_run) == 4


def test_state_that_is_no_number_is_named(tmp_path):
    task = make_task(tmp_path, tiny_model("llama", dtype=torch.float32))
    with torch.no_grad():
        task.model.get_input_embeddings().weight[int(task.target[1].input_ids[0])] = math.nan
    with pytest.raises(NonFinite, match="hidden states of rows 1 are NaN or infinite"):
        RdsPlus().score(task)


def test_unknown_positions_are_refused():
    with pytest.raises(InvalidSettings, match="positions='last': expected one of all, supervised"):
        RdsPlus(positions="last")
