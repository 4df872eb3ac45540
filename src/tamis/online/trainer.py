"""The seam to Transformers' Trainer: candidates come from its data loader, the chosen gradient goes to its optimizer.

Only the data loader and ``training_step`` are replaced. Clipping, scheduler, logging, evaluation, checkpoints and
callbacks are the Trainer's own, because a step leaves its gradient where a backward pass would have left it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.model.loss import per_sample_losses
from tamis.model.processes import is_main, rank, world_size
from tamis.online.adam_state import learning_rate, read_adam
from tamis.online.batches import target_positions, to_batches
from tamis.online.choice import Method
from tamis.online.fate import CandidateLog
from tamis.online.forecast import predicted_drop
from tamis.online.meter import Meter
from tamis.online.numbered import ROWS, NumberedCollator, NumberedRows
from tamis.online.scorers import TargetOnly
from tamis.online.step import OnlineStep, Proposal, StepSettings
from tamis.online.together import add_up, gather_rows
from tamis.seeds import child_seed
from tamis.types import Batch, IntArray

__all__ = ["OnlineMixin", "OnlineTrainer"]

logger = logging.getLogger(__name__)

# The mixin stands before a Trainer class and uses what that class has; only the type checker must be told.
if TYPE_CHECKING:
    _TrainerLike = Any
else:
    _TrainerLike = object

_STATE = "tamis_selection.safetensors"
_CANDIDATES = "candidates"


class OnlineMixin(_TrainerLike):  # type: ignore[misc]
    """What makes a Trainer choose its data at every step; put it before a Trainer class.

    A choice looks at ``selection.keep * selection.oversample`` candidates, of all processes together. They run through
    the model ``per_device_train_batch_size`` rows at a time, so that argument says what fits in memory. With
    gradient accumulation every accumulated step makes a choice of its own, and one update is made of all of them.

    Args:
        target_dataset: rows of the task that training should help, in the same form as ``train_dataset``.
        selection: the method, such as ``tamis.online.FilterThenWeight(keep=8, oversample=4)``.
        step_settings: how to measure, and whether every row or every supervised token counts alike.
        target_rows: target rows looked at per choice, fresh ones every time; None: half as many as candidates.
        forecast_every: updates between comparisons of predicted and realised drop of the target loss, each of which
            costs a forward pass over the target rows; 0 for never.
        log_candidates: write the fate of every candidate to ``candidates/`` in the output folder.

    Raises:
        InvalidSettings: sizes that do not fit.
        Unsupported: a setting of the Trainer under which rows cannot be told apart or the gradient would be another.
    """

    def __init__(
        self,
        *args: Any,
        target_dataset: Any,
        selection: Method,
        step_settings: StepSettings | None = None,
        target_rows: int | None = None,
        forecast_every: int = 10,
        log_candidates: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.selection = selection
        self.target_dataset = self._prepared_target(target_dataset)
        self._step_settings = StepSettings() if step_settings is None else step_settings
        self._forecast_every, self._log_candidates = forecast_every, log_candidates
        self._check_trainer()
        candidates = selection.keep * selection.oversample
        if candidates % world_size():
            raise InvalidSettings(
                f"{selection.keep} x {selection.oversample} candidates cannot be shared by {world_size()} processes; "
                "choose keep and oversample so that their product is a multiple"
            )
        self._train_batch_size = candidates // world_size()  # what the data loader hands to a training step
        self._target_count = target_rows or max(1, min(len(self.target_dataset), candidates // 2))
        if self._target_count < 1:
            raise InvalidSettings(f"target_rows must be at least 1, got {target_rows}")
        if isinstance(selection, TargetOnly):
            logger.warning("target-only trains on the target rows themselves, which memorises small targets")
        self._step: OnlineStep | None = None
        self._saved_state: dict[str, Tensor] = {}
        self._micro, self._divisor = 0, 0.0
        self._meter = Meter()
        self._candidates: CandidateLog | None = None
        self._forecast: tuple[list[Batch], float, float] | None = None  # target batches, their loss, the predicted drop

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Candidates with their places in the data set."""
        rows, collate = self.train_dataset, self.data_collator
        if rows is None or not hasattr(rows, "__len__"):
            raise Unsupported("train_dataset must have a length; streams are not supported yet")
        if isinstance(rows, datasets.Dataset):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        args = self.args
        loader = DataLoader(
            NumberedRows(rows),
            batch_size=self._train_batch_size,
            sampler=self._get_train_sampler(rows),
            collate_fn=NumberedCollator(collate),
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One choice; after the last of an update, its gradient stands in the parameters. The choice's mean loss."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        step = self._online_step()
        self._compare_forecast()
        inputs = dict(self._prepare_inputs(inputs))
        rows: Tensor = inputs.pop(ROWS)
        most = self.args.per_device_train_batch_size
        candidates = to_batches(inputs, rows, most_rows=most)
        number = self.state.global_step * self.args.gradient_accumulation_steps + self._micro
        cold = self.state.global_step < self.selection.cold_start
        looks = self.selection.needs.target_only or (self.selection.needs.alignment is not None and not cold)
        target = self._target_batches(number) if looks else []
        seed = child_seed(self.args.seed, "uniform choice", number)
        with self.compute_loss_context_manager():
            proposal = step.propose(candidates, target, self.optimizer, cold=cold, seed=seed)
        for name, param in step.params.items():
            grad = proposal.gradient[name]
            # In the parameter's own layout: fused optimizers read both as one stretch of memory.
            param.grad = torch.empty_like(param).copy_(grad) if param.grad is None else param.grad.add_(grad)
        self._divisor += proposal.divisor
        self._micro += 1
        self._record(proposal, candidates, number)
        if self.accelerator.sync_gradients:
            self._finish_update(step, proposal, target)
        share = self._mean_loss(proposal) / self.current_gradient_accumulation_steps
        return torch.tensor(share, device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's entry, with what the choices since the last one were like."""
        if "loss" in logs:
            logs = {**logs, **self._meter.take()}
            self._flush()
        super().log(logs, *args, **kwargs)

    def _finish_update(self, step: OnlineStep, proposal: Proposal, target: list[Batch]) -> None:
        """Add up over processes, divide once, and look ahead."""
        for param in step.params.values():
            assert param.grad is not None
            param.grad.copy_(add_up(param.grad)).div_(self._divisor)
        self._micro, self._divisor = 0, 0.0
        gradient = {name: param.grad for name, param in step.params.items() if param.grad is not None}
        step.observe(gradient, self.optimizer)
        due = self._forecast_every and (self.state.global_step + 1) % self._forecast_every == 0
        if due and proposal.target_gradient is not None and proposal.target_loss is not None and self._is_adamw():
            decay = {
                id(p): float(group["weight_decay"]) for group in self.optimizer.param_groups for p in group["params"]
            }
            drop = predicted_drop(
                proposal.target_gradient,
                gradient,
                step.params,
                read_adam(self.optimizer, step.params),
                learning_rate=learning_rate(self.optimizer),
                decay={name: decay[id(param)] for name, param in step.params.items()},
                clip=self.args.max_grad_norm if self.args.max_grad_norm else None,
            )
            self._forecast = (target, proposal.target_loss, drop)

    def _mean_loss(self, proposal: Proposal) -> float:
        """Of the choice, as the update weighs it; of the target rows if those were trained on."""
        choice = proposal.choice
        if not len(choice.rows):
            return float("nan") if proposal.target_loss is None else proposal.target_loss
        weights = np.abs(choice.weights)
        if self._step_settings.reduction == "tokens":
            weights = weights * proposal.tokens[choice.rows]
        return float(np.average(proposal.losses[choice.rows], weights=weights))

    def _compare_forecast(self) -> None:
        """What the last update that was forecast did to the target rows it was made for."""
        if self._forecast is None:
            return
        batches, before, predicted = self._forecast
        self._forecast = None
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [per_sample_losses(self._online_step().model, batch.to(self.args.device)) for batch in batches]
        sums = add_up(torch.stack([torch.cat(losses).double().sum().cpu(), torch.tensor(_rows(batches)).double()]))
        self._meter.note("predicted_drop", predicted)
        self._meter.note("realised_drop", before - float(sums[0] / sums[1]))

    def _record(self, proposal: Proposal, candidates: list[Batch], number: int) -> None:
        places = gather_rows(torch.cat([batch.rows.cpu() for batch in candidates])).numpy()
        numbers, sources = self._in_the_log(places)
        self._meter.add(proposal, sources)
        seen = min((number + 1) * self._target_count, len(self.target_dataset))
        if proposal.target_loss is not None:
            self._meter.note("target_rows_seen", float(seen))
        if proposal.choice.fallback is not None:
            logger.debug("update %d: %s; weights are equal", self.state.global_step + 1, proposal.choice.fallback)
        if self._log_candidates and is_main():
            step = self.state.global_step + 1
            if self._candidates is None:
                self._candidates = CandidateLog(self._candidates_folder(), first_step=step)
            self._candidates.add(proposal, step=step, choice=number, rows=numbers, sources=sources)

    def _in_the_log(self, places: IntArray) -> tuple[IntArray, list[str | None]]:
        """Under which numbers rows of the training data are logged, and where they come from, as far as it says so."""
        names = self.train_dataset.column_names if isinstance(self.train_dataset, datasets.Dataset) else []
        known = self.train_dataset["source"] if "source" in names else None
        return places, [None if known is None else str(known[int(place)]) for place in places]

    def _candidates_folder(self) -> Path:
        return Path(self.args.output_dir, _CANDIDATES)

    def _target_batches(self, number: int) -> list[Batch]:
        """This process's share of the target rows of a choice."""
        positions = target_positions(
            number, count=self._target_count, total=len(self.target_dataset), seed=self.args.seed
        )[rank() :: world_size()]
        if not len(positions):
            return []
        collate = self._get_collator_with_removed_columns(self.data_collator, description="target")
        inputs = self._prepare_inputs(dict(collate([self.target_dataset[int(place)] for place in positions])))
        return to_batches(inputs, torch.from_numpy(positions), most_rows=self.args.per_device_train_batch_size)

    def _online_step(self) -> OnlineStep:
        if self._step is None:
            self._step = OnlineStep(self.accelerator.unwrap_model(self.model), self.selection, self._step_settings)
            self._step.load_state_dict(self._saved_state, self.optimizer)
        return self._step

    def _prepared_target(self, rows: Any) -> Any:
        if rows is None or not hasattr(rows, "__len__") or not len(rows):
            raise InvalidInput("target_dataset must hold at least one row of the task that training should help")
        return rows

    def _is_adamw(self) -> bool:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return isinstance(inner, torch.optim.AdamW) and not any(group["amsgrad"] for group in inner.param_groups)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, and what the selection remembers."""
        self._flush()
        super()._save_checkpoint(*args, **kwargs)
        state = {} if self._step is None else self._step.state_dict()
        if state and self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._step, self._saved_state, self._candidates, self._forecast = None, {}, None, None
        if checkpoint is not None and Path(checkpoint, _STATE).is_file():
            self._saved_state = load_file(Path(checkpoint, _STATE))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._flush()
        return super()._finalize_training(*args, **kwargs)

    def _flush(self) -> None:
        if self._candidates is not None:
            self._candidates.flush()

    def _check_trainer(self) -> None:
        """Refuse what would make rows inseparable, or the gradient another than the one chosen."""
        args = self.args
        refused = {
            "fp16": (args.fp16, "loss scaling is not part of a gradient made of factors; use bf16"),
            "deepspeed": (bool(args.deepspeed), "sharded parameters are not supported yet; use plain DDP"),
            "fsdp": (bool(args.fsdp), "sharded parameters are not supported yet; use plain DDP"),
            "auto_find_batch_size": (args.auto_find_batch_size, "set per_device_train_batch_size to what fits"),
            "label_smoothing_factor": (args.label_smoothing_factor != 0, "the loss is plain cross-entropy"),
            "neftune_noise_alpha": (args.neftune_noise_alpha is not None, "noise would be part of every gradient"),
            "use_liger_kernel": (args.use_liger_kernel, "its fused layers hide the factors of gradients"),
            "torch_compile": (args.torch_compile, "compiled graphs hide the factors of gradients"),
            "compute_loss_func": (self.compute_loss_func is not None, "the loss is plain cross-entropy"),
            "packing": (getattr(args, "packing", False), "packed rows cannot be told apart"),
            "padding_free": (getattr(args, "padding_free", False), "joined rows cannot be told apart"),
            "loss_type": (getattr(args, "loss_type", "nll") not in ("nll", None), "the loss is plain cross-entropy"),
        }  # fmt: skip
        for name, (found, why) in refused.items():
            if found:
                raise Unsupported(f"{name} does not go with online selection: {why}")
        if args.n_gpu > 1:
            raise Unsupported(
                "several GPUs in one process do not go with online selection; launch one process for each"
            )


class OnlineTrainer(OnlineMixin, Trainer):  # type: ignore[misc]  # transformers has no types here
    """``transformers.Trainer`` that chooses and weights its training data at every step; see ``OnlineMixin``."""


def _rows(batches: list[Batch]) -> int:
    return sum(len(batch.rows) for batch in batches)
