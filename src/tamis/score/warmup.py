"""A method's own short fine-tuning run: LoRA on the task's model, all of it, or the adapter given; in the store."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.disk import disk_errors
from tamis.errors import InvalidInput, InvalidSettings
from tamis.identity import rows_sha256
from tamis.model.flops import ModelShape, stage_flops, weight_gradient_flops
from tamis.model.limits import skeleton
from tamis.model.load import ModelSettings, load_tokenizer
from tamis.model.processes import barrier, is_main
from tamis.model.source import resolve_source
from tamis.model.targets import has_adapter
from tamis.seeds import child_seed, random_subset
from tamis.training.loop import Spent, TrainSettings, num_steps
from tamis.training.lora import add_lora, train_adapter
from tamis.training.warmup import warmup
from tamis.types import IntArray

__all__ = ["WarmupPoint", "random_warmup_rows", "warmup_flops", "warmup_points", "warmup_rows", "warmup_training"]

_FEWEST_BATCHES = 4  # updates that the smallest warm-up makes in an epoch, if the pool has the rows


@dataclass(frozen=True, kw_only=True)
class WarmupPoint:
    """A checkpoint of the run. No model: who scores at it loads it with `Task.at_model`, one at a time."""

    model_settings: ModelSettings
    folder: Path
    learning_rate: float  # mean over the updates since the checkpoint before it


def warmup_rows(share: float, update_rows: int, usable: int) -> int:
    """How many of ``usable`` rows a share of them is, though never fewer than four updates' worth while there are any.

    >>> warmup_rows(0.05, 32, 10_000), warmup_rows(0.05, 32, 1_000), warmup_rows(0.05, 32, 100)
    (500, 128, 100)
    """
    return min(max(math.ceil(share * usable), _FEWEST_BATCHES * update_rows), usable)


def warmup_flops(
    shape: ModelShape, tokens: float, supervised_tokens: float, squared_tokens: float, *, full: bool
) -> float:
    """Operations of training on so many tokens: with ``full`` also the gradient of every weight.

    The gradients of LoRA's own factors are small and left out.
    """
    operations = stage_flops(shape, "gradient", tokens, supervised_tokens, squared_tokens)
    return operations + (weight_gradient_flops(shape, tokens) if full else 0.0)


def random_warmup_rows(task: Task, method: str, *, share: float, update_rows: int, rows: int | None = None) -> IntArray:
    """A random part of the pool's usable rows for a warm-up, ascending; it does not depend on the target.

    Args:
        task: its whole pool counts, not only a shortlist.
        method: names the random stream.
        share: of the usable rows, as ``warmup_rows`` counts them.
        update_rows: rows of one update.
        rows: their number, in place of the share; all if there are fewer.

    Raises:
        InvalidInput: the pool has no usable row.
    """
    usable = np.flatnonzero(task.pool.usable)
    if not len(usable):
        raise InvalidInput("no row of the pool has a supervised token, so there is nothing to warm up on")
    count = warmup_rows(share, update_rows, len(usable)) if rows is None else min(rows, len(usable))
    chosen = random_subset(child_seed(task.seed, f"{method} warm-up"), len(usable), count)
    return usable[chosen].astype(np.int64)


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
    lora_rank: int | None,
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
        lora_rank: of the fresh adapter; a model that is an adapter already is trained as it is. None: no adapter, all
            weights of the model train.
        lora_alpha: the fresh adapter's scale is ``lora_alpha / lora_rank``.
        target_name: the target that the rows belong to; None for rows of the pool, whose run all targets share.

    Raises:
        InvalidSettings: all weights are to train, but the model is an adapter, or its weights have 16 bits.
        NonFinite: a loss or gradient is NaN or infinite.
        Unsupported: the adapter given cannot be trained, or a row does not fit in memory.
        StoreCorrupted: a checkpoint's bytes are not what was written.
    """
    base, seed = task.model_settings, child_seed(task.seed, f"{method} warm-up")
    source = resolve_source(base.name, base.revision)
    if lora_rank is None and source.is_adapter:
        raise InvalidSettings(
            f"{method} was to warm up all weights, but '{base.name}' is an adapter; give the whole model, or warm up "
            "the adapter (lora)"
        )
    if source.is_adapter:
        task.note(f"{method} warmed up the adapter given, from where it stands; its LoRA settings were not used")

    def open_model() -> nn.Module:
        model = task.at_model(base).loaded.model  # not the task's own: training would change it
        if lora_rank is None:
            model.requires_grad_(True)
        elif has_adapter(model):
            train_adapter(model, base=source.base)
        else:
            model = add_lora(model, rank=lora_rank, alpha=lora_alpha, seed=seed, base=base.name, revision=base.revision)
        return model

    spec = {
        "algorithm": "warm-up-v1",
        "training": asdict(settings),
        "lora_rank": lora_rank,
        "lora_alpha": None if lora_rank is None else lora_alpha,  # without an adapter nothing is scaled by it
        "rows": rows_sha256(rows),
        "seed": task.seed,
    }
    folder = task.workdir(f"{method}-warm-up", spec, uses_target=target_name is not None)
    if folder not in task.stages:
        task.stages.append(folder)  # a run found finished has its cost on disk, and no update to report it again

    def record(spent: Spent) -> None:
        counts = {k: v for k, v in asdict(spent).items() if k not in ("checkpoint", "elapsed_s")}
        shape = ModelShape.from_model(skeleton(base, lora_rank=lora_rank))
        operations = warmup_flops(
            shape, spent.tokens, spent.supervised_tokens, spent.squared_tokens, full=lora_rank is None
        )
        task.record_cost(folder, spent.checkpoint, spent.elapsed_s, work="gradient", operations=operations, **counts)

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
    if lora_rank is None and is_main():
        for point in checkpoints:
            _save_tokenizer(base, point.folder)
    barrier()  # the folders open as whole models, everywhere
    return [
        WarmupPoint(
            model_settings=replace(base, name=str(point.folder), revision=None),
            folder=point.folder,
            learning_rate=point.learning_rate,
        )
        for point in checkpoints
    ]


def _save_tokenizer(settings: ModelSettings, folder: Path) -> None:
    """Put the model's tokenizer beside trained weights, so that the folder opens like any other model's."""
    if (folder / "tokenizer_config.json").is_file():
        return
    partial = folder / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    tokenizer = load_tokenizer(settings)
    with disk_errors(folder):
        tokenizer.save_pretrained(partial)
        # The file by which a tokenizer is known comes last: a folder that has it has all of them.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "tokenizer_config.json"):
            path.rename(folder / path.name)
        partial.rmdir()
