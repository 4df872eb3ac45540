"""Tokenized rows as a trainer takes them: a data set of input ids and labels, and a collator that pads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tamis.online.batches import IGNORED_LABEL
from tamis.types import IntArray, TokenizedExample

__all__ = ["PaddingCollator", "TokenRows"]


class TokenRows(Dataset[dict[str, Any]]):
    """Some rows of a corpus, read when they are asked for.

    Args:
        corpus: tokenized rows by position.
        rows: the positions that make up the data set, in its order.
    """

    def __init__(self, corpus: Sequence[TokenizedExample], rows: IntArray) -> None:
        self._corpus, self.rows = corpus, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        tokens = self._corpus[int(self.rows[place])]
        ids = tokens.input_ids.astype(np.int64)
        return {"input_ids": ids, "labels": np.where(tokens.supervised, ids, IGNORED_LABEL)}


class PaddingCollator:
    """Rows padded on the right, with an attention mask; no label where a row is padded."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each (B, T)."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": np.full((len(rows), width), self._pad_id, dtype=np.int64),
            "attention_mask": np.zeros((len(rows), width), dtype=np.int64),
            "labels": np.full((len(rows), width), IGNORED_LABEL, dtype=np.int64),
        }
        for at, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][at, :length] = row["input_ids"]
            batch["attention_mask"][at, :length] = 1
            batch["labels"][at, :length] = row["labels"]
        return {name: torch.from_numpy(values) for name, values in batch.items()}
