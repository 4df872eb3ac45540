"""Rows of similar length together, padded on the right. Which rows, not in which order they are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tamis.errors import InvalidInput, InvalidSettings
from tamis.types import Batch, IntArray, TokenizedExample

__all__ = ["collate", "plan_batches"]


def plan_batches(lengths: IntArray, *, batch_tokens: int, max_rows: int | None = None) -> list[IntArray]:
    """Every position of ``lengths`` in exactly one batch of padded size (rows x longest) at most ``batch_tokens``.

    A single row longer than that gets a batch of its own. Longest rows come first, so that memory runs out at the
    start or not at all. A function of its arguments alone; equal lengths keep their order.

    Raises:
        InvalidSettings: ``batch_tokens`` or ``max_rows`` is below 1.
        InvalidInput: a row has no token.
    """
    if batch_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise InvalidSettings(f"batch_tokens={batch_tokens}, max_rows={max_rows}: expected 1 or more")
    if len(lengths) and int(np.min(lengths)) < 1:
        raise InvalidInput(f"row {int(np.argmin(lengths))} has no token; leave such rows out")
    order = np.argsort(-lengths, kind="stable").astype(np.int64)
    batches: list[IntArray] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        count = max(1, batch_tokens // longest)
        if max_rows is not None:
            count = min(count, max_rows)
        batches.append(order[start : start + count])
        start += count
    return batches


def collate(rows: IntArray, examples: Sequence[TokenizedExample], pad_id: int) -> Batch:
    """One padded batch of ``examples``, which stand at positions ``rows`` of their corpus (same order, same number)."""
    assert len(rows) == len(examples) > 0
    width = max(len(example.input_ids) for example in examples)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)  # (B, T)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)  # (B, T)
    supervised = np.zeros((len(rows), width), dtype=np.bool_)  # (B, T)
    for b, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[b, :length] = example.input_ids
        attention_mask[b, :length] = 1
        supervised[b, :length] = example.supervised
    return Batch(
        rows=torch.from_numpy(np.array(rows, dtype=np.int64)),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        supervised=torch.from_numpy(supervised),
    )
