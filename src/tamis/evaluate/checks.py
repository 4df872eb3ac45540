"""Numeric checks of a loaded model: does a row's score depend on its batch mates, does the sign mean what we say, and
what does a projection add?

All run on a handful of real rows. None copies or changes a weight.
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
from tamis.gradients.layers import inner_products, per_sample_gradient
from tamis.gradients.per_sample import Alignments, mean_gradient, per_sample_features, run_batch
from tamis.model.flops import FACTORIZED_SIDE
from tamis.model.loss import per_sample_losses
from tamis.model.targets import has_routed_experts
from tamis.projection import AnyProjector, make_projector
from tamis.projection.distortion import measure_distortion
from tamis.types import Batch, LayerSpec, TokenizedExample

__all__ = ["BatchCheck", "LengthDistortion", "SignCheck", "check_batch_composition", "check_distortion", "check_sign"]

# Largest relative difference that rounding alone explains, by the dtype that the model computes in. Measured: 2e-6 in
# float32, 1e-1 in bfloat16 (30 blocks, 135M parameters; it rounds at 2**-8, float16 at 2**-11).
_TOLERANCES = {"float64": 1e-5, "float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1}
# Steps of the sign check, as parts of the target loss that they should move, by whether the dtype is a half one. A
# thousandth is far above float32 rounding and still straight; half precision rounds coarser. Smaller steps come after
# a disagreement: where tokens are routed to experts, the loss jumps when a step changes a route.
_STEPS = {False: (1e-3, 1e-4, 1e-5), True: (3e-2, 1e-2)}
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
    steps: int = 1  # step sizes that were tried; the figures are of the last, the smallest
    is_routed: bool = False  # the model routes tokens to experts, so that its loss is not differentiable everywhere

    @property
    def passed(self) -> bool:
        """Whether the loss moved the way the score's sign says, and by about as much."""
        if not self.predicted_change:
            return False
        return 1 / self.slack <= self.measured_change / self.predicted_change <= self.slack


@dataclass(frozen=True, kw_only=True)
class LengthDistortion:
    """Projected against exact cosines of the gradients of a few rows of about one length."""

    shortest: int  # tokens
    longest: int
    pairs: int
    mean_cosine: float  # exact
    spread: float  # standard deviation of the exact cosines: the differences that the projection has to preserve
    rms_error: float  # of the projected cosines


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

    A step that disagrees with its prediction is followed by smaller ones, up to the first that agrees.

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
    is_half = dtype not in ("float32", "float64")
    for tried, share in enumerate(_STEPS[is_half], 1):
        step = share * loss / abs(score)
        with _stepped(model, few, gradient, step):
            forwards = _mean_loss(model, target_batch)
        with _stepped(model, few, gradient, -step):
            backwards = _mean_loss(model, target_batch)
        check = SignCheck(
            row=row,
            score=score,
            cosine=cosine if score > 0 else -cosine,
            target_loss=loss,
            predicted_change=-step * score,
            measured_change=(forwards - backwards) / 2,
            layers=len(few),
            slack=4.0 if is_half else 1.5,
            steps=tried,
            is_routed=has_routed_experts(model),
        )
        if check.passed:
            break
    return check


def check_distortion(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    groups: Sequence[Sequence[TokenizedExample]],
    projector: AnyProjector,
) -> list[LengthDistortion]:
    """For each group of rows, all cosines between their gradients, exact and projected.

    A group is one batch. Its exact products are summed layer by layer, so that no more than one layer's gradients
    exist at a time. Rows without a gradient have no cosine and are left out; so are groups with fewer than two rows
    that have one.
    """
    found = []
    for rows in groups:
        batch = _batch(rows)
        exact = _PairProducts()
        run_batch(model, batch, layers, exact)
        _, features, _ = per_sample_features(model, batch, layers, projector)
        features = features.float().cpu()
        kept = torch.nonzero((exact.products.diagonal() > 0) & features.any(dim=1))[:, 0]
        if len(kept) < 2:
            continue
        errors = measure_distortion(exact.products[kept][:, kept], features[kept])
        lengths = [len(rows[i].input_ids) for i in kept.tolist()]
        found.append(
            LengthDistortion(
                shortest=min(lengths),
                longest=max(lengths),
                pairs=len(errors.cosine),
                mean_cosine=float(errors.cosine.mean()),
                spread=float(errors.cosine.std(unbiased=False)),
                rms_error=errors.rms,
            )
        )
    return found


class _PairProducts:
    """Exact inner products of all pairs of a batch's gradients."""

    def __init__(self) -> None:
        self._products: Tensor | None = None

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Form the layer's gradients, multiply them with each other, forget them."""
        grads = per_sample_gradient(kept[0], grad_out, has_bias=layer.has_bias).flatten(1)
        part = inner_products(grads, grads).cpu().double()
        self._products = part if self._products is None else self._products + part

    @property
    def products(self) -> Tensor:
        """``(B, B)``, squared norms on the diagonal."""
        assert self._products is not None, "run a batch first"
        return self._products


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
