"""Mid-PPL (Yin and Rush, 2024; baseline of influence distillation): the rows in the middle of the perplexities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from tamis.collect import Task
from tamis.maths.ranks import mean_ranks
from tamis.score.losses import row_losses
from tamis.score.matrix import scores_without_target
from tamis.types import FloatArray, TargetScores

__all__ = ["MidPpl", "middle_scores"]


@dataclass(frozen=True, kw_only=True)
class MidPpl:
    """Rows sorted by perplexity under the model, and the middle ones taken. Ignores the target.

    The perplexity is exp(loss) over the supervised tokens: of the answer, where the papers' pools are plain text.
    """

    name: ClassVar[str] = "mid-ppl"

    def score(self, task: Task) -> TargetScores:
        """The same number of each row for every target; ``extra`` holds the rows' losses."""
        losses = row_losses(task, task.pool, task.rows)
        return scores_without_target(task, middle_scores(losses), extra={"loss": losses})


def middle_scores(losses: Float[np.ndarray, " n"]) -> FloatArray:
    """How near the middle of the ranks each loss lies: 1 for the median, towards 0 for the least and the largest.

    Ranks, not distances, as in the papers: the selected rows are a run of the sorted pool with as many rows left out
    below as above. The order of perplexities is that of losses. Equal losses share their mean rank.

    >>> middle_scores(np.array([0.5, 9.0, 1.0], np.float32)).round(2).tolist()
    [0.33, 0.33, 1.0]
    """
    n = len(losses)
    rank = mean_ranks(losses)  # 1 .. n
    return np.asarray(1 - np.abs(2 * rank - (n + 1)) / n, np.float32)
