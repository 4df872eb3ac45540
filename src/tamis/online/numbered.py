"""Rows that know their place in the data set, through samplers, workers and collators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from tamis.online.batches import IGNORED_LABEL

__all__ = ["ROWS", "NumberedCollator", "NumberedRows", "filler"]

ROWS = "tamis_rows"  # the key under which a batch carries the places of its rows


def filler(place: int) -> int:
    """The place of a row that makes a batch full and is no candidate; it is read at ``place`` and loses its labels."""
    return -1 - place


class NumberedRows(Dataset[dict[str, Any]]):
    """The rows of a data set beside their places."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"row": self._rows[place if place >= 0 else filler(place)], "place": place}


class NumberedCollator:
    """Collates the rows as ``collate`` does and adds their places to the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, numbered: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch, places included; fillers have no labels, so that nobody takes them for candidates."""
        batch = dict(self._collate([item["row"] for item in numbered]))
        places = torch.tensor([item["place"] for item in numbered], dtype=torch.int64)
        if "labels" in batch and bool((places < 0).any()):
            batch["labels"] = batch["labels"].clone()
            batch["labels"][places < 0] = IGNORED_LABEL
        batch[ROWS] = places
        return batch
