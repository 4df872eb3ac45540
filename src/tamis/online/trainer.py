"""The seam to Transformers' Trainer: candidates come from its data loader, the chosen gradient goes to its optimizer.

Only the data loader and ``training_step`` are replaced. Clipping, scheduler, logging, evaluation, checkpoints and
callbacks are the Trainer's own, because a step leaves its gradient where a backward pass would have left it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from tamis.errors import InvalidInput, InvalidSettings, NonFinite, Unsupported
from tamis.maths.clip import clip_factor
from tamis.model.processes import counts_of_all, is_main, rank, world_size
from tamis.online.ahead import Ahead
from tamis.online.batches import to_batches
from tamis.online.checks import dropout_of, refuse_added_loss, refuse_settings, refuse_sharded
from tamis.online.fate import CandidateLog, refuse_earlier_parts
from tamis.online.forecast import Forecaster
from tamis.online.loader import candidate_loader
from tamis.online.meter import Meter
from tamis.online.methods.baselines import TargetOnly
from tamis.online.methods.choice import Method, cold_updates
from tamis.online.methods.lookahead import Lookahead
from tamis.online.numbered import ROWS
from tamis.online.proposal import Proposal
from tamis.online.proxy import check_proxy, load_proxy
from tamis.online.recording import tell_recorders
from tamis.online.saved import load_selection, save_selection, selection_settings
from tamis.online.settings import StepSettings, check_combination
from tamis.online.source_means import said_of_many_sources, source_numbers
from tamis.online.step import OnlineStep
from tamis.online.target_turns import target_positions, usable_target_rows
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

_CANDIDATES = "candidates"


class OnlineMixin(_TrainerLike):  # type: ignore[misc]
    """What makes a Trainer choose its data at every step; put it before a Trainer class."""

    def __init__(
        self,
        *args: Any,
        target_dataset: Any,
        selection: Method,
        step_settings: StepSettings | None = None,
        proxy_model: nn.Module | None = None,
        target_rows: int | None = None,
        forecast_every: int = 10,
        log_candidates: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take the Trainer's arguments and those of the choice.

        A choice looks at ``selection.keep * selection.oversample`` candidates, of all processes together. They run
        through the model ``per_device_train_batch_size`` rows at a time, so that argument says what fits in memory.
        With gradient accumulation every accumulated step makes a choice of its own, and one update is made of all of
        them.

        Args:
            *args: the Trainer's own arguments.
            target_dataset: rows of the task that training should help, in the same form as ``train_dataset``.
            selection: the method, such as ``tamis.online.FilterThenWeight(keep=8, oversample=4)``.
            step_settings: how to measure and how to score candidates; whether every row or every token counts alike.
            proxy_model: a smaller model with the same vocabulary that scores candidates, for
                ``StepSettings(candidates="proxy")``; its trainable parameters are those whose gradients count.
            target_rows: target rows looked at per choice, fresh ones every time; None: half as many as candidates are
                scored, at most all there are.
            forecast_every: updates between comparisons of predicted and realised drop of the target loss, each of
                which costs a forward pass over the target rows; 0 for never.
            log_candidates: write the fate of every candidate to ``candidates/`` in the output folder. A new run
                refuses to start where an earlier one has left its own.
            **kwargs: the Trainer's own arguments.

        Raises:
            InvalidInput: no target rows with a supervised token, or one source only where sources are chosen.
            InvalidSettings: sizes that do not fit.
            Unsupported: a setting of the Trainer or the model under which rows cannot be told apart or the gradient
                would be another.
        """
        super().__init__(*args, **kwargs)
        self.selection = selection
        self.target_dataset = self._prepared_target(target_dataset)
        self._step_settings = StepSettings() if step_settings is None else step_settings
        self._log_candidates = log_candidates
        refuse_settings(self.args, has_own_loss=self.compute_loss_func is not None)
        refuse_sharded(self.model)
        refuse_added_loss(self.model)
        check_combination(selection, self._step_settings)
        self._proxy_name = check_proxy(self._step_settings.candidates, proxy_model)
        self._proxy = proxy_model
        candidates = selection.keep * selection.oversample
        if candidates % world_size():
            raise InvalidSettings(
                f"{selection.keep} x {selection.oversample} candidates cannot be shared by {world_size()} processes; "
                "choose keep and oversample so that their product is a multiple"
            )
        if target_rows is not None and target_rows < 1:
            raise InvalidSettings(f"target_rows must be at least 1, got {target_rows}")
        # Not _train_batch_size, which is the Trainer's own and which some versions set anew when training starts.
        self._share = candidates // world_size()  # of every process, in one choice
        self._rows_of_an_epoch = 0
        self._source_of_row: list[str | None] | None = None  # of all rows, once they were asked for
        by_source = self._step_settings.candidates_kind == "sources"
        self._source_numbers = source_numbers(self._sources_of_rows()) if by_source else None
        scored = candidates
        if self._source_numbers is not None:
            sources = int(self._source_numbers.max() + 1)
            scored = min(candidates, sources * self._step_settings.source_rows)
            if said := said_of_many_sources(sources, candidates):
                logger.warning("%s", said)
        self._usable_target = np.arange(len(self.target_dataset))
        if selection.needs.target_only or selection.needs.alignment is not None:
            most = self.args.per_device_train_batch_size
            self._usable_target = usable_target_rows(self._collated_target, len(self.target_dataset), most_rows=most)
        self._target_count = target_rows or max(1, min(len(self._usable_target), scored // 2))
        if isinstance(selection, TargetOnly):
            logger.warning("target-only trains on the target rows themselves, which memorises small targets")
        self._step: OnlineStep | None = None
        self._ahead: Ahead | None = None
        self._saved_state: dict[str, Tensor] = {}
        self._target_seen = np.zeros(len(self.target_dataset), dtype=np.bool_)
        self._micro, self._divisor = 0, 0.0
        self._meter = Meter()
        self._said: set[str] = set()  # what is logged once
        self._candidates: CandidateLog | None = None
        self._forecasts = Forecaster(every=forecast_every, clip=self.args.max_grad_norm, say_once=self._say_once)
        self.add_callback(_Hooks(after_update=self._compare_forecast, at_the_end=self._flush))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Candidates with their places in the data set."""
        rows, collate = self._sized_rows(), self.data_collator
        if isinstance(rows, datasets.Dataset):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        sampler, choices = self._get_train_sampler(rows), self._step_settings.reuse
        total = len(rows) if sampler is None else len(sampler)
        # Of an epoch's rows, those that fill no choice come last; of windows they are left out.
        self._rows_of_an_epoch = total if choices == 1 else 0
        loader = candidate_loader(
            rows, collate, sampler, self.args, share=self._share, choices=choices, processes=world_size()
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; nothing is left over from an earlier call, even one that stopped in the middle."""
        self._step, self._saved_state, self._candidates = None, {}, None
        self._forecasts.forget()
        self._micro, self._divisor, self._meter = 0, 0.0, Meter()
        self._ahead = Ahead(self.selection, self.args) if isinstance(self.selection, Lookahead) else None
        self._target_seen = np.zeros(len(self.target_dataset), dtype=np.bool_)
        if self._log_candidates and not resume_from_checkpoint:
            self._refuse_earlier_candidates()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except NonFinite as error:
            done = self.state.global_step
            if not done:  # so not this training's fault
                raise
            rate = f"{done} update{'s'[: done != 1]} with a learning rate of up to {self.args.learning_rate:g}"
            raise NonFinite(f"after {rate}: {error}", rows=error.rows) from error

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; with a look-ahead, through a buffer of coming batches."""
        source = epoch_iterator if self._ahead is None else self._ahead.batches(epoch_iterator)
        return super().get_batch_samples(source, *args, **kwargs)

    def _raw_batches(self, inputs: Any) -> list[Batch]:
        """A batch of the data loader as candidates."""
        inputs = dict(self._prepare_inputs(inputs))
        rows: Tensor = inputs.pop(ROWS)
        return to_batches(inputs, rows, most_rows=self.args.per_device_train_batch_size)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Candidates of one update, by which the Trainer counts samples."""
        return int(self._share * args.gradient_accumulation_steps * world_size())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One choice; after the last of an update, its gradient stands in the parameters. The choice's mean loss."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        step = self._online_step()
        self._check_count(int((inputs[ROWS] >= 0).sum()))  # without fillers
        candidates = self._raw_batches(inputs)
        number = self.state.global_step * self.args.gradient_accumulation_steps + self._micro
        cold = self.state.global_step < cold_updates(self.selection)
        looks = step.looks(candidates, cold=cold)
        places = self._target_places(number, looks=looks)
        target = self._target_batches(places) if looks else []
        seed = child_seed(self.args.seed, "uniform choice", number)
        with self.compute_loss_context_manager():
            if self._ahead is not None and not cold:
                where = (self.optimizer, self.lr_scheduler, self._raw_batches)
                proposal = self._ahead.propose(self.state.global_step, candidates, target, step, *where)
                looks = self._ahead.rehearsed
            else:
                proposal = step.propose(candidates, target, self.optimizer, cold=cold, seed=seed, fresh_target=looks)
        for name, param in step.params.items():
            grad = proposal.gradient[name]
            # In the parameter's own layout: fused optimizers read both as one stretch of memory.
            param.grad = torch.empty_like(param).copy_(grad) if param.grad is None else param.grad.add_(grad)
        self._divisor += proposal.divisor
        self._micro += 1
        self._record(proposal, candidates, number, looked=places if looks else None)
        if self.accelerator.sync_gradients:
            self._finish_update(step, proposal, target, places)
        share = self._mean_loss(proposal) / self.current_gradient_accumulation_steps
        return torch.tensor(share, device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's entry, with what the choices since the last one were like."""
        if "loss" in logs or "train_loss" in logs:  # the latter: the last entry, after the last loss that was logged
            logs = {**logs, **self._meter.take()}
        if "loss" in logs:
            self._flush()
        super().log(logs, *args, **kwargs)

    def _finish_update(self, step: OnlineStep, proposal: Proposal, target: list[Batch], places: IntArray) -> None:
        """Add up over processes, divide once, and look ahead."""
        for param in step.params.values():
            assert param.grad is not None
            param.grad.copy_(add_up(param.grad)).div_(self._divisor)
        self._micro, self._divisor = 0, 0.0
        gradient = {name: param.grad for name, param in step.params.items() if param.grad is not None}
        if step.remembers:
            step.observe(gradient, self.optimizer, clipped=clip_factor(gradient, self.args.max_grad_norm))
        if self._forecasts.is_due(self.state.global_step + 1) and not proposal.cold and step.has_target:
            loss, goal = proposal.target_loss, proposal.target_gradient
            if loss is None or goal is None:  # chosen by another model, or by an earlier look
                target = self._target_batches(places)
                with self.compute_loss_context_manager():
                    look = step.look(target)
                loss, goal = look.loss, look.mean
            self._forecasts.predict(target, loss, goal, gradient, step.params, self.optimizer)

    def work(self) -> Tensor:
        """(parts, 2) as ``tamis.online.cost.Counter.total``: what the run has cost. Every process must call it."""
        return self._online_step().work()

    def _check_count(self, here: int) -> None:
        """Candidates are as many as asked for, or what is left of the data at the end of an epoch."""
        asked, found = self._share * world_size(), sum(counts_of_all(here))
        if found != asked and found != self._rows_of_an_epoch % asked:
            raise InvalidInput(
                f"a choice was given {found} candidates where keep x oversample = {asked}; let the trainer make its "
                "own data loader, without split_batches"
            )

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

    def _mean_loss(self, proposal: Proposal) -> float:
        """Of the choice, as the update weighs it; of the target rows if those were trained on."""
        choice = proposal.choice
        if not len(choice.rows):
            return float("nan") if proposal.target_loss is None else proposal.target_loss
        weights = np.abs(choice.weights)
        if self._step_settings.reduction == "tokens":
            weights = weights * proposal.tokens[choice.rows]
        used = weights > 0  # others may not have been run
        return float(np.average(proposal.losses[choice.rows][used], weights=weights[used]))

    def _compare_forecast(self) -> None:
        """What the last update that was forecast did to the target rows it was made for."""
        with self.compute_loss_context_manager():
            found = self._forecasts.compare(self._online_step().model, self.args.device)
        if found is not None:
            self._meter.note("predicted_drop", found[0])
            self._meter.note("realised_drop", found[1])

    def _record(self, proposal: Proposal, candidates: list[Batch], number: int, *, looked: IntArray | None) -> None:
        none = torch.zeros(0, dtype=torch.int64)  # of several processes, one may have no candidate
        places = gather_rows(torch.cat([none, *(batch.rows.cpu() for batch in candidates)])).numpy()
        numbers, sources = self._in_the_log(places)
        self._meter.add(proposal, sources)
        tell_recorders(self.callback_handler.callbacks, candidates, proposal, reduction=self._step_settings.reduction)
        if looked is not None:
            self._target_seen[looked] = True
            self._meter.note_last("target_rows_seen", float(self._target_seen.sum()))
        if proposal.choice.fallback is not None:
            self._say_once(
                f"{proposal.choice.fallback}, so weights were equal, first in update {self.state.global_step + 1}; "
                "'selection/fallback' in the log is the share of such choices"
            )
        if self._log_candidates and is_main():
            step = self.state.global_step + 1
            if self._candidates is None:
                self._candidates = CandidateLog(self._candidates_folder(), first_step=step)
            self._candidates.add(proposal, step=step, choice=number, rows=numbers, sources=sources)

    def _in_the_log(self, places: IntArray) -> tuple[IntArray, list[str | None]]:
        """Under which numbers rows of the training data are logged, and where they come from, as far as it says so."""
        sources = self._sources_of_rows()
        return places, [sources[int(place)] for place in places]

    def _sources_of_rows(self) -> Sequence[str | None]:
        """Of all rows of the training data."""
        if self._source_of_row is None:
            rows = self._sized_rows()
            has_them = isinstance(rows, datasets.Dataset) and "source" in rows.column_names
            found = rows["source"] if has_them else [None] * len(rows)
            self._source_of_row = [None if source in (None, "") else str(source) for source in found]
        return self._source_of_row

    def _candidates_folder(self) -> Path:
        return Path(self.args.output_dir, _CANDIDATES)

    def _refuse_earlier_candidates(self) -> None:
        refuse_earlier_parts(self._candidates_folder())

    def _target_places(self, number: int, *, looks: bool) -> IntArray:
        """All target rows of a choice; choices that share a look share its rows, so that all usable have their turn."""
        scorings = self._online_step().scorings
        if scorings is None:
            look = number // max(self._step_settings.target_every, self._step_settings.reuse)
        else:
            look = scorings if looks else max(0, scorings - 1)
        usable = self._usable_target
        turn = target_positions(look, count=self._target_count, total=len(usable), seed=self.args.seed)
        found: IntArray = usable[turn]
        return found

    def _target_batches(self, places: IntArray) -> list[Batch]:
        """This process's share of the target rows of a choice."""
        positions = places[rank() :: world_size()]
        if not len(positions):
            return []
        inputs = self._prepare_inputs(self._collated_target(positions))
        return to_batches(inputs, torch.from_numpy(positions), most_rows=self.args.per_device_train_batch_size)

    def _collated_target(self, positions: IntArray) -> dict[str, Any]:
        collate = self._get_collator_with_removed_columns(self.data_collator, description="target")
        return dict(collate([self.target_dataset[int(place)] for place in positions]))

    def _online_step(self) -> OnlineStep:
        if self._step is None:
            model = self.accelerator.unwrap_model(self.model)
            if self._proxy is None and self._proxy_name is not None:
                self._proxy = load_proxy(self._proxy_name, self.args.device)
            proxy = None if self._proxy is None else self._proxy.to(self.args.device)
            self._step = OnlineStep(
                model,
                self.selection,
                self._step_settings,
                proxy=proxy,
                sources=self._source_numbers,
                clip=self.args.max_grad_norm,
            )
            self._step.load_state_dict(self._saved_state)
            dropout = dropout_of(model)
            if dropout is not None:
                self._say_once(f"{dropout}, but dropout is off in online steps: rows must be compared by one model")
        return self._step

    def _sized_rows(self) -> Any:
        rows = self.train_dataset
        if rows is None or not hasattr(rows, "__len__"):
            raise Unsupported("train_dataset must have a length; streams are not supported yet")
        return rows

    def _prepared_target(self, rows: Any) -> Any:
        if rows is None or not hasattr(rows, "__len__") or not len(rows):
            raise InvalidInput("target_dataset must hold at least one row of the task that training should help")
        return rows

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, and what the selection remembers."""
        self._flush()
        super()._save_checkpoint(*args, **kwargs)
        state = {} if self._step is None else self._step.state_dict()
        state |= {} if self._ahead is None else self._ahead.state_dict()
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            save_selection(folder, state, self._target_seen, settings=self._settings_to_resume_with())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.restore_selection(Path(checkpoint))

    def restore_selection(self, checkpoint: Path) -> None:
        """Go on with what the selection remembers in ``checkpoint``, the cost up to there included.

        Raises:
            InvalidInput: it has none, a damaged one, or is of a run with other target rows.
            InvalidSettings: it is of a run that chose otherwise.
        """
        self._saved_state, self._target_seen = load_selection(
            checkpoint, target_rows=len(self.target_dataset), settings=self._settings_to_resume_with()
        )
        if self._ahead is not None:
            self._saved_state = self._ahead.load_state_dict(self._saved_state)

    def _settings_to_resume_with(self) -> dict[str, Any]:
        return selection_settings(
            self.selection,
            self._step_settings,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            target_rows=self._target_count,
        )

    def _flush(self) -> None:
        if self._candidates is not None:
            self._candidates.flush()


class OnlineTrainer(OnlineMixin, Trainer):  # type: ignore[misc]  # transformers has no types here
    """``transformers.Trainer`` that chooses and weights its training data at every step."""


class _Hooks(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Calls back where all versions of the Trainer have a hook: after an update, before it is logged and saved."""

    def __init__(self, *, after_update: Callable[[], None], at_the_end: Callable[[], None]) -> None:
        self._after_update, self._at_the_end = after_update, at_the_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The parameters have moved."""
        self._after_update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training has ended."""
        self._at_the_end()
