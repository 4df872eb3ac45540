"""Numeric checks of a loaded model: does a row's score depend on its batch mates, and does the sign mean what we say?

Both run on a handful of real rows. Neither copies or changes a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamis.data.batches import collate
from tamis.gradients.per_sample import Alignments, mean_gradient, per_sample_features, run_batch
from tamis.model.flops import FACTORIZED_SIDE
from tamis.model.loss import per_sample_losses
from tamis.projection import make_projector
from tamis.types import Batch, LayerSpec, TokenizedExample

__all__ = ["BatchCheck", "SignCheck", "check_batch_composition", "check_sign"]

# Largest relative difference that rounding alone explains, by the dtype that the model computes in. Measured: 2e-6 in
# float32, 1e-1 in bfloat16 (30 blocks, 135M parameters; it rounds at 2**-8, float16 at 2**-11).
_TOLERANCES = {"float64": 1e-5, "float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1}
_LARGEST_STEP_NUMEL = 1 << 25  # gradient entries held for the sign check: 128 MB of float32


@dataclass(frozen=True, kw_only=True)
class BatchCheck:
    """The same rows alone and padded in one batch: the largest differences, relative to the row alone."""

    rows: int
    loss_difference: float
    feature_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains the differences."""
        return self.loss_difference <= self.tolerance and self.feature_difference <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class SignCheck:
    """A gradient step on one pool row, predicted from its score and then taken."""

    row: int  # of the pool
    score: float  # <row's gradient, target's mean gradient>
    cosine: float
    target_loss: float
    predicted_change: float  # of the target loss: minus the step size times the score
    measured_change: float  # half the difference between a step forwards and a step backwards
    layers: int  # number of layers that took the step
    slack: float  # factor by which the two changes may differ

    @property
    def passed(self) -> bool:
        """Whether the loss moved the way the score's sign says, and by about as much."""
        if not self.predicted_change:
            return False
        return 1 / self.slack <= self.measured_change / self.predicted_change <= self.slack


def check_batch_composition(
    model: nn.Module, layers: Sequence[LayerSpec], rows: Sequence[TokenizedExample], *, dtype: str
) -> BatchCheck:
    """Losses and 16x16 features of ``rows`` in one padded batch against one row at a time."""
    projector = make_projector("factorized", dim=FACTORIZED_SIDE, seed=0)
    losses, features, _ = per_sample_features(model, _batch(rows), layers, projector)
    loss_difference = feature_difference = 0.0
    for i, row in enumerate(rows):
        loss, feature, _ = per_sample_features(model, _batch([row]), layers, projector)
        loss_difference = max(loss_difference, _relative(losses[i], loss[0]))
        feature_difference = max(feature_difference, _relative(features[i], feature[0]))
    return BatchCheck(
        rows=len(rows),
        loss_difference=loss_difference,
        feature_difference=feature_difference,
        tolerance=_TOLERANCES.get(dtype, _TOLERANCES["bfloat16"]),
    )


def check_sign(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    pool: Mapping[int, TokenizedExample],
    target: Sequence[TokenizedExample],
    *,
    dtype: str,
) -> SignCheck | None:
    """Take a small gradient step on the pool row that agrees or disagrees most with the target, and look at the loss.

    The step is taken in the last layers that fit a bound on memory. A layer ``a W^T`` with ``W - step * G`` is the same
    layer with ``-step * a G^T`` added to its output, so a hook does it and no weight is touched, in any dtype.

    Returns:
        None if every gradient is zero, so that there is nothing to check.
    """
    few = _last_layers(layers)
    target_batch = _batch(target)
    direction = mean_gradient(model, [target_batch], few, unit=False)
    target_norm = float(sum(float(g.double().square().sum()) for g in direction.values())) ** 0.5
    best: tuple[float, float, int] | None = None  # |cosine|, score, row
    for row, tokens in pool.items():
        found = Alignments(direction, norms=True)
        run_batch(model, _batch([tokens]), few, found)
        score, norm = float(found.dot[0]), float(found.norm[0])
        cosine = abs(score) / (norm * target_norm) if norm and target_norm else 0.0
        if cosine and (best is None or cosine > best[0]):
            best = (cosine, score, row)
    if best is None:
        return None
    cosine, score, row = best
    gradient = mean_gradient(model, [_batch([pool[row]])], few, unit=False)
    loss = _mean_loss(model, target_batch)
    # A thousandth of the loss is far above float32 rounding and still straight; half precision rounds coarser.
    wanted, slack = (1e-3, 1.5) if dtype in ("float32", "float64") else (3e-2, 4.0)
    step = wanted * loss / abs(score)
    with _stepped(model, few, gradient, step):
        forwards = _mean_loss(model, target_batch)
    with _stepped(model, few, gradient, -step):
        backwards = _mean_loss(model, target_batch)
    return SignCheck(
        row=row,
        score=score,
        cosine=cosine if score > 0 else -cosine,
        target_loss=loss,
        predicted_change=-step * score,
        measured_change=(forwards - backwards) / 2,
        layers=len(few),
        slack=slack,
    )


@contextmanager
def _stepped(
    model: nn.Module, layers: Sequence[LayerSpec], gradient: Mapping[str, Tensor], step: float
) -> Iterator[None]:
    """The model as after ``W <- W - step * gradient``, by what is added to the layers' outputs."""

    def hook(layer: LayerSpec) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            act = args[0]
            matrix = gradient[layer.name].to(act.device, act.dtype)  # (O, I), the bias column last
            change = act @ matrix[:, : layer.in_features].T
            if layer.has_bias:
                change = change + matrix[:, -1]
            moved: Tensor = output - step * change
            return moved

        return add

    handles = [model.get_submodule(layer.name).register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_layers(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    chosen: list[LayerSpec] = []
    total = 0
    for layer in reversed(layers):
        total += layer.numel
        if chosen and total > _LARGEST_STEP_NUMEL:
            break
        chosen.append(layer)
    return chosen[::-1]


def _batch(rows: Sequence[TokenizedExample]) -> Batch:
    return collate(np.arange(len(rows), dtype=np.int64), rows, 0)


def _mean_loss(model: nn.Module, batch: Batch) -> float:
    device = next(model.parameters()).device
    with torch.no_grad():
        return float(per_sample_losses(model, batch.to(device)).double().mean())


def _relative(found: Tensor, alone: Tensor) -> float:
    difference = torch.linalg.vector_norm((found - alone).double())
    return float(difference / torch.linalg.vector_norm(alone.double()).clamp_min(1e-30))
