"""Influence functions: what upweighting a pool row does to a target row's loss, with Kronecker-factored curvature.

After *Understanding Black-box Predictions via Influence Functions* (Koh and Liang, 2017), for language models *Studying
Large Language Model Generalization with Influence Functions* (Grosse et al., 2023)::

    score(i, j) = <grad l_i, (F + δ)^{-1} grad l_j>                               normalize="dot"
    score(i, j) = cos(grad l_i, (F + δ)^{-1} grad l_j)                            normalize="cosine"

with F the generalised Gauss-Newton matrix of the pool's mean loss, a block per layer, each as K-FAC or EK-FAC has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tamis.collect import Task
from tamis.errors import InvalidInput, InvalidSettings
from tamis.gradients.kronecker import Labels
from tamis.score.exact import exact_scores
from tamis.score.features import rows_with_gradient
from tamis.score.kronecker_factors import KroneckerCurvature, Strategy
from tamis.score.matrix import with_columns
from tamis.seeds import child_seed, random_subset
from tamis.types import IntArray, TargetScores
from tamis.values import check_types

__all__ = ["InfluenceFunction"]


@dataclass(frozen=True, kw_only=True)
class InfluenceFunction:
    """Exact gradients of pool and target rows, compared through the inverse of the loss's curvature.

    Cost: a gradient pass over the rows that curvature is estimated on (two for "ekfac"), one over the target, and one
    over the pool for each lot of target gradients that fits in memory. Nothing is projected. Gradients are of the mean
    loss over a row's supervised tokens, over all linear layers (LoRA factors if the model has an adapter). Positive:
    training on the pool row lowers the target row's loss.

    Args:
        strategy: "ekfac", eigenvalues measured in the eigenbasis of the Kronecker factors; or "kfac", their products,
            which saves a pass.
        labels: "sampled", drawn from the model's own predictions, which gives the Gauss-Newton matrix; or "empirical",
            the rows' own, which is no curvature where the model fits badly.
        damping: δ in units of a layer's mean eigenvalue.
        factor_rows: pool rows that curvature is estimated on, drawn at random; None: all usable ones.
        normalize: "cosine", or "dot" for the influence itself, whose size falls with the length of the answer.
        memory_gb: bound on target gradients held at once. Round robin over M target rows of P parameters takes
            ceil(4 M P / bound) passes over the pool.

    Raises:
        InvalidSettings: a value is of the wrong type or out of range.
    """

    name: ClassVar[str] = "influence-function"

    strategy: Strategy = "ekfac"
    labels: Labels = "sampled"
    damping: float = 0.1
    factor_rows: int | None = 4096
    normalize: Literal["cosine", "dot"] = "cosine"
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        check_types(self)  # also 1 to 1.0, as which runs have always recorded these settings
        for field in ("damping", "memory_gb"):
            if not getattr(self, field) > 0:
                raise InvalidSettings(f"{field} must be positive, got {getattr(self, field)}")
        if self.factor_rows is not None and self.factor_rows < 1:
            raise InvalidSettings(f"factor_rows must be at least 1, got {self.factor_rows}")

    def rows_for_factors(self, task: Task) -> IntArray:
        """The random part of the pool's usable rows, not only of a shortlist, that curvature is estimated on.

        Raises:
            InvalidInput: the pool has no usable row.
        """
        usable = np.flatnonzero(task.pool.usable).astype(np.int64)
        if not len(usable):
            raise InvalidInput("no row of the pool has a supervised token, so there is no curvature to estimate")
        if self.factor_rows is None or self.factor_rows >= len(usable):
            return usable
        return usable[random_subset(child_seed(task.seed, "rows for curvature"), len(usable), self.factor_rows)]

    def score(self, task: Task) -> TargetScores:
        """Scores of ``task.rows``: one column per target row that has a gradient, or per target with the mean target.

        ``extra`` has each row's ``loss`` and ``grad_norm``. ``zero_gradient`` marks rows without gradient; their score
        of 0 says nothing.

        Raises:
            InvalidInput: no row of a target has a gradient, or a layer has no curvature.
            NonFinite: a loss or gradient is NaN or infinite.
        """
        rows = self.rows_for_factors(task)
        drawn = "labels drawn from the model's predictions" if self.labels == "sampled" else "the rows' own labels"
        task.note(
            f"influence-function took its curvature ({self.strategy}, {drawn}) from {len(rows)} pool rows; damping is "
            f"{self.damping:g} of each layer's mean eigenvalue"
        )
        if self.normalize == "dot":
            task.warn(
                "influence-function ran with the plain inner product: losses are means over tokens, so a row's gradient"
                " norm falls like one over the root of its answer's length, and short answers are preferred whatever "
                "the target; the cosine (the default) does not have this bias."
            )
        curvature = KroneckerCurvature(
            task=task, rows=rows, strategy=self.strategy, labels=self.labels, damping=self.damping
        )
        mean = task.aggregate == "mean"
        found = exact_scores(
            task,
            cosine=self.normalize == "cosine",
            include_head=False,
            mean=mean,
            memory_bytes=int(self.memory_gb * 2**30),
            precondition=curvature,
        )
        kept = rows_with_gradient(task, found.is_zero, found.is_zero_target)
        values, group = found.values, np.arange(len(task.target_names), dtype=np.int64)
        if not mean:
            values, group = with_columns(task, values, kept), task.target_group[kept]
        return TargetScores(
            rows=task.rows,
            values=values,
            group=group,
            target_names=task.target_names,
            extra={"loss": found.loss, "grad_norm": found.grad_norm, "zero_gradient": found.is_zero},
        )
