"""Rows that know their place in the data set, through samplers, workers and collators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

__all__ = ["ROWS", "NumberedCollator", "NumberedRows"]

ROWS = "tamis_rows"  # the key under which a batch carries the places of its rows


class NumberedRows(Dataset[dict[str, Any]]):
    """The rows of a data set beside their places."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"row": self._rows[place], "place": place}


class NumberedCollator:
    """Collates the rows as ``collate`` does and adds their places to the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, numbered: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch, places included."""
        batch = dict(self._collate([item["row"] for item in numbered]))
        batch[ROWS] = torch.tensor([item["place"] for item in numbered], dtype=torch.int64)
        return batch
