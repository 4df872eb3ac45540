"""A causal language model as a problem, losses of token rows as functions of trained parameters, and a run of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tamis.errors import StoreCorrupted, Unsupported
from tamis.gradients.functional import Layout, Predictions
from tamis.model.checkpointing import without_checkpointing
from tamis.model.float32 import in_float32
from tamis.model.loss import evaluation_mode, gathered_before_head, supervised_positions
from tamis.trajectory.log import LoggedStep, LogReader
from tamis.trajectory.run import TOLERANCES, Group, Rule, State, Step
from tamis.trajectory.token_rows import TokenMicro, TokenRow, collate_rows
from tamis.types import IntArray

__all__ = ["CausalProblem", "RecordedRun", "random_state_of"]


class CausalProblem:
    """Mean cross-entropy of each row over its supervised tokens.

    Args:
        model: its own parameters are not touched; those named in ``shapes`` are replaced on every call.
        shapes: the trained parameters, in the order of the flat vector.
        autocast: dtype that the run computed in under autocast, None without.
        measuring: compute in float32 at least, whatever the run computed in.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, Sequence[int]],
        *,
        autocast: torch.dtype | None = None,
        measuring: bool = False,
    ) -> None:
        self.model, self.layout = model, Layout(shapes)
        self._shapes, self._autocast, self._measuring = shapes, autocast, measuring

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def measured(self) -> CausalProblem:
        """The same losses without 16-bit rounding, which is larger than what one row of training changes."""
        return CausalProblem(self.model, self._shapes, measuring=True)

    def predict(self, params: Mapping[str, Tensor], micro: TokenMicro) -> Predictions:
        """Logits where a supervised token is predicted; with the pass's own dropout if it had any."""
        batch = micro.batch
        positions = supervised_positions(batch)
        call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        with ExitStack() as stack:
            # The fused attention kernels cannot be differentiated twice; the plain one can.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(gathered_before_head(self.model, positions, tuple(batch.input_ids.shape)))
            stack.enter_context(evaluation_mode(self.model, checkpointing=False))
            if micro.random_state is not None:
                stack.enter_context(_dropout_on(self.model))
                stack.enter_context(_randomness(micro.random_state))
            if self._measuring:
                stack.enter_context(in_float32(self.model))
            elif self._autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype=self._autocast))
            logits = torch.func.functional_call(self.model, dict(params), (), call).logits
        logits = logits.view(-1, logits.shape[-1])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scale = 1 / positions.counts.to(logits)
        return Predictions(
            logits=logits,
            labels=positions.labels,
            row=positions.row,
            scale=scale[positions.row],
            rows=len(batch.rows),
        )


class RecordedRun:
    """A run on disk as a trajectory; one segment of it is in memory at a time.

    Args:
        reader: the log.
        problem: the model it was recorded from.
    """

    def __init__(self, reader: LogReader, problem: CausalProblem) -> None:
        self.reader, self.problem = reader, problem
        manifest = reader.manifest
        self.rule = Rule(
            kind=manifest["kind"],
            groups=tuple(Group(**group) for group in manifest["groups"]),
            clip=manifest["clip"],
        )
        self.rows: list[TokenRow] = reader.rows()
        self._steps: dict[int, Step] = {}

    @property
    def measured(self) -> CausalProblem:
        """Without 16-bit rounding."""
        return self.problem.measured()

    @property
    def tolerance(self) -> float:
        """By the coarsest numbers that the run computed in; frozen weights of 16 bits make activations of 16 bits.

        A run in float64 has losses of float32 all the same: Transformers takes them of logits in that.
        """
        found = (self.reader.manifest.get(name) for name in ("autocast", "dtype", "base_dtype"))
        return max(1e-5, *(TOLERANCES.get(getattr(torch, name), 1e-2) for name in found if name is not None))

    @property
    def num_steps(self) -> int:
        """T."""
        return self.reader.bounds[-1]

    @property
    def boundaries(self) -> Sequence[int]:
        """Steps before which the state is on disk."""
        return self.reader.bounds

    def state(self, index: int) -> State:
        """The state before ``index``, on the model's device."""
        found, device = self.reader.state(index), self.problem.device
        if any(len(part) != self.problem.layout.numel for part in (found.theta, *found.moments)):
            raise StoreCorrupted(
                f"{self.reader.folder}: the state before update {index + 1} has {len(found.theta)} numbers and the run "
                f"trained {self.problem.layout.numel}; it is another run's: record the run again"
            )
        moments = tuple(moment.to(device) for moment in found.moments)
        return State(theta=found.theta.to(device), moments=moments, count=found.count)

    def step(self, index: int) -> Step:
        """The step ``index``."""
        if index not in self._steps:
            if len(self._steps) > 4096:
                self._steps.clear()
            self._steps[index] = self._make(index, self.reader.step(index))
        return self._steps[index]

    def micros_of(self, rows: Sequence[TokenRow], *, most: int) -> tuple[TokenMicro, ...]:
        """Other rows (of a target) in batches of at most ``most``, in their order."""
        found = []
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            numbers = list(range(first, first + len(part)))
            found.append(TokenMicro(batch=collate_rows(part, numbers, device=self.problem.device)))
        return tuple(found)

    def _make(self, index: int, logged: LoggedStep) -> Step:
        device, micros = self.problem.device, []
        for micro in logged.micros:
            rows = [self.rows[int(row)] for row in micro.rows]
            drops = bool(micro.random_state)  # a mask of dropout has the shape of the whole batch
            batch = collate_rows(rows, micro.rows.tolist(), device=device, width=micro.width if drops else None)
            micros.append(TokenMicro(batch=batch, random_state=micro.random_state if drops else None))
        numbers: IntArray = np.concatenate([micro.rows for micro in logged.micros])
        weights = [weight for micro in logged.micros for weight in micro.weights]
        return Step(
            index=index,
            micros=tuple(micros),
            rows=numbers,
            weights=torch.tensor(weights, dtype=torch.float64, device=device),
            rates=logged.rates,
            losses=tuple(micro.loss for micro in logged.micros) if _has_losses(logged) else (),
            norm=logged.norm,
        )


def _has_losses(logged: LoggedStep) -> bool:
    """False for trainers that make their loss outside the model: then the gradient's norm is what is checked."""
    return not any(math.isnan(micro.loss) for micro in logged.micros)


def random_state_of(device: torch.device) -> dict[str, Tensor]:
    """The generators that dropout draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


@contextmanager
def _dropout_on(model: nn.Module) -> Iterator[None]:
    """Training mode without gradient checkpointing, which would run blocks again with the model's own weights."""
    model.train()  # undone by whoever switched the modules before
    with without_checkpointing(model):
        yield


@contextmanager
def _randomness(state: Mapping[str, Tensor]) -> Iterator[None]:
    if "cuda" in state and not torch.cuda.is_available():
        raise Unsupported("the run drew its dropout on a GPU, and there is none here; attribute it on a GPU")
    before = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if "cuda" in state else None
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
