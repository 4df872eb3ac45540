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
    "resampled_correlation",
    "resampled_overlap",
]

TOP_SHARE = 0.05
_RESAMPLES = 500


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


def agreement(ours: FloatArray, full: FloatArray, names: Sequence[str], *, seed: int = 0) -> Agreement:
    """Of ``(n, G)`` scores with those of the full model; rows are resampled for the intervals, with a fixed seed.

    A target whose scores are all equal on one side has no ranking to agree on and counts as 0.
    """
    counts = _resampled_counts(len(full), seed)
    pairs = [(ours[:, j], full[:, j]) for j in range(full.shape[1])]
    by_target = {name: float(resampled_correlation(x, y, counts)[0]) for name, (x, y) in zip(names, pairs, strict=True)}
    return Agreement(
        spearman=_interval(np.mean([resampled_correlation(x, y, counts) for x, y in pairs], axis=0)),
        top_overlap=_interval(np.mean([resampled_overlap(x, y, counts) for x, y in pairs], axis=0)),
        by_target=by_target,
    )


def resampled_correlation(x: FloatArray, y: FloatArray, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Spearman's correlation of the rows as often as ``counts`` (R, n) has them: (R,); ties at their mean rank.

    A row that is there ``c`` times is ``c`` equal rows, so its mean rank follows from how many rows are below it.
    """
    ranks = []
    for values in (x, y):
        _, place = np.unique(values, return_inverse=True)
        together = np.zeros((len(counts), place.max() + 1))
        np.add.at(together.T, place, counts.T)  # rows of one score are one
        ranks.append((np.cumsum(together, axis=1) - (together - 1) / 2)[:, place])
    total = counts.sum(axis=1, keepdims=True)
    centred = [rank - (counts * rank).sum(axis=1, keepdims=True) / total for rank in ranks]
    of_both, of_x, of_y = ((counts * centred[a] * centred[b]).sum(axis=1) for a, b in ((0, 1), (0, 0), (1, 1)))
    scale = np.sqrt(of_x * of_y)
    found: npt.NDArray[np.float64] = np.divide(of_both, scale, out=np.zeros_like(scale), where=scale > 0)
    return found


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


def _resampled_counts(rows: int, seed: int) -> npt.NDArray[np.int64]:
    """How often each row is drawn: once in the first line, with replacement in the others."""
    drawn = (random_uniform(child_seed(seed, "resampled rows"), _RESAMPLES * rows) * rows).astype(np.int64)
    counts = np.ones((_RESAMPLES + 1, rows), dtype=np.int64)
    for line, sample in enumerate(drawn.reshape(_RESAMPLES, rows), start=1):
        counts[line] = np.bincount(sample, minlength=rows)
    return counts


def _interval(values: npt.NDArray[np.float64]) -> Interval:
    """The first value is of all rows, the others are of resampled ones."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(value=float(values[0]), low=float(low), high=float(high))
