"""What makes a training run remember enough to be replayed: a callback for Transformers' and TRL's trainers.

It looks and writes; nothing of the run changes. A forward hook sees what goes through the model, the callback events
see the gradient and the rates of every update. The hook is on the model within an update only, for as many passes as
the update has micro-batches, and never raises: where an exception ended the update, it is soon gone by itself.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tamis.errors import InvalidSettings, Unsupported, first_line
from tamis.model.processes import world_size
from tamis.trajectory.causal import random_state_of
from tamis.trajectory.identity import base_dtype, describe_model, frozen_digest, has_dropout, refuse_dora
from tamis.trajectory.log import LOG_VERSION, LoggedMicro, LoggedStep, LogWriter
from tamis.trajectory.optimizer_state import LiveOptimizer, live_optimizer
from tamis.trajectory.record_size import announce_record, saves_of
from tamis.trajectory.token_rows import TOKEN_INPUTS, TokenRow, rows_of_inputs
from tamis.types import Batch
from tamis.versions import versions

__all__ = ["TrajectoryRecorder", "refuse_several_processes"]

logger = logging.getLogger(__name__)

_FEWEST_STEPS = 10  # between two states, by default


class TrajectoryRecorder(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Records a run of ``Trainer``, ``SFTTrainer``, ``OnlineTrainer`` or any trainer with their callbacks.

    Needs a causal language model in float32 (or LoRA factors in float32, or bfloat16 autocast), one process, AdamW,
    Adam or SGD, and the model's own loss. Others are refused when training starts, by name.

    Args:
        folder: where the record goes; a resumed run goes on with it.
        every: updates between two states on disk, 3 numbers per trained parameter each. Attribution replays from one
            state to the next and holds 5 numbers per parameter and update in between. None: the root of the number of
            updates, at least 10.
        model_name: what opens the model that training started from; None: what the model says of itself.
        most_gb: refuse to start if the record would be larger.
        chat_template: by which text was made rows, so that a target can be made rows alike; None: that of the
            trainer's ``processing_class``, if it has one.
        owner: what tells the run from all others. A run with an owner begins its record anew over what it did not
            finish; others are refused where there is a record.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int | None = None,
        model_name: str | None = None,
        most_gb: float | None = None,
        chat_template: str | None = None,
        owner: str | None = None,
    ) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise InvalidSettings(f"folder: expected the name of a folder for the record, got {folder!r}")
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise InvalidSettings(f"every: expected a number of updates, at least 1, got {every!r}")
        if most_gb is not None and (not isinstance(most_gb, (int, float)) or not most_gb > 0):
            raise InvalidSettings(f"most_gb: expected a number of gigabytes above zero, got {most_gb!r}")
        self.folder = Path(folder)
        self._every, self._model_name, self._most_gb = every, model_name, most_gb
        self._chat_template = chat_template
        self._owner = owner
        self._writer: LogWriter | None = None
        self._live: LiveOptimizer | None = None
        self._hooks: list[Any] = []
        self._steps: list[LoggedStep] = []  # since the last state
        self._first = 0  # the first of them
        self._passes: list[_Pass] = []  # of the update that is being made
        self._running: _Pass | None = None  # whose loss is not known yet
        self._awaited = 0  # passes of the update still to come
        self._refusal: Exception | None = None  # why what went through the model cannot be recorded
        self._divisor: float | None = None  # of an online choice
        self._pending: tuple[tuple[float, ...], float] | None = None
        self._random = False

    # The trainer's events, in the order in which they come.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the run can be replayed, say what the record will take, and open it."""
        self._remove_hooks()
        model, live = kwargs["model"], live_optimizer(kwargs["optimizer"], kwargs["model"])
        _refuse_arguments(args)
        described = describe_model(model, self._model_name)
        refuse_dora(described["adapter"])
        every = self._every or max(_FEWEST_STEPS, math.isqrt(state.max_steps))
        saves = saves_of(args, state, kwargs.get("train_dataloader"))
        announce_record(self.folder, live, every=every, steps=state.max_steps, saves=saves, most_gb=self._most_gb)
        clip = float(args.max_grad_norm) if args.max_grad_norm else None
        self._random = has_dropout(model)
        manifest = {
            "version": LOG_VERSION,
            "model": described,
            "trained": [[name, list(shape)] for name, shape in live.shapes.items()],
            "dtype": str(next(iter(live.params.values())).dtype).removeprefix("torch."),
            "base_dtype": base_dtype(model),
            "autocast": "bfloat16" if args.bf16 else None,
            "dropout": self._random,
            "frozen": frozen_digest(model),
            **{key: value for key, value in asdict(live.rule(clip)).items() if key != "clip"},
            "clip": clip,
            "every": every,
            "planned": state.max_steps,
            "chat_template": self._chat_template or _template_of(kwargs.get("processing_class")),
            "owner": self._owner,
            "versions": versions(),
        }
        begun = state.global_step
        if begun:
            self._writer = LogWriter.open_again(self.folder, manifest, begun, state=live.state())
        else:
            self._writer = LogWriter.open_new(self.folder, manifest, live.state())
        self._live, self._first, self._steps, self._between = live, begun, [], every
        self._passes, self._divisor, self._pending = [], None, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What goes through the model from here on is of the update."""
        self._remove_hooks()
        self._awaited, self._refusal, model = args.gradient_accumulation_steps, None, kwargs["model"]
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradient is what the optimizer will see; the rates are still those of this step."""
        self._remove_hooks()
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise refusal
        assert self._live is not None
        self._live.require_constants()
        self._pending = (self._live.rates(), self._live.gradient_norm())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One update is done; write when it is time, and before the trainer writes a checkpoint."""
        self._remove_hooks()
        if self._pending is None:
            raise Unsupported("this trainer does not announce its optimizer steps (on_pre_optimizer_step); update it")
        rates, norm = self._pending
        micros = _weigh(self._passes, self._divisor)
        if not micros:
            raise Unsupported(
                f"update {state.global_step} was made without a forward pass that the recorder could see; give the "
                "trainer the model itself, without a wrapper that calls its parts"
            )
        self._steps.append(LoggedStep(micros=micros, rates=rates, norm=norm))
        self._passes, self._divisor, self._pending = [], None, None
        if state.global_step % self._between == 0 or control.should_save:
            self._flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer loads the best checkpoint before it says that training has ended."""
        if args.load_best_model_at_end:
            self._flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint that was asked for in another way than by the step number."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what is left, and that the run is whole; only then look for its rows in the data."""
        self._remove_hooks()
        self._flush()
        assert self._writer is not None
        self._writer.finish(state.global_step)
        self._writer.write_positions(self._positions(kwargs.get("train_dataloader")))

    # What else is told to it.

    def note_choice(self, batches: Sequence[Batch], coefficients: Tensor, losses: Tensor, divisor: float) -> None:
        """One choice of an online trainer: its candidates, what each counts, their losses, and the choice's divisor.

        The update's gradient is the sum of ``coefficients * grad l`` over all its choices by the sum of their divisors.
        """
        first, self._divisor = 0, (self._divisor or 0.0) + divisor
        self._passes = [one for one in self._passes if one.is_choice]  # not what the hook saw of it
        for batch in batches:
            own, at = coefficients[first : first + len(batch.rows)], losses[first : first + len(batch.rows)]
            first += len(batch.rows)
            used = own.nonzero()[:, 0].tolist()
            if not used:
                continue
            rows = [
                TokenRow(
                    ids=batch.input_ids[i].cpu().numpy().astype(np.int32),
                    supervised=batch.supervised[i].cpu().numpy(),
                ).trimmed()
                for i in used
            ]
            self._passes.append(
                _Pass(
                    numbers=self._numbers(rows),
                    counts=[float(own[i]) for i in used],
                    width=batch.input_ids.shape[1],
                    is_choice=True,
                    loss=float(sum(own[i] * at[i] for i in used)),
                )
            )

    # Inside.

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._running = None
        if not module.training or not torch.is_grad_enabled():
            return
        try:
            self._note_pass(args, kwargs)
        except Exception as error:  # raised before the update is made: the caller here may not be the trainer any more
            self._remove_hooks()
            self._refusal = error.with_traceback(None)  # which would keep the frames of the caller

    def _note_pass(self, args: Any, kwargs: dict[str, Any]) -> None:
        if self._awaited == 0:
            raise Unsupported(
                "the trainer sends more batches through the model in an update than gradient_accumulation_steps says; "
                "the recorder takes each for a micro-batch: record with a trainer that sends every batch once, whole"
            )
        self._awaited -= 1
        if args:
            raise Unsupported("the trainer calls the model with positional arguments; the recorder reads named ones")
        found = rows_of_inputs(kwargs)
        items = kwargs.get("num_items_in_batch")
        used = [row for row in found if row is not None]
        if not used:
            return
        ids = kwargs["input_ids"]
        self._running = _Pass(
            numbers=self._numbers(used),
            counts=[float(row.supervised.sum()) for row in used],
            width=ids.shape[1],
            items=None if items is None else float(torch.as_tensor(items).flatten()[0]),
            random_state=random_state_of(ids.device) if self._random else {},
        )
        self._passes.append(self._running)
        if self._random and len(used) < len(found):
            raise Unsupported("rows without a supervised token go through a model with dropout; remove them")

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._running is None:  # evaluation, or rows without a supervised token
            return
        loss = output.get("loss") if hasattr(output, "get") else None
        self._running.loss = None if loss is None else loss.detach()
        self._running = None

    def _positions(self, loader: Any) -> list[int]:
        """For each recorded row, where it first stands in the training data; -1 where that is not known."""
        assert self._writer is not None
        known = self._writer.known
        found, missing = [-1] * len(known), len(known)
        data: Any = getattr(loader, "dataset", None)
        collate = getattr(loader, "collate_fn", None)
        try:
            count = len(data)
        except Exception:  # there is none, or it is a stream
            return found
        if collate is None or not hasattr(data, "__getitem__"):
            return found
        logger.info("looking for the %d recorded rows among %d rows of training data", missing, count)
        failed, first = 0, ""
        for position in range(count):
            if not missing:
                break
            try:
                inputs = {key: value for key, value in collate([data[position]]).items() if key in TOKEN_INPUTS}
                row = rows_of_inputs(inputs)[0]
            except Exception as error:  # data sets raise what they like, and the run is over: it is not to fail now
                failed, first = failed + 1, first or f"row {position}: {first_line(error)}"
                continue
            number = None if row is None else known.get(row.digest())
            if number is not None and found[number] < 0:
                found[number], missing = position, missing - 1
        if missing:
            why = f" ({failed} rows of it cannot be read one by one, the first is {first})" if failed else ""
            logger.warning(
                "%d of %d recorded rows are not found in the training data%s: attribution gives them no position",
                missing, len(known), why,
            )  # fmt: skip
        return found

    def _numbers(self, rows: Sequence[TokenRow]) -> list[int]:
        assert self._writer is not None
        return [self._writer.number_of(row) for row in rows]

    def _flush(self) -> None:
        if self._steps:
            assert self._writer is not None and self._live is not None
            self._writer.write_segment(self._first, self._steps, self._live.state())
            self._first += len(self._steps)
            self._steps = []

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _Pass:
    """One forward pass of the update that is being made."""

    def __init__(
        self,
        *,
        numbers: list[int],
        counts: list[float],
        width: int,
        items: float | None = None,
        random_state: dict[str, Tensor] | None = None,
        is_choice: bool = False,
        loss: Any = None,
    ) -> None:
        self.numbers, self.counts, self.width, self.items = numbers, counts, width, items
        self.random_state, self.is_choice, self.loss = random_state or {}, is_choice, loss


