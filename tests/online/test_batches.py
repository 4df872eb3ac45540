"""Which rows a choice sees: batches without padding, and target rows that take turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.online import target_turns
from tamis.online.batches import to_batches
from tamis.online.target_turns import target_positions


def test_rows_without_any_supervised_token_make_no_batch() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    nothing = torch.full_like(ids, -100)
    assert to_batches({"input_ids": ids, "labels": nothing}, torch.arange(2), most_rows=4) == []


@given(count=st.integers(1, 12), total=st.integers(1, 30), seed=st.integers(0, 5))
def test_no_choice_holds_a_row_twice_and_every_turn_has_all_rows(count: int, total: int, seed: int) -> None:
    choices = [target_positions(k, count=count, total=total, seed=seed) for k in range(25)]
    drawn = np.concatenate(choices)
    for turn in range(len(drawn) // total):
        assert sorted(drawn[turn * total : (turn + 1) * total]) == list(range(total))
    for choice in choices:
        held = np.bincount(choice, minlength=total)
        assert held.max() <= (1 if count <= total else -(-count // total) + 1)


@pytest.mark.parametrize(("count", "total"), [(3, 7), (5, 7)])
def test_a_resumed_run_draws_what_the_other_would_have(count: int, total: int) -> None:
    straight = [target_positions(k, count=count, total=total, seed=4).tolist() for k in range(300)]
    target_turns._order.cache_clear()
    assert target_positions(299, count=count, total=total, seed=4).tolist() == straight[299]
    target_turns._order.cache_clear()
    assert target_positions(2000, count=count, total=total, seed=4).tolist()
