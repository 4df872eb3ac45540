"""The loss of every row under the task's model: one forward pass, kept in the store, shared by all that need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.model.loss import per_sample_losses, require_finite
from tamis.types import Batch, FloatArray, IntArray

__all__ = ["loss_of_batches", "row_losses"]


def row_losses(task: Task, corpus: Corpus, rows: IntArray) -> FloatArray:
    """Mean cross-entropy of each row over its supervised tokens, ``(n,)`` in the order of ``rows``.

    Raises:
        NonFinite: a loss is NaN or infinite (names the rows).
    """
    reader = task.map_rows(
        corpus,
        rows,
        name="losses",
        spec={"algorithm": "losses-v1"},
        start=lambda: loss_of_batches(task.loaded.model),
        work="forward",
    )
    return np.asarray(reader.read("loss"), np.float32)


def loss_of_batches(model: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
    """The function that `Task.map_rows` applies to every batch: ``loss`` under ``model``."""

    def losses(batch: Batch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            found = per_sample_losses(model, batch)
        require_finite(found, batch)
        return {"loss": found.float()}

    return losses