def _weigh(passes: Sequence[_Pass], divisor: float | None) -> tuple[LoggedMicro, ...]:
    """Every row's weight in the update's loss, as the trainer makes it of token means.

    A model that is given ``num_items_in_batch`` divides by it. A trainer that takes the loss into its own hands (no
    loss in the outputs) does likewise, over the update. Else a pass is a mean, and an update the mean of its passes.
    What this says is held against the norm of the gradient when the run is replayed.
    """
    total = sum(sum(one.counts) for one in passes)
    found = []
    for one in passes:
        if one.is_choice:
            assert divisor is not None
            by, loss = divisor, one.loss / divisor
        elif one.items is not None:
            by, loss = one.items, one.loss
        elif one.loss is None:
            by, loss = total, None
        else:
            by, loss = sum(one.counts) * len(passes), one.loss / len(passes)
        found.append(
            LoggedMicro(
                rows=np.array(one.numbers, dtype=np.int64),
                weights=tuple(count / by for count in one.counts),
                loss=float("nan") if loss is None else float(loss),
                width=one.width,
                random_state=one.random_state,
            )
        )
    return tuple(found)


def _template_of(tokenizer: Any) -> str | None:
    """The chat template; None for none, and for the tables of several that some tokenizers have."""
    found = getattr(tokenizer, "chat_template", None)
    return found if isinstance(found, str) else None


