"""RDS+ (Ivison et al., 2025): rows whose hidden states look like a target row's. One forward pass, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.maths.similarity import cosines
from tamis.model.flops import ModelShape, forward_flops
from tamis.model.states import weighted_mean_states
from tamis.score.matrix import empty_scores
from tamis.store.reader import StageReader
from tamis.types import Batch, IntArray, TargetScores
from tamis.values import check_types

__all__ = ["RdsPlus"]

_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class RdsPlus:
    """Cosine between position-weighted means of the last hidden states of pool row and target row.

    The ``i``-th token of a row of ``T`` tokens weighs ``i / (1 + ... + T)``, since later states have seen more of the
    row. ``positions="supervised"`` keeps those proportions and leaves out all tokens but the supervised ones: with
    long prompts the original form sees mostly the prompt.
    """

    name: ClassVar[str] = "rds+"
    positions: Literal["all", "supervised"] = "all"  # tokens that count: every one, or those that carry loss

    def __post_init__(self) -> None:
        check_types(self)

    def score(self, task: Task) -> TargetScores:
        """One column per target row."""
        targets = torch.from_numpy(self._embed(task, task.target, task.target_rows).read("embedding"))
        values = empty_scores(task, len(targets))
        pool = self._embed(task, task.pool, task.rows)
        for start, block in pool.blocks("embedding", _BLOCK_ROWS):
            values[start : start + len(block)] = cosines(torch.from_numpy(block), targets).numpy()
        return TargetScores(rows=task.rows, values=values, group=task.target_group, target_names=task.target_names)

    def _embed(self, task: Task, corpus: Corpus, rows: IntArray) -> StageReader:
        def start() -> Callable[[Batch], Mapping[str, Tensor]]:
            return lambda batch: {"embedding": weighted_mean_states(task.loaded.model, batch, self.positions)}

        spec = {"algorithm": "hidden-states-v1", "embedding": "rds+", "positions": self.positions}

        def operations(rows: float, tokens: float, supervised_tokens: float, squared_tokens: float) -> float:
            # The head is fed one state a batch, not the supervised ones: a row's at most.
            return forward_flops(ModelShape.from_model(task.loaded.model), tokens, rows, squared_tokens)

        return task.map_rows(
            corpus, rows, name="hidden-states", spec=spec, start=start, work="forward", operations=operations
        )
