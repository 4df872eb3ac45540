"""Floating-point operations and tokens of a training run: what scoring cost, what the target cost, what updates cost.

By the counter of ``tamis.model.flops``: passes of real tokens through the matrices of the model, padding and
element-wise work left out. Inner products of gradients that exist already (``G``, weights) are left out too: they are
below a hundredth of a pass. Measurements on held-out rows and forecasts are no part of a run's cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tamis.gradients.parameters import ParamMatrix
from tamis.model.flops import ModelShape, TrainedMatrices, forward_flops, stage_flops, training_flops
from tamis.online.together import add_up
from tamis.types import Batch

__all__ = ["PARTS", "Counter", "Part", "Work", "as_plain", "token_sums"]

Part = Literal["candidates", "target", "update"]
PARTS: tuple[Part, ...] = ("candidates", "target", "update")
# gradient: forward, backward to the activations, and a product per trained matrix; alignment: those passes, and
# products with a target direction of low rank, once cut; jvp: a forward pass beside its tangents; assembly: a product
# per trained matrix alone, of gradients whose factors were kept.
Work = Literal["gradient", "alignment", "jvp", "assembly"]


class Counter:
    """Adds up what one model's passes cost in this process.

    Args:
        model: whose passes they are.
        matrices: what of it is trained, or differentiated.
        target_rank: of the directions that rows are compared with, for the work ``alignment``.
    """

    def __init__(self, model: nn.Module, matrices: Sequence[ParamMatrix], *, target_rank: int | None = None) -> None:
        self._shape = ModelShape.from_model(model)
        # Multiplications per token in the body's matrices and, at supervised positions, in the head: with a whole
        # matrix, with a narrow direction; and operations of cutting it, which takes four products with the matrix.
        self._body = self._head = self._narrow_body = self._narrow_head = self._cut = 0.0
        for matrix in matrices:
            outs, ins = matrix.shape
            rank = target_rank if matrix.is_cut_to(target_rank) else None
            self._cut += 8.0 * (rank or 0) * outs * ins
            for layer in matrix.layers:
                size = layer.out_features * layer.in_features
                narrow = size if rank is None else rank * (outs + ins)
                if layer.kind in ("linear", "conv1d"):
                    self._body, self._narrow_body = self._body + size, self._narrow_body + narrow
                elif layer.kind == "head":
                    self._head, self._narrow_head = self._head + size, self._narrow_head + narrow
        self._own = torch.zeros(len(PARTS), 2, dtype=torch.float64)  # tokens and operations of each part
        self._before = torch.zeros_like(self._own)  # of all processes, by earlier runs that led here

    def flops(self, work: Work, sums: tuple[float, float, float]) -> float:
        """Operations of rows with ``sums`` (tokens, supervised tokens, squared lengths)."""
        tokens, supervised, squared = sums
        products = 2.0 * (self._body * tokens + self._head * supervised)
        if work == "assembly":
            return products
        if work == "gradient":
            return training_flops(self._shape, TrainedMatrices(body=self._body, head=self._head), *sums)
        if work == "alignment":
            narrow = 2.0 * (self._narrow_body * tokens + self._narrow_head * supervised)
            return stage_flops(self._shape, "gradient", *sums) + narrow
        # The tangent of a product has two terms: one with the tangent of what comes in, as dear as the product itself,
        # and one with the tangent of the weight. Attention multiplies two tangents' worth of products.
        return (
            forward_flops(self._shape, *sums) + forward_flops(self._shape, tokens, supervised, 2 * squared) + products
        )

    def add(
        self, part: Part, work: Work, batches: Sequence[Batch], used: Tensor | None = None, *, times: float = 1.0
    ) -> None:
        """Rows that went ``times`` through ``work`` for the sake of ``part``; ``used`` says which, None for all."""
        sums = token_sums(batches, used)
        own = self._own[PARTS.index(part)]
        own[0] += 0.0 if work == "assembly" else times * sums[0]
        own[1] += times * self.flops(work, sums) + (self._cut if work == "alignment" else 0.0)

    def total(self) -> Tensor:
        """(parts, 2): tokens and operations, of all processes and earlier runs. Every process must call it."""
        return self._before + add_up(self._own)

    def go_on_from(self, total: Tensor) -> None:
        """``total`` of the run that this one resumes."""
        self._before, self._own = total.clone(), torch.zeros_like(self._own)


def token_sums(batches: Sequence[Batch], used: Tensor | None = None) -> tuple[float, float, float]:
    """Tokens, supervised tokens, and the sum of the rows' squared lengths, padding left out; of the rows ``used``."""
    if not batches:
        return 0.0, 0.0, 0.0
    lengths = torch.cat([batch.attention_mask.sum(dim=1).double().cpu() for batch in batches])
    supervised = torch.cat([batch.supervised[:, 1:].sum(dim=1).double().cpu() for batch in batches])
    if used is not None:
        lengths, supervised = lengths[used], supervised[used]
    return float(lengths.sum()), float(supervised.sum()), float(lengths.square().sum())


def as_plain(total: Tensor) -> Mapping[str, Mapping[str, float]]:
    """``{part: {"tokens": ..., "tflops": ...}}``, as manifests hold it."""
    return {
        part: {"tokens": int(row[0]), "tflops": float(row[1]) / 1e12} for part, row in zip(PARTS, total, strict=True)
    }
