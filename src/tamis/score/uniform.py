"""A random draw: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tamis.collect import Task
from tamis.score.matrix import scores_without_target
from tamis.seeds import child_seed, random_uniform
from tamis.types import TargetScores

__all__ = ["Uniform"]


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Independent uniform scores in [0, 1).

    A row's score depends on the task's seed and on its place in the pool, not on which other rows are scored.
    """

    name: ClassVar[str] = "uniform"

    def score(self, task: Task) -> TargetScores:
        """The same random number of each row for every target."""
        return scores_without_target(task, random_uniform(child_seed(task.seed, "uniform"), len(task.pool))[task.rows])
