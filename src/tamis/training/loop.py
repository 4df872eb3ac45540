"""Plain fine-tuning, readable from top to bottom: for warm-ups and evaluation runs, no replacement for a trainer.

The loss of an update is the mean over its rows of each row's mean cross-entropy over its supervised tokens, so every
row counts alike whatever its length. Dropout is off and the row order is a function of seed and epoch alone, so that a
killed run resumed from its last checkpoint ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamis.data.batches import collate, plan_batches
from tamis.errors import InvalidInput, InvalidSettings, NonFinite, Unsupported
from tamis.maths.schedule import linear_rate
from tamis.model.loss import evaluation_mode, per_sample_losses
from tamis.model.memory import TokenLimit, is_out_of_memory
from tamis.seeds import child_seed, random_permutation
from tamis.training.checkpoints import (
    Checkpoint,
    StepRecord,
    complete_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from tamis.types import IntArray, TokenizedExample

__all__ = [
    "Spent",
    "TrainSettings",
    "fine_tune",
    "learning_rate_at",
    "num_steps",
    "rows_of_step",
    "rows_of_steps",
    "run_identity",
]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to fine-tune. Defaults suit LoRA on a few hundred to a few thousand rows."""

    epochs: int = 4
    steps: int | None = None  # updates in all, in place of epochs
    save_steps: int | None = None  # updates between checkpoints; None: one at the end of every epoch
    update_rows: int = 16  # rows of one update
    learning_rate: float = 2e-4  # the peak, from which it falls linearly
    lr_warmup_share: float = 0.03  # of the updates, rising linearly to the peak
    weight_decay: float = 0.0  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0  # largest norm of an update's gradient
    # Padded tokens of one forward pass, less once memory runs out: no effect but rounding. None: 1,024 on a CPU, where
    # more is no faster and training keeps every activation, 4,096 on an accelerator.
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "save_steps", "update_rows", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSettings(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InvalidSettings(f"{name} must be a positive number, got {value}")
        for name in ("beta1", "beta2", "lr_warmup_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidSettings(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise InvalidSettings(f"weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the updates since the last checkpoint cost."""

    checkpoint: int  # 0, 1, ... in order
    rows: int
    tokens: int
    supervised_tokens: int
    squared_tokens: int  # sum over rows of length squared: what attention pays
    elapsed_s: float


def num_steps(settings: TrainSettings, num_rows: int) -> int:
    """Updates of the whole run. The last update of an epoch takes the rows that are left."""
    return settings.steps or settings.epochs * -(-num_rows // settings.update_rows)


def learning_rate_at(settings: TrainSettings, step: int, total: int) -> float:
    """Learning rate of update ``step`` (from 0) of ``total``: up to the peak, then down; never 0."""
    return settings.learning_rate * linear_rate(step, total, math.ceil(settings.lr_warmup_share * total))


def rows_of_step(settings: TrainSettings, step: int, rows: IntArray, *, seed: int) -> IntArray:
    """The rows of update ``step``: every epoch is a fresh permutation of ``rows``, cut into updates."""
    per_epoch = -(-len(rows) // settings.update_rows)
    epoch, place = divmod(step, per_epoch)
    order = _order_of_epoch(seed, epoch, len(rows))
    return rows[order[place * settings.update_rows : (place + 1) * settings.update_rows]]


@lru_cache(maxsize=2)  # every update of an epoch asks for it, and drawing it takes as long as the pool is large
def _order_of_epoch(seed: int, epoch: int, count: int) -> IntArray:
    order = random_permutation(child_seed(seed, "row order", epoch), count)
    order.setflags(write=False)
    return order


def rows_of_steps(steps: int, update_rows: int, num_rows: int) -> int:
    """How many rows the first ``steps`` updates take, a row counted as often as it is taken.

    >>> rows_of_steps(8, 8, 64), rows_of_steps(8, 8, 4), rows_of_steps(3, 8, 20)
    (64, 32, 20)
    """
    epochs, rest = divmod(steps, -(-num_rows // update_rows))
    return epochs * num_rows + min(rest * update_rows, num_rows)


def fine_tune(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    rows: IntArray,
    settings: TrainSettings,
    *,
    seed: int,
    folder: Path | None = None,
    name_of: Callable[[int], str] = "row {}".format,
    advance: Callable[[int], None] = lambda steps: None,
    after_update: Callable[[], None] = lambda: None,
    on_checkpoint: Callable[[Spent], None] = lambda spent: None,
) -> tuple[Checkpoint, ...]:
    """Train the parameters of ``model`` that require gradients, in place, and return the checkpoints of the whole run.

    One process, no ranks, no dropout. A forward pass that does not fit in memory is halved, and the update's gradient
    made anew; updates after it keep to what fitted, also after a resume.

    Args:
        model: its trainable parameters must be float32 or float64 (LoRA factors on a bfloat16 base are).
        examples: ``examples[r]`` is the tokenized row ``r``.
        rows: (n,) the rows to train on, each once an epoch.
        settings: see ``TrainSettings``.
        seed: of the row order.
        folder: where checkpoints go; complete ones found there are resumed from. None: nothing is written.
        name_of: how to call a row in an error message.
        advance: called with 1 after every update, and at once with the updates that a resume skips.
        after_update: called after every update, once its checkpoint, if one is due, is on disk.
        on_checkpoint: told what each interval cost, before its checkpoint is written; also when ``folder`` is None.

    Raises:
        InvalidInput: no rows, a row without supervised token, or nothing trainable in the model.
        InvalidSettings: a trainable parameter has 16 bits or fewer.
        Unsupported: a single row does not fit in memory.
        NonFinite: a loss or the gradient of an update is NaN or infinite; the message names step and rows.
        StoreMismatch: ``folder`` holds checkpoints of another run.
        StoreCorrupted: the last checkpoint's bytes are not what was written.
    """
    rows = np.asarray(rows, dtype=np.int64)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    _check_start(trainable, examples, rows, name_of)
    total = num_steps(settings, len(rows))
    optimizer = _adamw(trainable, settings)
    identity = run_identity(settings, examples, rows, seed=seed)

    start, history = 0, list[StepRecord]()
    checkpoints = [] if folder is None else complete_checkpoints(folder, identity=identity)
    if checkpoints:
        restore_checkpoint(checkpoints[-1], model, optimizer, trainable)
        start, history = checkpoints[-1].step, list(checkpoints[-1].history)
        advance(start)

    on_cpu = next(iter(trainable.values())).device.type == "cpu"
    limit = TokenLimit(settings.batch_tokens or (1024 if on_cpu else 4096), folder)
    intervals, counted, since = len(checkpoints), _Counter(), time.perf_counter()
    for step in range(start, total):
        chosen = rows_of_step(settings, step, rows, seed=seed)
        tokenized = [examples[int(row)] for row in chosen]
        rate = learning_rate_at(settings, step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate

        with evaluation_mode(model):  # around the backward pass too: gradient checkpointing runs the layers again in it
            loss = _accumulate(model, chosen, tokenized, step, limit, name_of)
        norm = nn.utils.clip_grad_norm_(trainable.values(), settings.clip or math.inf)
        if not bool(torch.isfinite(norm)):
            raise NonFinite(
                f"the gradient of update {step + 1} of {total} is {float(norm)}; its rows: "
                f"{', '.join(name_of(int(row)) for row in chosen)}; lower the learning rate or remove the row at fault"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        history.append(StepRecord(step=step + 1, loss=loss, learning_rate=rate, grad_norm=float(norm)))
        counted.add(tokenized)
        if _is_saved(step + 1, total, settings, len(rows)):
            # Before the checkpoint is there: after a kill between the two its interval is made, and told, again.
            on_checkpoint(counted.spent(intervals, time.perf_counter() - since))
            intervals, counted, since = intervals + 1, _Counter(), time.perf_counter()
            if folder is not None:
                checkpoints.append(
                    save_checkpoint(folder, model, optimizer, trainable, history, checkpoints, identity=identity)
                )
        advance(1)
        after_update()
    return tuple(checkpoints)


def run_identity(
    settings: TrainSettings, examples: Sequence[TokenizedExample], rows: IntArray, *, seed: int
) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoints, besides the model it started from."""
    data = hashlib.sha256()
    for row in rows:
        example = examples[int(row)]
        data.update(np.int64(row).tobytes())
        data.update(np.int64(len(example.input_ids)).tobytes())
        data.update(np.ascontiguousarray(example.input_ids, dtype="<i4").tobytes())
        data.update(np.ascontiguousarray(example.supervised, dtype=np.uint8).tobytes())
    return {
        "algorithm": "fine-tune-v1",
        "settings": asdict(settings),
        "data": data.hexdigest(),
        "num_rows": len(rows),
        "seed": seed,
    }


def _accumulate(
    model: nn.Module,
    rows: IntArray,
    tokenized: Sequence[TokenizedExample],
    step: int,
    limit: TokenLimit,
    name_of: Callable[[int], str],
) -> float:
    """The loss of an update; its gradient is left in the parameters."""
    lengths = np.array([len(t.input_ids) for t in tokenized], dtype=np.int64)
    while True:
        loss, too_large = 0.0, 0
        for part in plan_batches(lengths, batch_tokens=limit.at(step), max_rows=None):
            try:
                loss += _add_gradient(model, rows, tokenized, part, step, name_of)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise Unsupported(
                        f"{name_of(int(rows[part[0]]))}: its {lengths[part[0]]} tokens alone do not fit in memory for "
                        "training; lower --max-length, use --dtype bfloat16, or turn on --gradient-checkpointing"
                    ) from error
                too_large = len(part) * int(lengths[part].max())
                break
        if not too_large:
            return loss
        model.zero_grad(set_to_none=True)  # what this update has so far; those before it ended with none
        limit.lower(step, too_large)


def _add_gradient(
    model: nn.Module,
    rows: IntArray,
    tokenized: Sequence[TokenizedExample],
    part: IntArray,
    step: int,
    name_of: Callable[[int], str],
) -> float:
    """The share of some rows in an update's loss; their share of its gradient is added to the parameters'."""
    device = next(param for param in model.parameters() if param.requires_grad).device
    batch = collate(rows[part], [tokenized[i] for i in part], 0).to(device)
    losses = per_sample_losses(model, batch)  # (B,) mean over each row's supervised tokens
    _check_losses(losses, rows[part], step, name_of)
    torch.autograd.backward(losses.sum() / len(rows))
    return float(losses.detach().double().sum()) / len(rows)


def _adamw(trainable: dict[str, nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    matrices = [param for param in trainable.values() if param.ndim >= 2]
    vectors = [param for param in trainable.values() if param.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.learning_rate, betas=betas, eps=settings.eps
    )


def _is_saved(done: int, total: int, settings: TrainSettings, num_rows: int) -> bool:
    every = settings.save_steps or -(-num_rows // settings.update_rows)
    return done == total or done % every == 0


def _check_start(
    trainable: dict[str, nn.Parameter],
    examples: Sequence[TokenizedExample],
    rows: IntArray,
    name_of: Callable[[int], str],
) -> None:
    if not trainable:
        raise InvalidInput("nothing to train: no parameter of the model requires a gradient; add LoRA or unfreeze some")
    if not len(rows):
        raise InvalidInput("no rows to train on; give a larger pool or share")
    if low := next((name for name, p in trainable.items() if p.dtype.itemsize < 4), None):
        raise InvalidSettings(
            f"parameter '{low}' is {trainable[low].dtype}, in which small updates are lost; "
            "train LoRA factors (they are float32), or load the model with dtype=float32"
        )
    empty = next((int(row) for row in rows if examples[int(row)].num_supervised == 0), None)
    if empty is not None:
        raise InvalidInput(f"{name_of(empty)} has no supervised token, so it cannot be trained on; leave it out")


def _check_losses(losses: Tensor, rows: IntArray, step: int, name_of: Callable[[int], str]) -> None:
    losses = losses.detach()
    bad = ~torch.isfinite(losses)
    if bool(bad.any()):
        named = ", ".join(f"{name_of(int(rows[i]))} ({float(losses[i])})" for i in bad.nonzero().flatten().tolist())
        raise NonFinite(
            f"loss is not finite in update {step + 1} for {named}; "
            "lower the learning rate, load the model in float32, or remove the row"
        )


class _Counter:
    """Adds up rows and tokens between two checkpoints."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.supervised = self.squared = 0

    def add(self, tokenized: Sequence[TokenizedExample]) -> None:
        lengths = [len(t.input_ids) for t in tokenized]
        self.rows += len(lengths)
        self.tokens += sum(lengths)
        self.supervised += sum(t.num_supervised for t in tokenized)
        self.squared += sum(n * n for n in lengths)

    def spent(self, checkpoint: int, elapsed_s: float) -> Spent:
        return Spent(
            checkpoint=checkpoint,
            rows=self.rows,
            tokens=self.tokens,
            supervised_tokens=self.supervised,
            squared_tokens=self.squared,
            elapsed_s=elapsed_s,
        )
