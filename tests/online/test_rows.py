"""Tokenized rows reach the trainer with labels where there is loss, padded on the right."""

from __future__ import annotations

import numpy as np
import torch

from online_runs import collate
from tamis.online.batches import to_batches
from tamis.online.rows import PaddingCollator, TokenRows
from tamis.types import TokenizedExample


def corpus() -> list[TokenizedExample]:
    rows = [([5, 6, 7], [0, 0, 1]), ([8, 9], [0, 1]), ([3, 4, 5, 6, 7], [0, 1, 1, 0, 1])]
    return [
        TokenizedExample(
            input_ids=np.array(ids, dtype=np.int32), supervised=np.array(mask, dtype=np.bool_), truncated=0
        )
        for ids, mask in rows
    ]


def test_rows_are_those_asked_for_with_labels_where_there_is_loss() -> None:
    data = TokenRows(corpus(), np.array([2, 0]))
    assert len(data) == 2
    assert data[0]["labels"].tolist() == [-100, 4, 5, -100, 7]
    assert data[1]["input_ids"].tolist() == [5, 6, 7] and data[1]["labels"].tolist() == [-100, -100, 7]


def test_batches_are_those_of_a_collator_written_out() -> None:
    data = TokenRows(corpus(), np.arange(3))
    rows = [data[place] for place in range(3)]
    batch, expected = PaddingCollator(0)(rows), collate(rows)
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    padded = PaddingCollator(63)(rows)
    assert padded["input_ids"][1].tolist() == [8, 9, 63, 63, 63]
    (found,) = to_batches(padded, torch.arange(3), most_rows=3)
    assert found.supervised.sum(dim=1).tolist() == [1, 1, 3]
