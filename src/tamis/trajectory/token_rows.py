"""Rows of tokens as a run is made of: which ones a batch holds, each stored once, and batches made of them again.

A row is its tokens up to the last supervised one: what follows, padding included, has no loss and, in a causal model,
no influence on one. So the same row is the same row in every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tamis.errors import Unsupported
from tamis.types import Batch

__all__ = ["IGNORED_LABEL", "TOKEN_INPUTS", "TokenMicro", "TokenRow", "collate_rows", "rows_of_inputs"]

IGNORED_LABEL = -100
TOKEN_INPUTS = ("input_ids", "attention_mask", "labels")
# What a training forward pass of a causal language model may be given; the last ones change nothing of the loss.
_KNOWN = {*TOKEN_INPUTS, "num_items_in_batch", "use_cache", "fused_lm_head", "return_dict"}


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Token ids and which of them carry loss, up to the last of those."""

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]

    def digest(self) -> bytes:
        """Equal for equal rows."""
        return hashlib.sha256(self.ids.tobytes() + b"|" + self.supervised.tobytes()).digest()[:16]

    def trimmed(self) -> TokenRow:
        """Without what follows the last supervised token; there must be one."""
        supervised = self.supervised.copy()
        supervised[0] = False  # nothing predicts it
        stop = int(np.flatnonzero(supervised)[-1]) + 1
        return TokenRow(ids=self.ids[:stop], supervised=supervised[:stop])


@dataclass(frozen=True, kw_only=True)
class TokenMicro:
    """Rows that go through the model together, and the randomness of that pass if the model has any."""

    batch: Batch
    random_state: Mapping[str, Tensor] | None = None  # of the generators, by device type

    def __len__(self) -> int:
        return len(self.batch.rows)

    def apart(self) -> list[TokenMicro] | None:
        """Its rows, each on its own and without padding; None where dropout drew one mask for all of them."""
        return None if self.random_state is not None else [TokenMicro(batch=row) for row in self.batch.split(1)]


def rows_of_inputs(inputs: Mapping[str, Any]) -> list[TokenRow | None]:
    """Every row of a batch as it is given to the model; None for one that carries no loss.

    Raises:
        Unsupported: the batch holds something that a plain causal language model's batch does not have.
    """
    extra = [key for key, value in inputs.items() if key not in _KNOWN and value is not None]
    if extra:
        raise Unsupported(
            f"batches hold '{extra[0]}' beside input_ids, attention_mask and labels; packed or padding-free rows and "
            "inputs of other kinds cannot be told apart as samples: turn packing off or drop the column"
        )
    if inputs.get("input_ids") is None or inputs.get("labels") is None:
        raise Unsupported(
            "a training batch has no input_ids or no labels; a recorded run must be one of a causal model"
        )
    ids, labels = (inputs[key].detach().cpu().numpy() for key in ("input_ids", "labels"))
    mask = inputs.get("attention_mask")
    mask = np.ones_like(ids) if mask is None else mask.detach().cpu().numpy()
    if mask.ndim != 2 or bool((np.diff(mask.astype(np.int64), axis=1) > 0).any()):
        raise Unsupported("rows are padded on the left or masked inside; pad them on the right, the replay does too")
    supervised = labels != IGNORED_LABEL
    # A mask made by ``ids != pad`` where ``pad`` is the end-of-text token hides the label that ends a row. The model
    # learns it all the same, and no prediction attends to it; one behind it would.
    later = np.flip(np.cumsum(np.flip(supervised, axis=1), axis=1), axis=1) - supervised
    if bool(((mask == 0) & (later > 0)).any()):
        raise Unsupported(
            "a row has labels behind a token with attention_mask 0; set labels of padding to -100, or mask padding "
            "alone"
        )
    if bool((labels[supervised] != ids[supervised]).any()):
        raise Unsupported("labels differ from the input ids they stand at; a plain next-token loss expects them equal")
    return [
        TokenRow(ids=one.astype(np.int32), supervised=own).trimmed() if own[1:].any() else None
        for one, own in zip(ids, supervised, strict=True)
    ]


def collate_rows(
    rows: Sequence[TokenRow], numbers: Sequence[int], *, device: torch.device | str, width: int | None = None
) -> Batch:
    """Right-padded rows; ``numbers`` names them, ``width`` is the least number of columns."""
    columns = max(width or 0, *(len(row.ids) for row in rows))
    ids = np.zeros((len(rows), columns), dtype=np.int64)
    mask, supervised = np.zeros_like(ids), np.zeros(ids.shape, dtype=np.bool_)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)], mask[at, : len(row.ids)] = row.ids, 1
        supervised[at, : len(row.ids)] = row.supervised
    return Batch(
        rows=torch.tensor(list(numbers), dtype=torch.int64, device=device),
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        supervised=torch.from_numpy(supervised).to(device),
    )
