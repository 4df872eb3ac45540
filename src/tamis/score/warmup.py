"""A method's own short fine-tuning run: LoRA on the task's model, or the adapter given, kept in the store."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.errors import InvalidSettings
from tamis.model.load import ModelSettings
from tamis.model.source import resolve_source
from tamis.model.targets import has_adapter
from tamis.seeds import child_seed
from tamis.training.loop import Spent, TrainSettings, num_steps
from tamis.training.lora import add_lora, train_adapter
from tamis.training.warmup import warmup
from tamis.types import IntArray

__all__ = ["WarmupPoint", "warmup_points", "warmup_training"]


@dataclass(frozen=True, kw_only=True)
class WarmupPoint:
    """A checkpoint of the run. No model: who scores at it loads it with `Task.at_model`, one at a time."""

    model_settings: ModelSettings
    folder: Path
    learning_rate: float  # mean over the updates since the checkpoint before it


def warmup_training(**settings: Any) -> TrainSettings:
    """The settings of the run; a method calls each of them ``warmup_<name>``, and so does the error.

    Raises:
        InvalidSettings: a value is out of range.
    """
    try:
        return TrainSettings(**settings)
    except InvalidSettings as error:
        raise InvalidSettings(f"warmup_{error}") from None  # the message begins with the setting's name


def warmup_points(
    task: Task,
    corpus: Corpus,
    rows: IntArray,
    settings: TrainSettings,
    *,
    method: str,
    lora_rank: int,
    lora_alpha: float,
    target_name: str | None = None,
) -> list[WarmupPoint]:
    """The run's checkpoints in order, trained now as far as they are not found trained.

    Args:
        task: the run starts from its model, of which a copy is loaded; the task's own is left alone.
        corpus: the pool or the target.
        rows: what to train on, positions in ``corpus``.
        settings: of the training.
        method: names the folder, the notes and the random stream.
        lora_rank: of the fresh adapter; a model that is an adapter already is trained as it is.
        lora_alpha: the fresh adapter's scale is ``lora_alpha / lora_rank``.
        target_name: the target that the rows belong to; None for rows of the pool, whose run all targets share.

    Raises:
        NonFinite: a loss or gradient is NaN or infinite.
        Unsupported: the adapter given cannot be trained, or a row does not fit in memory.
        StoreCorrupted: a checkpoint's bytes are not what was written.
    """
    base, seed = task.model_settings, child_seed(task.seed, f"{method} warm-up")
    source = resolve_source(base.name, base.revision)
    if source.is_adapter:
        task.note(f"{method} warmed up the adapter given, from where it stands; its LoRA settings were not used")

    def open_model() -> nn.Module:
        model = task.at_model(base).loaded.model  # not the task's own: training would change it
        if has_adapter(model):
            train_adapter(model, base=source.base)
        else:
            model = add_lora(model, rank=lora_rank, alpha=lora_alpha, seed=seed, base=base.name, revision=base.revision)
        return model

    spec = {
        "algorithm": "warm-up-v1",
        "training": asdict(settings),
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
        "seed": task.seed,
    }
    folder = task.workdir(f"{method}-warm-up", spec, uses_target=target_name is not None)
    if folder not in task.stages:
        task.stages.append(folder)  # a run found finished has its cost on disk, and no update to report it again

    def record(spent: Spent) -> None:
        counts = {k: v for k, v in asdict(spent).items() if k not in ("checkpoint", "elapsed_s")}
        task.record_cost(folder, spent.checkpoint, spent.elapsed_s, work="gradient", **counts)

    title = f"{method} warm-up" if target_name is None else f"{method} warm-up ({target_name})"
    with task.progress.stage(title, num_steps(settings, len(rows)), "updates") as advance:
        checkpoints = warmup(
            open_model,
            corpus,
            rows,
            settings,
            seed=seed,
            folder=folder,
            name_of=lambda row: corpus.examples.ids[row],
            advance=advance,
            on_checkpoint=record,
        )
    return [
        WarmupPoint(
            model_settings=replace(base, name=str(point.folder), revision=None),
            folder=point.folder,
            learning_rate=point.learning_rate,
        )
        for point in checkpoints
    ]
