"""Loss drop: how much easier a row has become after a short warm-up on the target. Forward passes only.

After *Let the Target Select for Itself: Data Selection via Target-Aligned Paths* (2026): a small-capacity copy of the
model is trained briefly on the target's rows, and a pool row scores by its relative drop (l0 - l1) / l0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from tamis.collect import Task
from tamis.errors import InvalidSettings
from tamis.score.losses import row_losses
from tamis.score.matrix import scores_of_targets
from tamis.score.warmup import warmup_points, warmup_training
from tamis.training.loop import TrainSettings
from tamis.types import FloatArray, IntArray, TargetScores
from tamis.values import check_types

__all__ = ["LossDrop", "relative_drops"]


@dataclass(frozen=True, kw_only=True)
class LossDrop:
    """Relative drop of each pool row's loss after some updates of a LoRA copy on the target's rows.

    One warm-up and one more forward pass over the pool for every target, so with many targets it is the dearest of the
    scores without gradients. Positive: training on the target lowered the row's loss, taken as a sign of the reverse.
    A model that is an adapter already is trained as it is.

    As measured so far it ranks much like the plain gradient dot product, and like it prefers short answers;
    ``length_power=0.5`` holds against that. The learning rate and the eight updates of eight rows are those of that
    measurement.

    Args:
        warmup_steps: updates of the warm-up.
        warmup_update_rows: target rows of one update.
        warmup_learning_rate: the peak.
        lora_rank: rank of the copy's adapter; its scale is 2.
        length_power: the drop is multiplied by this power of the row's supervised tokens; 0 is the authors' form.

    Raises:
        InvalidSettings: a value is out of range.
    """

    name: ClassVar[str] = "loss-drop"

    warmup_steps: int = 8
    warmup_update_rows: int = 8
    warmup_learning_rate: float = 1e-3
    lora_rank: int = 8
    length_power: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.lora_rank < 1:
            raise InvalidSettings(f"lora_rank must be at least 1, got {self.lora_rank}")
        self.warmup_settings()  # checks the others

    def warmup_settings(self) -> TrainSettings:
        """The fine-tuning run on the target; only its end is kept."""
        return warmup_training(
            steps=self.warmup_steps,
            save_steps=self.warmup_steps,
            update_rows=self.warmup_update_rows,
            learning_rate=self.warmup_learning_rate,
        )

    def score(self, task: Task) -> TargetScores:
        """One column per target; ``extra`` holds the rows' losses before the warm-up.

        Raises:
            NonFinite: a loss is NaN or infinite, in the warm-up or after it.
        """
        before = row_losses(task, task.pool, task.rows)
        weight = task.pool.supervised[task.rows].astype(np.float64) ** self.length_power
        columns = []
        for group, name in enumerate(task.target_names):
            warmed = self._warmup(task, task.target_rows[task.target_group == group], name)
            columns.append(relative_drops(before, row_losses(warmed, task.pool, task.rows)) * weight)
            del warmed  # its model, before the next one is loaded
        note = "loss-drop tends to prefer short answers"
        if self.length_power:
            note += f", against which its scores were multiplied by supervised tokens ** {self.length_power:g}"
        else:
            note += "; compare the lengths, or try length_power=0.5"
        return scores_of_targets(task, np.stack(columns, axis=1), extra={"loss": before}, notes=(f"{note}.",))

    def _warmup(self, task: Task, rows: IntArray, target_name: str) -> Task:
        """The task at the model as it is after training on ``rows`` of the target."""
        *_, last = warmup_points(
            task,
            task.target,
            rows,
            self.warmup_settings(),
            method=self.name,
            lora_rank=self.lora_rank,
            lora_alpha=2.0 * self.lora_rank,
            target_name=target_name,
        )
        return task.at_model(last.model_settings)


def relative_drops(before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"]) -> FloatArray:
    """``(before − after) / before``, at most 1; 0 for a row whose loss was 0 and has nothing left to drop."""
    start = before.astype(np.float64)
    drops = np.divide(start - after, start, out=np.zeros_like(start), where=start > 0)
    return np.asarray(drops, np.float32)
