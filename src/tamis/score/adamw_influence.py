"""Offline selection by AdamW-influence: train once on the whole pool, then ask what each row did to the target.

*How Faithful Is Trajectory-Based Data Attribution?* (section 5, "offline"): the longest possible look-ahead, along a
reference run that is recorded and swept backwards.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import nn

from tamis.collect import Task
from tamis.disk import replace_atomically
from tamis.errors import InvalidSettings
from tamis.identity import rows_sha256
from tamis.model.flops import ModelShape, stage_flops
from tamis.model.load import template_text
from tamis.model.processes import barrier, is_main
from tamis.model.targets import has_adapter
from tamis.score.decisions import kept_tensors
from tamis.score.matrix import scores_of_targets
from tamis.stages import read_cost
from tamis.training.lora import add_lora, train_adapter
from tamis.trajectory.adjoint import steps_back
from tamis.trajectory.reference_run import ReferenceSettings, reference_run
from tamis.trajectory.sweep import SweepSettings, run_sweep
from tamis.trajectory.token_rows import TokenRow
from tamis.types import IntArray, TargetScores
from tamis.values import check_types

__all__ = ["AdamwInfluence"]

_DONE = "scores.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdamwInfluence:
    """Influence of each pool row on each target's mean loss at the end of a LoRA run over the pool.

    A row used in several epochs gets the sum over its uses. Positive: without the row the target loss would end higher.
    The dearest method here: training on all rows, the same again as a replay, and three times that for the way back. It
    tells what rows did in *this* run, which ranks them together with their place in it; online selection with a short
    ``lookahead`` was as good or better in the paper.

    Args:
        epochs: of the reference run.
        update_rows: rows of an update.
        learning_rate: the peak.
        clip: largest norm of an update's gradient.
        lora_rank: of the fresh adapter; a model that is an adapter is trained as it is.
        lora_alpha: None for twice the rank.
        curvature: "exact", "ggn", "fisher" or "none".

    Raises:
        InvalidSettings: a value is out of range.
    """

    name: ClassVar[str] = "adamw-influence"

    epochs: int = 1
    update_rows: int = 16
    learning_rate: float = 2e-4
    clip: float = 1.0
    lora_rank: int = 8
    lora_alpha: float | None = None
    curvature: Literal["exact", "ggn", "fisher", "none"] = "exact"

    def __post_init__(self) -> None:
        check_types(self)
        if self.update_rows < 1:
            raise InvalidSettings(f"update_rows must be at least 1, got {self.update_rows}")
        if self.lora_rank < 1:
            raise InvalidSettings(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise InvalidSettings(f"lora_alpha must be positive, got {self.lora_alpha}")
        SweepSettings(curvature=self.curvature)
        self.reference_settings()  # checks the others

    def reference_settings(self) -> ReferenceSettings:
        """The run that is attributed."""
        return ReferenceSettings(
            epochs=self.epochs, update_rows=self.update_rows, learning_rate=self.learning_rate, clip=self.clip
        )

    def score(self, task: Task) -> TargetScores:
        """One column per target.

        Raises:
            NonFinite: a loss or gradient is NaN or infinite.
            Unsupported: a trained parameter has 16 bits.
        """
        settings = asdict(self)
        spec = {"algorithm": "adamw-influence-v2", "rows": rows_sha256(task.rows), "seed": task.seed}
        targets = {"targets": task.target_group.tolist(), "target_rows": task.target_rows.tolist()}
        asked = {**spec, **targets, "settings": dict(settings)}
        settings.pop("curvature")  # the run knows of it no more than of the target, and serves others
        trained = task.workdir("adamw-influence-run", {**spec, "settings": settings}, uses_target=False)
        folder = task.workdir("adamw-influence", asked)
        for path in (trained, folder):
            if path not in task.stages:
                task.stages.append(path)
        if is_main() and not (folder / _DONE).is_file():
            self._compute(task, trained, folder)
        barrier()
        values: npt.NDArray[np.float64] = kept_tensors(folder / _DONE)["scores"].numpy()
        task.note(
            "adamw-influence scored rows by what they did in one reference run over all of them, in which early and "
            "late updates differ in weight; compare with `tamis verify` before relying on single scores."
        )
        return scores_of_targets(task, values.astype(np.float32))

    def _compute(self, task: Task, trained: Path, folder: Path) -> None:
        model = self._model(task)
        rows = [_token_row(one) for one in task.pool.take(task.rows)]
        target = [_token_row(one) for one in task.target.take(task.target_rows)]
        settings, template = self.reference_settings(), task.model_settings.chat_template
        total = self.epochs * -(-len(rows) // self.update_rows)
        started = time.perf_counter()
        with task.progress.stage("reference run", total, "updates") as advance:
            run, numbers = reference_run(
                model, rows, settings, seed=task.seed, folder=trained / "run", name=task.model_settings.name,
                chat_template=None if template is None else template_text(template), advance=advance,
            )  # fmt: skip
        ours, theirs = task.pool.sizes(task.rows), task.target.sizes(task.target_rows)
        if read_cost(trained) is None:  # else it was trained for another target
            _record(task, model, trained, started, {name: count * self.epochs for name, count in ours.items()})
        started = time.perf_counter()
        micros = run.micros_of(target, most=self.update_rows)
        with task.progress.stage("sweep", total, "updates") as advance:
            found = run_sweep(
                run, micros, SweepSettings(curvature=self.curvature), group=task.target_group.tolist(),
                folder=folder / "sweep", advance=advance,
            )["scores"]  # fmt: skip
        targets = len(task.target_names)
        by_number = np.zeros((len(run.rows), targets))
        for index, scores in enumerate(found):
            np.add.at(by_number, run.step(index).rows, scores.double().numpy())
        # Exact copies share a number: each gets its part of what they did together.
        copies = np.bincount(np.array(numbers), minlength=len(run.rows))
        values = torch.from_numpy((by_number / np.maximum(copies, 1)[:, None])[np.array(numbers)])
        # The run's replay, and the way back, which starts at the gradients of the target: all rows for each target.
        times = self.epochs * (1 + steps_back(self.curvature, values=targets))
        counts = {name: round(ours[name] * times) + theirs[name] * targets for name in ours}
        _record(task, model, folder, started, counts)
        replace_atomically(folder / _DONE, (save({"scores": values.contiguous()}),))

    def _model(self, task: Task) -> nn.Module:
        """A copy of the task's model with what trains of it."""
        model: nn.Module = task.at_model(task.model_settings).loaded.model
        if has_adapter(model):
            train_adapter(model)
        else:
            alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
            model = add_lora(model, rank=self.lora_rank, alpha=alpha, seed=task.seed)
        return model


def _record(task: Task, model: nn.Module, folder: Path, started: float, counts: dict[str, int]) -> None:
    others = [count for name, count in counts.items() if name != "rows"]
    task.record_cost(
        folder, 0, time.perf_counter() - started, work="gradient", **counts,
        operations=stage_flops(ModelShape.from_model(model), "gradient", *others),
    )  # fmt: skip


def _token_row(one: Any) -> TokenRow:
    supervised: npt.NDArray[np.bool_] = one.supervised
    ids: IntArray = one.input_ids
    return TokenRow(ids=ids.astype(np.int32), supervised=supervised).trimmed()
