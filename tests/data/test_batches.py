from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.data.batches import collate, plan_batches
from tamis.errors import InvalidInput, InvalidSettings
from tamis.types import TokenizedExample

lengths = st.lists(st.integers(1, 300), max_size=80).map(lambda values: np.array(values, dtype=np.int64))
budgets = st.integers(1, 1000)
limits = st.none() | st.integers(1, 7)


@given(lengths, budgets, limits)
def test_every_row_is_in_exactly_one_batch(values, batch_tokens, max_rows):
    batches = plan_batches(values, batch_tokens=batch_tokens, max_rows=max_rows)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(values)))


@given(lengths, budgets, limits)
def test_padded_size_stays_within_the_budget_unless_one_row_exceeds_it(values, batch_tokens, max_rows):
    for batch in plan_batches(values, batch_tokens=batch_tokens, max_rows=max_rows):
        assert len(batch) == 1 or len(batch) * values[batch].max() <= batch_tokens
        assert max_rows is None or len(batch) <= max_rows


@given(lengths, budgets, limits)
def test_same_lengths_give_the_same_batches(values, batch_tokens, max_rows):
    first = plan_batches(values, batch_tokens=batch_tokens, max_rows=max_rows)
    second = plan_batches(values.copy(), batch_tokens=batch_tokens, max_rows=max_rows)
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in second]


@given(lengths, budgets)
def test_no_two_neighbouring_batches_would_fit_into_one(values, batch_tokens):
    batches = plan_batches(values, batch_tokens=batch_tokens)
    for one, next_one in pairwise(batches):
        assert (len(one) + 1) * values[one].max() > batch_tokens
        assert values[one].min() >= values[next_one].max()  # similar lengths stay together


def test_hand_case():
    batches = plan_batches(np.array([3, 10, 4, 2, 4]), batch_tokens=8, max_rows=None)
    assert [batch.tolist() for batch in batches] == [[1], [2, 4], [0, 3]]


def test_impossible_settings_and_empty_rows_are_refused():
    with pytest.raises(InvalidSettings, match="batch_tokens=0, max_rows=None: expected 1 or more"):
        plan_batches(np.array([1]), batch_tokens=0)
    with pytest.raises(InvalidInput, match="row 1 has no token; leave such rows out"):
        plan_batches(np.array([1, 0]), batch_tokens=4)


def test_collate_pads_on_the_right_and_labels_no_padding():
    rows = [
        TokenizedExample(
            input_ids=np.array(ids, dtype=np.int32), supervised=np.array(mask, dtype=np.bool_), truncated=0
        )
        for ids, mask in (([5, 6], [False, True]), ([7, 8, 9], [True, False, True]))
    ]
    batch = collate(np.array([4, 2]), rows, pad_id=0)
    assert batch.rows.tolist() == [4, 2]
    assert batch.input_ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.supervised.tolist() == [[False, True, False], [True, False, True]]
    assert batch.input_ids.dtype == batch.rows.dtype == torch.int64
