"""Influence scores of a few rows by one model, and how far two models agree on them.

A row's score for a target is the mean over the target's rows of the cosine of their gradients, sketched as ``tracin``
does by default. A positive score means that training on the row lowers the target's loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tamis.gradients.per_sample import per_sample_features
from tamis.maths.bootstrap import draw_rows, middle, rank_agreement
from tamis.maths.ranks import rank_correlation
from tamis.maths.similarity import unit_rows
from tamis.model.targets import gradient_layers
from tamis.projection.factorized import FactorizedProjector
from tamis.proxies.rows import Row, TargetRows, batches_of
from tamis.types import FloatArray

__all__ = [
    "Interval",
    "Measured",
    "ModelAgreement",
    "mean_correlation",
    "measure",
    "mixed_scores",
    "model_agreement",
    "resampled_overlap",
]

TOP_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model says of the rows."""

    losses: FloatArray  # (n,)
    units: Tensor  # (n, K) features of length 1; zero where a row has no gradient
    target_units: Tensor  # (M, K)
    scores: FloatArray  # (n, G), one column per target


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the middle 95 % of it over resampled rows."""

    value: float
    low: float | None  # None where the rows are too few, or too alike, to tell
    high: float | None


@dataclass(frozen=True, kw_only=True)
class ModelAgreement:
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
    target_units, _ = _features(model, target.rows, projector, batch_tokens, pad_id)
    units, losses = _features(model, rows, projector, batch_tokens, pad_id)
    return Measured(
        losses=losses,
        units=units,
        target_units=target_units,
        scores=_scores(units, target_units, target),
    )


def mixed_scores(proxy: Measured, full: Measured, target: TargetRows) -> FloatArray | None:
    """Scores of the proxy's row features against the full model's target features; None if they do not compare."""
    if proxy.units.shape[1] != full.target_units.shape[1]:
        return None
    return _scores(proxy.units, full.target_units, target)


def model_agreement(ours: FloatArray, full: FloatArray, names: Sequence[str], *, seed: int = 0) -> ModelAgreement:
    """Of ``(n, G)`` scores with those of the full model; rows are resampled for the intervals, with a fixed seed.

    A target whose scores are all equal on one side has no ranking to agree on and counts as 0.
    """
    found = rank_agreement(ours, full, seed=seed)
    by_target = {name: value or 0.0 for name, value in zip(names, found.columns, strict=True)}
    ranked = sum(value is not None for value in found.columns) / len(found.columns)
    low, high = found.middle or (None, None)
    return ModelAgreement(
        spearman=Interval(
            value=float(np.mean(list(by_target.values()))),
            low=None if low is None else ranked * low,
            high=None if high is None else ranked * high,
        ),
        top_overlap=_overlap(ours, full, seed),
        by_target=by_target,
    )


def resampled_overlap(
    x: FloatArray, y: FloatArray, counts: npt.NDArray[np.int64], share: float = TOP_SHARE
) -> npt.NDArray[np.float64]:
    """The part of the best ``share`` of the rows, as often as ``counts`` (R, n) has them, that both put there: (R,)."""
    wanted = max(1, round(share * len(x)))
    taken = []
    for values in (x, y):
        order = np.argsort(-values, kind="stable")
        before = np.cumsum(counts[:, order], axis=1) - counts[:, order]
        copies = np.empty_like(counts)
        copies[:, order] = np.clip(wanted - before, 0, counts[:, order])
        taken.append(copies)
    found: npt.NDArray[np.float64] = np.minimum(*taken).sum(axis=1) / wanted
    return found


def mean_correlation(ours: FloatArray, full: FloatArray) -> float:
    """Spearman's correlation of ``(n, G)`` scores, averaged over the targets; 0 for one without a ranking."""
    return float(np.mean([rank_correlation(ours[:, j], full[:, j]) or 0.0 for j in range(full.shape[1])]))


def _features(
    model: nn.Module, rows: Sequence[Row], projector: FactorizedProjector, batch_tokens: int, pad_id: int
) -> tuple[Tensor, FloatArray]:
    layers = gradient_layers(model)
    units = torch.zeros(len(rows), projector.output_dim(layers))
    losses = np.zeros(len(rows), dtype=np.float32)
    for batch in batches_of(rows, batch_tokens=batch_tokens, pad_id=pad_id):
        found, features, _ = per_sample_features(model, batch, layers, projector)
        units[batch.rows] = unit_rows(features.float()).cpu()
        losses[batch.rows.numpy()] = found.float().cpu().numpy()
    return units, losses


def _scores(units: Tensor, target_units: Tensor, target: TargetRows) -> FloatArray:
    cosines = units @ target_units.T  # (n, M)
    columns = [cosines[:, torch.from_numpy(target.group == index)].mean(dim=1) for index in range(len(target.names))]
    scores: FloatArray = torch.stack(columns, dim=1).numpy()
    return scores


def _overlap(ours: FloatArray, full: FloatArray, seed: int) -> Interval:
    """The mean over the targets of how much of the best rows both share; the same rows are drawn as for the ranking."""

    def mean(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        columns = [resampled_overlap(ours[:, j], full[:, j], counts) for j in range(full.shape[1])]
        found: npt.NDArray[np.float64] = np.mean(columns, axis=0)
        return found

    rows = len(full)
    low, high = middle(mean(draw_rows(rows, seed)), rows=rows) or (None, None)
    return Interval(value=float(mean(np.ones((1, rows), dtype=np.int64))[0]), low=low, high=high)
