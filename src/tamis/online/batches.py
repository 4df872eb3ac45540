"""From a trainer's inputs to batches that can be told apart by rows, and which target rows a step looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamis.errors import Unsupported
from tamis.seeds import child_seed, random_permutation
from tamis.types import Batch, IntArray

__all__ = ["IGNORED_LABEL", "target_positions", "to_batches"]

IGNORED_LABEL = -100


def to_batches(inputs: Mapping[str, Any], rows: Tensor, *, most_rows: int) -> list[Batch]:
    """The rows with at least one supervised token, at most ``most_rows`` to a batch, padded columns cut on the right.

    ``rows`` names each row of ``inputs`` (its position in the data set). Labels are the input ids themselves or -100.

    Raises:
        Unsupported: the inputs hold something that a plain causal language model's batch does not have.
    """
    known = {"input_ids", "attention_mask", "labels"}
    extra = [key for key in inputs if key not in known and not _is_empty_type_ids(key, inputs[key])]
    if extra:
        raise Unsupported(
            f"batches hold '{extra[0]}' beside input_ids, attention_mask and labels; packed or padding-free rows and "
            "inputs of other kinds cannot be told apart as candidates: turn packing off or drop the column"
        )
    missing = [key for key in ("input_ids", "labels") if key not in inputs]
    if missing:
        raise Unsupported(
            f"batches hold no '{missing[0]}'; use a collator that makes labels, -100 where there is no loss"
        )
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    supervised = labels != IGNORED_LABEL
    if bool((labels[supervised] != ids[supervised]).any()):
        raise Unsupported("labels differ from the input ids they stand at; a plain next-token loss expects them equal")
    if mask.dim() != 2:
        raise Unsupported(f"attention_mask has shape {tuple(mask.shape)}; expected one value per token")
    usable = supervised[:, 1:].any(dim=1).nonzero()[:, 0]
    batches = []
    for index in usable.split(most_rows):
        width = int((mask[index] != 0).any(dim=0).nonzero().max()) + 1
        batches.append(
            Batch(
                rows=rows.to(index.device)[index],
                input_ids=ids[index, :width],
                attention_mask=mask[index, :width],
                supervised=supervised[index, :width] & (mask[index, :width] != 0),
            )
        )
    return batches


def target_positions(number: int, *, count: int, total: int, seed: int) -> IntArray:
    """Target rows of choice ``number`` (from 0): fresh ones every time, none again before all had their turn.

    A function of its arguments alone, so a resumed run goes on where the other stopped.
    """
    first = number * count
    found = np.empty(count, dtype=np.int64)
    for place in range(count):
        turn, at = divmod(first + place, total)
        if place == 0 or at == 0:
            order = random_permutation(child_seed(seed, "target order", turn), total)
        found[place] = order[at]
    return found


def _is_empty_type_ids(key: str, value: Any) -> bool:
    """Tokenizers of one segment still name it, by zeros."""
    return key == "token_type_ids" and isinstance(value, Tensor) and not bool(value.any())
