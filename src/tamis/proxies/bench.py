"""One bench for all measurements of a build: the same rows, the same sketch, the same batches for both models."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from tamis.gradients.per_sample import per_sample_features
from tamis.model.targets import gradient_layers
from tamis.projection.factorized import FactorizedProjector
from tamis.proxies.influence import Measured, measure
from tamis.proxies.retention import Cost, Kept, block_tflops, kept, total_tflops
from tamis.proxies.rows import Roles, Row, TargetRows, batches_of
from tamis.types import Batch

__all__ = ["Bench"]

_VALIDATION_TARGET_ROWS = 8  # of each target, in the measurements during alignment
_TIMED_ROWS, _REPEATS = 24, 3


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every measurement of a build shares."""

    roles: Roles
    projector: FactorizedProjector
    batch_tokens: int
    pad_id: int
    seed: int

    def held_out(self, model: nn.Module) -> Measured:
        """The report's rows."""
        return self._measure(model, self.roles.held_out, self.roles.target)

    def validation(self, model: nn.Module) -> Measured:
        """The rows by which alignment stops, against a few rows of every target."""
        return self._measure(model, self.roles.validation, self.few_targets())

    def annotate(self, model: nn.Module) -> Measured:
        """The rows for alignment, as examples of what the model scores."""
        return self._measure(model, self.roles.align, self.roles.target)

    def few_targets(self) -> TargetRows:
        """The first rows of every target."""
        target = self.roles.target
        first: list[int] = []
        for index in range(len(target.names)):
            first += [i for i, group in enumerate(target.group.tolist()) if group == index][:_VALIDATION_TARGET_ROWS]
        return replace(target, rows=tuple(target.rows[i] for i in first), group=target.group[first])

    def _measure(self, model: nn.Module, rows: tuple[Row, ...], target: TargetRows) -> Measured:
        return measure(
            model, rows, target, projector=self.projector, batch_tokens=self.batch_tokens, pad_id=self.pad_id
        )

    def cost(
        self, model: nn.Module, other: nn.Module, *, build: float, align: float, theirs: Bench | None = None
    ) -> Cost:
        """Of scoring with ``model`` and ``other``, and of the seconds that building and aligning took.

        Both models run over a few held-out rows in turn, three times, and the best time of each counts: what else the
        machine does meets both. ``theirs`` is the other's bench, if it has the rows in other tokens.
        """
        theirs = theirs or self
        spent = [
            (self.timed(self.features_of(model)), theirs.timed(theirs.features_of(other))) for _ in range(_REPEATS)
        ]
        full, ours = (min(times) for times in zip(*spent, strict=True))
        tokens = sum(len(row.tokens.input_ids) for row in self.timed_rows())
        return Cost(
            params_full=sum(p.numel() for p in model.parameters()),
            params_proxy=sum(p.numel() for p in other.parameters()),
            tflops_full=total_tflops(model, self.roles.held_out),
            tflops_proxy=total_tflops(other, theirs.roles.held_out),
            block_tflops_full=block_tflops(model, self.roles.held_out),
            block_tflops_proxy=block_tflops(other, theirs.roles.held_out),
            timed_rows=len(self.timed_rows()),
            seconds_full=full,
            seconds_proxy=ours,
            build_seconds=build,
            align_seconds=align,
            pool_pass_seconds=full / tokens * self.roles.mean_tokens * self.roles.pool_rows,
        )

    def timed_rows(self) -> tuple[Row, ...]:
        """The rows over which speed is measured."""
        return self.roles.held_out[:_TIMED_ROWS]

    def features_of(self, model: nn.Module) -> Callable[[Batch], object]:
        """One batch of a scoring pass."""
        layers = gradient_layers(model)
        return lambda batch: per_sample_features(model, batch, layers, self.projector)

    def timed(self, run: Callable[[Batch], object]) -> float:
        """Seconds of ``run`` over the batches of the timed rows."""
        batches = batches_of(self.timed_rows(), batch_tokens=self.batch_tokens, pad_id=self.pad_id)
        started = time.perf_counter()
        for batch in batches:
            run(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def kept(self, name: str, ours: Measured, full: Measured) -> Kept:
        """Agreement on the report's rows."""
        return kept(name, ours, full, self.roles.target.names, seed=self.seed)
