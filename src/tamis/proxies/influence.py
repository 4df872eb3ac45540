"""Influence scores of a few rows by one model, and how far two models agree on them.

A row's score for a target is the mean over the target's rows of the cosine of their gradients, sketched as ``tracin``
does by default. A positive score means that training on the row lowers the target's loss.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tamis.gradients.per_sample import per_sample_features
from tamis.maths.ranks import rank_correlation
from tamis.maths.similarity import unit_rows
from tamis.model.targets import gradient_layers
from tamis.projection.factorized import FactorizedProjector
from tamis.proxies.rows import Row, TargetRows, batches_of
from tamis.seeds import child_seed, random_uniform
from tamis.types import FloatArray

__all__ = [
    "Agreement",
    "Interval",
    "Measured",
    "agreement",
    "mean_correlation",
    "measure",
    "mixed_scores",
    "top_overlap",
]

TOP_SHARE = 0.05
_RESAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model says of the rows, and what it cost to ask."""

    losses: FloatArray  # (n,)
    units: Tensor  # (n, K) features of length 1; zero where a row has no gradient
    target_units: Tensor  # (M, K)
    scores: FloatArray  # (n, G), one column per target
    seconds: float  # of the pass over the rows, without the target's
    tokens: int  # of that pass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the middle 95 % of it over resampled rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two models rank the same rows, as means over the targets."""

    spearman: Interval
    top_overlap: Interval  # shared part of the best 5 % of the rows
    by_target: dict[str, float]  # Spearman's correlation alone


def measure(
    model: nn.Module,
    rows: Sequence[Row],
    target: TargetRows,
    *,
    projector: FactorizedProjector,
    batch_tokens: int,
    pad_id: int,
) -> Measured:
    """Losses and scores of ``rows`` by the per-sample gradients of ``model``, whatever it is.

    Raises:
        NonFinite: a loss is NaN or infinite.
    """
    target_units, _, _ = _features(model, target.rows, projector, batch_tokens, pad_id)  # first: it warms up, too
    started = time.perf_counter()
    units, losses, tokens = _features(model, rows, projector, batch_tokens, pad_id)
    return Measured(
        losses=losses,
        units=units,
        target_units=target_units,
        scores=_scores(units, target_units, target),
        seconds=time.perf_counter() - started,
        tokens=tokens,
    )


def mixed_scores(proxy: Measured, full: Measured, target: TargetRows) -> FloatArray | None:
    """Scores of the proxy's row features against the full model's target features; None if they do not compare."""
    if proxy.units.shape[1] != full.target_units.shape[1]:
        return None
    return _scores(proxy.units, full.target_units, target)


def agreement(ours: FloatArray, full: FloatArray, names: Sequence[str], *, seed: int = 0) -> Agreement:
    """Of ``(n, G)`` scores with those of the full model; rows are resampled for the intervals, with a fixed seed.

    A target whose scores are all equal on one side has no ranking to agree on and counts as 0.
    """
    rows = len(full)
    draws = (random_uniform(child_seed(seed, "resampled rows"), _RESAMPLES * rows) * rows).astype(np.int64)
    by_target, spearmans, overlaps = {}, [], []
    everything = np.arange(rows)
    for sample in (everything, *draws.reshape(_RESAMPLES, rows)):
        pairs = [(ours[sample, j], full[sample, j]) for j in range(full.shape[1])]
        found = [rank_correlation(x, y) or 0.0 for x, y in pairs]
        if sample is everything:
            by_target = dict(zip(names, found, strict=True))
        spearmans.append(float(np.mean(found)))
        overlaps.append(float(np.mean([top_overlap(x, y) for x, y in pairs])))
    return Agreement(spearman=_interval(spearmans), top_overlap=_interval(overlaps), by_target=by_target)


def mean_correlation(ours: FloatArray, full: FloatArray) -> float:
    """Spearman's correlation of ``(n, G)`` scores, averaged over the targets; 0 for one without a ranking."""
    return float(np.mean([rank_correlation(ours[:, j], full[:, j]) or 0.0 for j in range(full.shape[1])]))


def top_overlap(x: FloatArray, y: FloatArray, share: float = TOP_SHARE) -> float:
    """The part of the best ``share`` of the rows (one at least) that both put there; equal scores in row order.

    >>> top_overlap(np.float32([3, 2, 1, 0]), np.float32([3, 0, 1, 2]), share=0.5)
    0.5
    """
    count = max(1, round(share * len(x)))
    best = [set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (x, y)]
    return len(best[0] & best[1]) / count


def _features(
    model: nn.Module, rows: Sequence[Row], projector: FactorizedProjector, batch_tokens: int, pad_id: int
) -> tuple[Tensor, FloatArray, int]:
    layers = gradient_layers(model)
    units = torch.zeros(len(rows), projector.output_dim(layers))
    losses = np.zeros(len(rows), dtype=np.float32)
    tokens = 0
    for batch in batches_of(rows, batch_tokens=batch_tokens, pad_id=pad_id):
        found, features, _ = per_sample_features(model, batch, layers, projector)
        units[batch.rows] = unit_rows(features.float()).cpu()
        losses[batch.rows.numpy()] = found.float().cpu().numpy()
        tokens += int(batch.attention_mask.sum())
    return units, losses, tokens


def _scores(units: Tensor, target_units: Tensor, target: TargetRows) -> FloatArray:
    cosines = units @ target_units.T  # (n, M)
    columns = [cosines[:, torch.from_numpy(target.group == index)].mean(dim=1) for index in range(len(target.names))]
    scores: FloatArray = torch.stack(columns, dim=1).numpy()
    return scores


def _interval(values: Sequence[float]) -> Interval:
    """The first value is of all rows, the others are of resampled ones."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(value=values[0], low=float(low), high=float(high))