def _refuse_arguments(args: Any) -> None:
    refused = {
        "fp16": (args.fp16, "loss scaling skips updates; use bf16 or float32"),
        "deepspeed": (bool(args.deepspeed), "parameters are sharded"),
        "fsdp": (bool(args.fsdp), "parameters are sharded"),
        "label_smoothing_factor": (args.label_smoothing_factor != 0, "the loss is plain cross-entropy"),
        "neftune_noise_alpha": (getattr(args, "neftune_noise_alpha", None) is not None, "its noise is not logged"),
        "auto_find_batch_size": (
            getattr(args, "auto_find_batch_size", False),
            "it begins the training again with smaller batches; find the size first, and record with it",
        ),
        "torch_compile": (args.torch_compile, "the compiled model hides its inputs"),
        "use_liger_kernel": (getattr(args, "use_liger_kernel", False), "its fused loss is another computation"),
        "packing": (getattr(args, "packing", False), "packed rows cannot be told apart"),
        "padding_free": (getattr(args, "padding_free", False), "joined rows cannot be told apart"),
        "loss_type": (getattr(args, "loss_type", "nll") not in ("nll", "chunked_nll", None), "the loss is another"),
    }
    for name, (found, why) in refused.items():
        if found:
            raise Unsupported(f"a run with {name} cannot be recorded: {why}")
    refuse_several_processes(gpus=getattr(args, "n_gpu", 1))


def refuse_several_processes(*, gpus: int = 1) -> None:
    """A record has what one process saw.

    Raises:
        Unsupported: the run has several processes, or one that uses several GPUs.
    """
    if world_size() > 1 or gpus > 1:
        raise Unsupported("a run of several processes or GPUs cannot be recorded yet; record one of a single process")
