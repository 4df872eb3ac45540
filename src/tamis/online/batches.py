"""From a trainer's inputs to batches that can be told apart by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamis.errors import Unsupported
from tamis.online.methods.choice import Vector
from tamis.types import Batch, IntArray

__all__ = ["IGNORED_LABEL", "regrouped", "supervised_tokens", "to_batches"]

IGNORED_LABEL = -100


def to_batches(inputs: Mapping[str, Any], rows: Tensor, *, most_rows: int) -> list[Batch]:
    """The rows with at least one supervised token, at most ``most_rows`` to a batch, padded columns cut on the right.

    No batch at all if no row has any. A label counts wherever it stands, as in the Trainer: masks made by
    ``ids != pad`` where ``pad`` is the end-of-text token are 0 at the label that ends a row.
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
    batches: list[Batch] = []
    if not len(usable):
        return batches
    for index in usable.split(most_rows):
        width = _length((mask[index] != 0).any(dim=0) | supervised[index].any(dim=0))
        batches.append(
            Batch(
                rows=rows.to(index.device)[index],
                input_ids=ids[index, :width],
                attention_mask=mask[index, :width],
                supervised=supervised[index, :width],
            )
        )
    return batches


def supervised_tokens(batches: Sequence[Batch]) -> Tensor:
    """Supervised tokens of every row, (n,)."""
    parts = [batch.supervised[:, 1:].sum(dim=1).cpu() for batch in batches]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def regrouped(candidates: Sequence[Batch], coefficients: Vector) -> list[tuple[Batch, Vector, IntArray]]:
    """The rows whose coefficient is not 0, in as few batches as hold them: each batch, its coefficients, its places.

    A batch holds as many rows as the largest of ``candidates``, which says what fits in memory. Places count through
    the rows of ``candidates``.
    """
    used = np.flatnonzero(coefficients).astype(np.int64)
    starts = np.cumsum([0, *(len(batch.rows) for batch in candidates)])
    most, found = max((len(batch.rows) for batch in candidates), default=1), []
    for first in range(0, len(used), most):
        at = used[first : first + most]
        batch_of = np.searchsorted(starts, at, side="right") - 1
        rows = [(candidates[b], int(i - starts[b])) for b, i in zip(batch_of, at, strict=True)]
        width = max(_length((batch.attention_mask[row] != 0) | batch.supervised[row]) for batch, row in rows)
        joined = Batch(
            rows=torch.stack([batch.rows[row] for batch, row in rows]),
            **{
                name: torch.stack([_cut(getattr(batch, name)[row], width) for batch, row in rows])
                for name in ("input_ids", "attention_mask", "supervised")
            },
        )
        found.append((joined, coefficients[at], at))
    return found


def _length(used: Tensor) -> int:
    """Columns up to the last one that is used."""
    return int(used.nonzero().max()) + 1


def _cut(row: Tensor, width: int) -> Tensor:
    """The row with zeros, or padded columns, added or taken away on the right."""
    return row[:width] if len(row) >= width else torch.nn.functional.pad(row, (0, width - len(row)))


def _is_empty_type_ids(key: str, value: Any) -> bool:
    """Tokenizers of one segment still name it, by zeros."""
    return key == "token_type_ids" and isinstance(value, Tensor) and not bool(value.any())
