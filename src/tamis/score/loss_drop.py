"""Loss drop: how much easier a row has become after a short warm-up on the target. Forward passes only.

After *Let the Target Select for Itself: Data Selection via Target-Aligned Paths* (2026): a small-capacity copy of the
model is trained briefly on the target's rows, and a pool row scores by its relative drop (l0 - l1) / l0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from torch import nn

from tamis.collect import Task
from tamis.errors import InvalidSettings
from tamis.model.source import resolve_source
from tamis.model.targets import has_adapter
from tamis.score.losses import row_losses
from tamis.score.matrix import scores_of_targets
from tamis.seeds import child_seed
from tamis.train.loop import Spent, TrainSettings
from tamis.train.lora import add_lora, train_adapter
from tamis.train.warm_up import warm_up
from tamis.types import FloatArray, IntArray, TargetScores

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
        steps: updates of the warm-up.
        batch_rows: target rows of one update.
        learning_rate: the peak.
        lora_rank: rank of the copy's adapter; its scale is 2.
        length_power: the drop is multiplied by this power of the row's supervised tokens; 0 is the authors' form.

    Raises:
        InvalidSettings: a value is out of range.
    """

    name: ClassVar[str] = "loss-drop"

    steps: int = 8
    batch_rows: int = 8
    learning_rate: float = 1e-3
    lora_rank: int = 8
    length_power: float = 0.0

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise InvalidSettings(f"lora_rank must be at least 1, got {self.lora_rank}")
        if not math.isfinite(self.length_power):
            raise InvalidSettings(f"length_power must be a finite number, got {self.length_power}")
        self.warm_up_settings()  # checks the others

    def warm_up_settings(self) -> TrainSettings:
        """The fine-tuning run on the target; only its end is kept."""
        return TrainSettings(
            steps=self.steps, save_steps=self.steps, batch_rows=self.batch_rows, learning_rate=self.learning_rate
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
            warmed = self._warm_up(task, task.target_rows[task.target_group == group], name)
            columns.append(relative_drops(before, row_losses(warmed, task.pool, task.rows)) * weight)
        note = "loss-drop tends to prefer short answers"
        if self.length_power:
            note += f", against which its scores were multiplied by supervised tokens ** {self.length_power:g}"
        else:
            note += "; compare the lengths, or try length_power=0.5"
        return scores_of_targets(task, np.stack(columns, axis=1), extra={"loss": before}, notes=(f"{note}.",))

    def _warm_up(self, task: Task, rows: IntArray, target_name: str) -> Task:
        """The task at the model as it is after training on ``rows`` of the target; trained now unless found trained."""
        settings, base = self.warm_up_settings(), task.model_settings
        seed = child_seed(task.seed, "loss-drop warm-up")
        if resolve_source(base.name, base.revision).is_adapter:
            task.note("loss-drop warmed up the adapter given, from where it stands; lora_rank was not used")

        def open_model() -> nn.Module:
            model = task.at_model(base).loaded.model  # not the task's own: training would change it
            if has_adapter(model):
                train_adapter(model)
            else:
                rank, alpha = self.lora_rank, 2.0 * self.lora_rank
                model = add_lora(model, rank=rank, alpha=alpha, seed=seed, base=base.name, revision=base.revision)
            return model

        spec = {
            "training": asdict(settings),
            "lora_rank": self.lora_rank,
            "rows": rows.tolist(),
            "seed": task.seed,
        }
        folder = task.workdir("loss-drop-warm-up", spec)

        def record(spent: Spent) -> None:
            counts = {k: v for k, v in asdict(spent).items() if k not in ("checkpoint", "elapsed_s")}
            task.record_cost(folder, spent.checkpoint, spent.elapsed_s, work="gradient", **counts)

        with task.progress.stage(f"loss-drop warm-up ({target_name})", self.steps, "updates") as advance:
            checkpoints = warm_up(
                open_model,
                task.target,
                rows,
                settings,
                seed=seed,
                folder=folder,
                name_of=lambda row: task.target.examples.ids[row],
                advance=advance,
                on_checkpoint=record,
            )
        return task.at_model(replace(base, name=str(checkpoints[-1].folder), revision=None))


def relative_drops(before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"]) -> FloatArray:
    """``(before − after) / before``, at most 1; 0 for a row whose loss was 0 and has nothing left to drop."""
    start = before.astype(np.float64)
    drops = np.divide(start - after, start, out=np.zeros_like(start), where=start > 0)
    return np.asarray(drops, np.float32)
