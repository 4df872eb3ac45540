"""The trainer of a run that owns a folder: held-out losses by target, a log on disk, checkpoints known to be whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, get_scheduler

from tamis.maths.schedule import linear_rate
from tamis.model.loss import per_sample_losses
from tamis.model.processes import barrier, is_main, rank, world_size
from tamis.online.batches import to_batches
from tamis.online.resume import append_log, mark_whole
from tamis.online.rows import TokenRows
from tamis.online.together import add_up
from tamis.online.trainer import OnlineTrainer
from tamis.types import IntArray

__all__ = ["HeldOut", "RunCallback", "RunTrainer", "is_stopped", "rate_share"]

_OF_ONE_PART = ("train_loss", "train_samples_per_second", "train_steps_per_second")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Target rows that only measure."""

    rows: TokenRows
    group: IntArray  # for each of them, which of ``names`` it stands for
    names: tuple[str, ...]


def rate_share(kind: str, total: int, rising: int) -> Callable[[int], float]:
    """Share of the peak rate at each update, from 0, of ``total``, of which the first ``rising`` rise; never 0.

    ``linear`` as in all our own runs; any other is Transformers' schedule of one update more, without its first.
    """
    if kind == "linear":
        return lambda step: linear_rate(step, total, rising)
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs: Any = get_scheduler(kind, nothing, num_warmup_steps=rising, num_training_steps=total + 1)
    (share,) = theirs.lr_lambdas
    return lambda step: float(share(step + 1))


class RunTrainer(OnlineTrainer):
    """``OnlineTrainer`` whose evaluation is the mean loss of held-out target rows, every row counting alike.

    Unlike the Trainer's, which averages over batches, that number depends neither on batches nor on processes.
    Candidates are logged under their numbers in the corpus that ``train_dataset`` is taken from.

    Args:
        train_dataset: the candidates.
        sources: of each of them.
        candidates_folder: where their fate is logged.
        held_out: what to measure, None for nothing.
    """

    lr_scheduler: Any

    def __init__(
        self,
        *,
        train_dataset: TokenRows,
        sources: Sequence[str],
        candidates_folder: Path,
        held_out: HeldOut | None,
        **kwargs: Any,
    ) -> None:
        self._pool_rows, self._sources = train_dataset, sources
        self._folder_of_candidates, self._held_out = candidates_folder, held_out
        measured = None if held_out is None else held_out.rows
        super().__init__(train_dataset=train_dataset, eval_dataset=measured, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As the Trainer's, but no update has a rate of zero: theirs rise from zero at the first."""
        kind, rising = self.args.lr_scheduler_type, self.args.get_warmup_steps(num_training_steps)
        if self.lr_scheduler is None and (kind == "linear" or rising):
            share = rate_share(kind, num_training_steps, rising)
            # It also asks for the rate after the last update, which nothing uses.
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: share(min(step, num_training_steps - 1)),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def held_out_losses(self) -> dict[str, float]:
        """``eval_loss``, and ``eval_loss/NAME`` for each of several targets; empty without held-out rows."""
        held = self._held_out
        if held is None:
            return {}
        sums = torch.zeros(len(held.names), 2, dtype=torch.float64)
        own = np.arange(rank(), len(held.rows), world_size())
        model, most = self.accelerator.unwrap_model(self.model), self.args.per_device_train_batch_size
        for first in range(0, len(own), most):
            places = own[first : first + most]
            inputs = self._prepare_inputs(dict(self.data_collator([held.rows[int(place)] for place in places])))
            with torch.no_grad(), self.compute_loss_context_manager():
                for batch in to_batches(inputs, torch.from_numpy(places), most_rows=most):
                    losses = per_sample_losses(model, batch).double().cpu()
                    group = torch.from_numpy(held.group[batch.rows.cpu().numpy()])
                    sums[:, 0].index_add_(0, group, losses)
                    sums[:, 1].index_add_(0, group, torch.ones_like(losses))
        sums = add_up(sums)
        found = {"eval_loss": float(sums[:, 0].sum() / sums[:, 1].sum())}
        if len(held.names) > 1:
            found |= {f"eval_loss/{name}": float(row[0] / row[1]) for name, row in zip(held.names, sums, strict=True)}
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out rows and log it, as the Trainer does with its evaluation data."""
        metrics = self.held_out_losses()
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _in_the_log(self, places: IntArray) -> tuple[IntArray, list[str | None]]:
        return self._pool_rows.rows[places], [self._sources[int(place)] for place in places]

    def _sources_of_rows(self) -> Sequence[str | None]:
        return self._sources

    def _refuse_earlier_candidates(self) -> None:
        """The folder is the run's own: one killed before its first checkpoint writes its candidates anew."""

    def _candidates_folder(self) -> Path:
        return self._folder_of_candidates


class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Writes the log, marks checkpoints, reports progress, and stops early.

    Args:
        log: the file of log entries.
        checkpoints: where the trainer puts its checkpoints.
        seconds: what earlier runs spent up to where this one starts.
        patience: see ``is_stopped``; None for never.
        advance: is told of every finished update.
    """

    def __init__(
        self,
        *,
        log: Path,
        checkpoints: Path,
        seconds: float,
        patience: int | None,
        advance: Callable[[int], None],
    ) -> None:
        self._log, self._checkpoints, self._patience, self._advance = log, checkpoints, patience, advance
        self._before, self._started = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent so far, earlier runs included."""
        return self._before + time.perf_counter() - self._started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One update is done."""
        self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the entry as the trainer keeps it; of the last one of a resumed run, what holds for the whole run."""
        entry = {name: _plain(value) for name, value in state.log_history[-1].items()}
        if "train_runtime" in entry and self._before:  # the trainer sums up what it did since it was resumed
            entry = {name: value for name, value in entry.items() if name not in _OF_ONE_PART}
            entry["train_runtime"] = round(self.seconds, 4)
        if is_main():
            append_log(self._log, entry)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when nothing has become better for long enough."""
        if is_stopped(state.log_history, self._patience):
            control.should_training_stop = True
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every process has written its part; say so on disk."""
        barrier()
        if is_main():
            folder = self._checkpoints / f"checkpoint-{state.global_step}"
            mark_whole(folder, step=state.global_step, seconds=self.seconds)


def is_stopped(history: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last ``patience`` measurements were no better than one before them.

    A function of the log alone, which checkpoints hold, so that a resumed run stops where it would have.
    """
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return patience is not None and bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


def _plain(value: Any) -> Any:
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not np.isfinite(number) else number
