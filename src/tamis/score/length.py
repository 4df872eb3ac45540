"""Length of the answer alone: what a score has explained if it selects the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tamis.collect import Task
from tamis.score.matrix import scores_without_target
from tamis.types import TargetScores
from tamis.values import check_types

__all__ = ["Length"]


@dataclass(frozen=True, kw_only=True)
class Length:
    """Supervised tokens of the row, after truncation; negated with ``order="shortest"``."""

    name: ClassVar[str] = "length"
    order: Literal["longest", "shortest"] = "longest"  # which rows come first

    def __post_init__(self) -> None:
        check_types(self)

    def score(self, task: Task) -> TargetScores:
        """The same number of each row for every target."""
        supervised = task.pool.supervised[task.rows]
        return scores_without_target(task, supervised if self.order == "longest" else -supervised)
