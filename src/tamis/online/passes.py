"""The passes that a step makes of the trained model: looks at the target, scores, gradients of the chosen.

Each says to the counter what it cost. Rows belong to this process; losses and scores come back of all processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tamis.errors import InvalidInput
from tamis.gradients.jvp import loss_tangents
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.rows import RowGradients, hold_gradients, summed_gradient, zero_gradient
from tamis.model.processes import counts_of_all, rank
from tamis.online.batches import regrouped
from tamis.online.cost import Counter
from tamis.online.methods.choice import Vector
from tamis.online.target import Look
from tamis.online.together import add_up, gather_rows, offset_of
from tamis.types import Batch

__all__ = ["Passes"]


class Passes:
    """Forward and backward passes of one model, with all weights frozen.

    Args:
        model: the trained model.
        matrices: its trainable parameters.
        keep_factors: hold gradients as factors, position by position, whatever room they take.
        target_rank: of the directions that candidates are compared with.
    """

    def __init__(
        self, model: nn.Module, matrices: Sequence[ParamMatrix], *, keep_factors: bool, target_rank: int | None = None
    ) -> None:
        self._model, self._matrices = model, matrices
        self._keep_factors, self._target_rank = keep_factors, target_rank
        self.counter = Counter(model, matrices, target_rank=target_rank)

    def look(self, target: Sequence[Batch], *, count_cost: bool = True) -> Look:
        """One forward and backward pass of the trained model over target rows.

        Raises:
            InvalidInput: no process has a row.
        """
        count = sum(counts_of_all(sum(len(batch.rows) for batch in target)))
        if not count:
            raise _no_target()
        ones = [(batch, torch.ones(len(batch.rows))) for batch in target]
        if ones:
            sums, losses = summed_gradient(self._model, self._matrices, ones)
        else:
            sums, losses = zero_gradient(self._matrices), torch.zeros(0)
        if count_cost:
            self.counter.add("target", "gradient", target)
        mean = {name: add_up(grad) / count for name, grad in sums.items()}
        return Look(sums=sums, mean=mean, loss=float(add_up(losses.double().sum())) / count, count=count)

    def look_by_row(self, target: Sequence[Batch]) -> tuple[Look, RowGradients]:
        """A look that keeps the target's rows apart."""
        if not target:
            raise _no_target()
        rows, losses = self.hold(target)
        self.counter.add("target", "gradient", target)
        sums = rows.weighted(torch.ones(len(rows), dtype=torch.float64))
        mean = {name: grad / len(rows) for name, grad in sums.items()}
        return Look(sums=sums, mean=mean, loss=float(losses.mean()), count=len(rows)), rows

    def hold(self, batches: Sequence[Batch]) -> tuple[RowGradients, Tensor]:
        """Gradients of this process's rows, losses of all processes'."""
        rows = RowGradients(self._matrices)
        held = [
            hold_gradients(self._model, batch, rows, keep_factors=self._keep_factors, target_rank=self._target_rank)
            for batch in batches
        ]
        mine = [losses.double().cpu() for losses in held]
        return rows, gather_rows(torch.cat(mine) if mine else torch.zeros(0, dtype=torch.float64))

    def slopes(self, candidates: Sequence[Batch], direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Losses of all processes' candidates and their derivatives along ``direction``, in forward passes alone."""
        device = next(iter(direction.values())).device
        pairs = [loss_tangents(self._model, batch.to(device), direction) for batch in candidates]
        self.counter.add("candidates", "jvp", candidates)
        none = torch.zeros(0, dtype=torch.float64)  # of several processes, one may have no candidate
        losses, slopes = (gather_rows(torch.cat([none, *(pair[i].double().cpu() for pair in pairs)])) for i in (0, 1))
        return losses, slopes

    def run_chosen(
        self, candidates: Sequence[Batch], coefficients: Vector, counts: list[int]
    ) -> tuple[dict[str, Tensor], Vector]:
        """``sum_i c_i grad l_i`` of this process's candidates, and losses of all processes' that were run."""
        start = offset_of(counts)
        parts = regrouped(candidates, coefficients[start : start + counts[rank()]])
        losses = np.full(counts[rank()], np.nan)
        if parts:
            pairs = [(batch, torch.from_numpy(own)) for batch, own, _ in parts]
            gradient, seen = summed_gradient(self._model, self._matrices, pairs)
            losses[np.concatenate([at for _, _, at in parts])] = seen.numpy()
        else:
            gradient = zero_gradient(self._matrices)
        self.counter.add("update", "gradient", [batch for batch, _, _ in parts])
        return gradient, gather_rows(torch.from_numpy(losses)).numpy()


def _no_target() -> InvalidInput:
    return InvalidInput("the method needs target rows at every step and was given none with a supervised token")
