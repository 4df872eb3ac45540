"""One bench for all measurements of a build: the same rows, the same sketch, the same batches for both models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from tamis.projection.factorized import FactorizedProjector
from tamis.proxies.influence import Measured, measure
from tamis.proxies.retention import Cost, Kept, block_tflops, kept, total_tflops
from tamis.proxies.rows import Roles, Row, TargetRows

__all__ = ["Bench"]

_VALIDATION_TARGET_ROWS = 8  # of each target, in the measurements during alignment


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
        self, model: nn.Module, proxy: nn.Module, full: Measured, ours: Measured, *, build: float, align: float
    ) -> Cost:
        """Of scoring with both, and of the seconds that building and aligning took."""
        rows = self.roles.held_out
        return Cost(
            params_full=sum(p.numel() for p in model.parameters()),
            params_proxy=sum(p.numel() for p in proxy.parameters()),
            tflops_full=total_tflops(model, rows),
            tflops_proxy=total_tflops(proxy, rows),
            block_tflops_full=block_tflops(model, rows),
            block_tflops_proxy=block_tflops(proxy, rows),
            seconds_full=full.seconds,
            seconds_proxy=ours.seconds,
            build_seconds=build,
            align_seconds=align,
            pool_pass_seconds=full.seconds / full.tokens * self.roles.mean_tokens * self.roles.pool_rows,
        )

    def kept(self, name: str, ours: Measured, full: Measured) -> Kept:
        """Agreement on the report's rows."""
        return kept(name, ours, full, self.roles.target.names, seed=self.seed)
