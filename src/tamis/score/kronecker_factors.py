"""Kronecker factors of every layer, estimated on some pool rows in parts, each of which survives a kill.

Sums over rows, not rows, are what is kept; so parts are files of a folder of their own, and not shards of a stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tamis.collect import Task, named_row
from tamis.data.batches import collate, plan_batches
from tamis.disk import replace_atomically
from tamis.errors import Unsupported
from tamis.gradients.kronecker import Labels, SecondMoments, SquaredCoordinates, curvature_losses
from tamis.gradients.per_sample import run_batch
from tamis.identity import rows_sha256
from tamis.maths.kronecker import KroneckerBasis, eigenbasis, kfac_eigenvalues, precondition
from tamis.model.memory import TokenLimit, default_batch_tokens
from tamis.model.processes import barrier, is_main, rank, world_size
from tamis.score.decisions import kept_tensors
from tamis.seeds import child_seed
from tamis.types import IntArray

__all__ = ["KroneckerCurvature", "Strategy"]

Strategy = Literal["ekfac", "kfac"]
Sums = SecondMoments | SquaredCoordinates

_BASES, _EIGENVALUES = "bases.safetensors", "eigenvalues.safetensors"
_PART_ROWS = 1024  # what a kill can lose; a part takes the disk space of all factors until it is summed


@dataclass(frozen=True, kw_only=True)
class KroneckerCurvature:
    """The curvature of the pool's loss as K-FAC or EK-FAC has it.

    Args:
        task: whose model.
        rows: pool rows that it is estimated on, ascending.
        strategy: "kfac", or "ekfac" with eigenvalues measured anew: a second pass.
        labels: "sampled" from the model's predictions, or the rows' own ("empirical").
        damping: in units of a layer's mean eigenvalue.
    """

    task: Task
    rows: IntArray
    strategy: Strategy
    labels: Labels
    damping: float

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the inverse, besides pool and model."""
        return {**self._factors(), "strategy": self.strategy, "damping": self.damping}

    def _factors(self) -> dict[str, Any]:
        return {
            "algorithm": "kronecker-factors-v2",
            "labels": self.labels,
            "rows": rows_sha256(self.rows),
            "seed": self.task.seed if self.labels == "sampled" else None,
            "batch_invariant": self.task.collecting.batch_invariant,
        }

    def start(self) -> Callable[[str, Tensor], Tensor]:
        """The damped inverse of a layer, applied to gradients ``(J, O, I)``; after ``prepare``."""
        device = self.task.loaded.device
        bases = self._bases()
        if self.strategy == "kfac":
            eigenvalues = {name: kfac_eigenvalues(basis) for name, basis in bases.items()}
        else:
            eigenvalues = kept_tensors(self._folder() / _EIGENVALUES)
        on_device = {name: _moved(basis, device) for name, basis in bases.items()}
        there = {name: values.to(device) for name, values in eigenvalues.items()}

        def apply(name: str, gradients: Tensor) -> Tensor:
            return precondition(gradients, on_device[name], there[name], damping=self.damping)

        return apply

    def prepare(self) -> None:
        """Make what is missing, by all processes together: ``start`` is called by those alone that have work to do."""
        self._make_bases()
        if self.strategy == "ekfac":
            self._make_eigenvalues()

    def _folder(self) -> Path:
        return self.task.workdir("kronecker-factors", self._factors(), uses_target=False)

    def _bases(self) -> dict[str, KroneckerBasis]:
        stored = kept_tensors(self._folder() / _BASES)
        names = [name.removeprefix("values_in/") for name in stored if name.startswith("values_in/")]
        return {name: KroneckerBasis(**{field: stored[f"{field}/{name}"] for field in _FIELDS}) for name in names}

    def _make_bases(self) -> None:
        def compute(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for layer in self.task.layers():
                a = sums[f"inputs/{layer.name}"] / sums[f"tokens/{layer.name}"]
                s = sums[f"output_grads/{layer.name}"] / len(self.rows)
                basis = eigenbasis(a, s)
                found |= {f"{field}/{layer.name}": getattr(basis, field).float() for field in _FIELDS}
            return found

        self._once(self._folder() / _BASES, "covariances", SecondMoments, compute)

    def _make_eigenvalues(self) -> None:
        def begin() -> SquaredCoordinates:
            device = self.task.loaded.device
            return SquaredCoordinates(
                {name: _moved(basis, device) for name, basis in self._bases().items()}, self.task.layers()
            )

        def compute(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name.removeprefix("squares/"): total / len(self.rows) for name, total in sums.items()}

        self._once(self._folder() / _EIGENVALUES, "eigenvalues", begin, compute)

    def _once(
        self,
        path: Path,
        name: str,
        begin: Callable[[], Sums],
        compute: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        """Write ``path`` from sums over all rows, part by part, unless it is there."""
        folder = path.parent
        if folder not in self.task.stages:
            self.task.stages.append(folder)  # a run that finds it finished has its cost on disk
        starts = range(0, len(self.rows), _PART_ROWS)
        parts = [folder / f"{name}-{start:08d}.part" for start in starts]
        missing = [] if path.exists() else [k for k, part in enumerate(parts) if not part.exists()]
        is_done = path.exists()
        limit = TokenLimit(self.task.collecting.batch_tokens or 0, folder)
        with self.task.progress.stage(f"{name} ({self.task.pool.name})", len(self.rows), "rows") as advance:
            advance(len(self.rows) - sum(len(self.rows[starts[k] : starts[k] + _PART_ROWS]) for k in missing))
            barrier()  # nobody writes before everybody has looked
            for k in missing[rank() :: world_size()]:
                rows = self.rows[starts[k] : starts[k] + _PART_ROWS]
                self._part(parts[k], rows, begin, limit, number=k + (0 if name == "covariances" else len(parts)))
                advance(len(rows))
        barrier()  # every part is there
        if is_main():
            if not is_done:
                total: dict[str, Tensor] = {}
                for part in parts:
                    for key, value in kept_tensors(part).items():
                        total[key] = total[key].add_(value) if key in total else value.double()
                made = {key: value.float().contiguous() for key, value in compute(total).items()}
                replace_atomically(path, (save(made),))
            for part in parts:
                part.unlink(missing_ok=True)  # a killed run may have left some
        barrier()

    def _part(self, path: Path, rows: IntArray, begin: Callable[[], Sums], limit: TokenLimit, *, number: int) -> None:
        task, started = self.task, time.perf_counter()
        limit.tokens = limit.tokens or default_batch_tokens(task.loaded.device)
        lengths, places = task.pool.lengths[rows], np.arange(0)

        def compute() -> Sums:
            nonlocal places
            sums = begin()  # anew after a batch that did not fit: the sums have seen a part of it
            losses_of = curvature_losses(self.labels, seed=child_seed(task.seed, "kronecker factors"))
            most = 1 if task.collecting.batch_invariant else None
            for places in plan_batches(lengths, batch_tokens=limit.at(number), max_rows=most):
                batch = collate(rows[places], task.pool.take(rows[places]), 0).to(task.loaded.device)
                sums.see(batch)
                run_batch(task.loaded.model, batch, task.layers(), sums, losses_of=losses_of)
            return sums

        sums = limit.within_memory(
            number,
            compute,
            latest=lambda: (len(places), len(places) * int(lengths[places].max())),
            refuse=lambda: Unsupported(
                f"{named_row(task.pool, int(rows[places[0]]))}: its {int(lengths[places[0]])} tokens alone do not fit "
                "in memory beside the factors; lower --max-length"
            ),
        )
        found = {
            f"{kind}/{name}": total.float().cpu().contiguous()
            for kind, by_layer in vars(sums).items()
            if not kind.startswith("_")
            for name, total in by_layer.items()
        }
        task.record_cost(
            path.parent,
            number,
            time.perf_counter() - started,
            work="gradient",
            **task.pool.sizes(rows),
        )
        replace_atomically(path, (save(found),))


_FIELDS = ("vectors_in", "values_in", "vectors_out", "values_out")


def _moved(basis: KroneckerBasis, device: torch.device) -> KroneckerBasis:
    return KroneckerBasis(**{field: getattr(basis, field).to(device) for field in _FIELDS})
