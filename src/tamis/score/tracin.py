"""TracIn: how well a pool row's gradient agrees with a target row's, summed over checkpoints.

After *Estimating Training Data Influence by Tracing Gradient Descent* (Pruthi et al., 2020), in its form TracInCP::

    score(i, j) = sum_c eta_c <grad l_i, grad l_j>_c                        normalize="dot"
    score(i, j) = sum_c eta_c cos(grad l_i, grad l_j)_c / sum_c eta_c       normalize="cosine"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from tamis.collect import Task
from tamis.errors import InvalidSettings
from tamis.model.load import ModelSettings, model_fingerprint
from tamis.projection import NoProjector, make_projector
from tamis.score.exact import exact_scores
from tamis.score.features import (
    FeatureFunction,
    FeatureSpec,
    RowScores,
    add_scores,
    gradient_features,
    rows_with_gradient,
    scores_of_features,
)
from tamis.score.matrix import with_columns
from tamis.training.checkpoints import learning_rates_of
from tamis.types import TargetScores
from tamis.values import check_types

__all__ = ["TracIn"]


@dataclass(frozen=True, kw_only=True)
class TracIn:
    """Gradient cosine (the default) or inner product of pool and target rows, at one or many checkpoints.

    Per-sample gradients are of the mean loss over a row's supervised tokens, over all linear layers (LoRA factors if
    the model has an adapter). Positive: a small gradient step on the pool row lowers the target row's loss.

    The cosine is the default, because the norm of a mean-loss gradient falls like one over the root of the number of
    tokens: the plain inner product picks answers of two tokens, whatever the target.

    Args:
        normalize: "cosine" or "dot". Cosines are averaged over checkpoints with their learning rates as weights, so
            that scores stay between -1 and 1; inner products are summed with them.
        checkpoints: model or adapter folders, or hub ids; empty: the model itself.
        learning_rates: one per checkpoint. Empty: read from the folders where training wrote them down, else all 1.
        projection: "factorized", "rademacher", "hadamard", "mask", or "none" for exact numbers.
        projection_dim: per side of a layer for "factorized" (16), numbers of the whole feature for the others (8192).
        include_head: count the LM head too.
        length_power: with "dot" only, scores are multiplied by (supervised tokens of the pool row) ** length_power;
            0.5 undoes the fall of the norm with length.
        keep_features: store the pool's features for other targets and methods. False: only scores are stored.
        feature_dtype: "float16", in units of each row's largest entry, or "float32".
        memory_gb: bound on target gradients held at once. Exact round robin over M target rows of P parameters takes
            ceil(4 M P / bound) passes over the pool.

    Raises:
        InvalidSettings: a value is out of range or does not go with another.
    """

    name: ClassVar[str] = "tracin"

    normalize: Literal["cosine", "dot"] = "cosine"
    checkpoints: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    projection: str = "factorized"
    projection_dim: int | None = None
    include_head: bool = False
    length_power: float = 0.0
    keep_features: bool = True
    feature_dtype: Literal["float16", "float32"] = "float16"
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.learning_rates and len(self.learning_rates) != len(self.checkpoints):
            raise InvalidSettings(
                f"learning_rates has {len(self.learning_rates)} entries for {len(self.checkpoints)} checkpoints; "
                "give one for each, or none"
            )
        if any(not rate > 0 for rate in self.learning_rates):
            raise InvalidSettings(f"learning_rates must be positive, got {self.learning_rates}")
        if self.length_power and self.normalize == "cosine":
            raise InvalidSettings("length_power goes with normalize='dot' only: a cosine has no length left to correct")
        if not self.memory_gb > 0:
            raise InvalidSettings(f"memory_gb must be positive, got {self.memory_gb}")
        make_projector(self.projection, dim=self.projection_dim)  # refuses what does not go together

    def by_content(self, model: ModelSettings) -> dict[str, Any]:
        """``checkpoints`` by their weights, and by the learning rates that training wrote down beside them."""
        if not self.checkpoints:
            return {}
        return {
            "checkpoints": [model_fingerprint(point) for point in self._points(model)],
            "learning_rates": list(self.learning_rates or learning_rates_of([Path(name) for name in self.checkpoints])),
        }

    def score(self, task: Task) -> TargetScores:
        """Scores of ``task.rows``: one column per target row, or per target with exact gradients and the mean target.

        ``extra`` has each row's ``loss`` and ``grad_norm`` at the first checkpoint: later ones may have been trained on
        the row, and then a wrong answer looks harmless. ``zero_gradient`` marks rows without gradient at any
        checkpoint; their score of 0 says nothing.

        Raises:
            InvalidInput: no row of a target has a gradient.
            NonFinite: a loss or gradient is NaN or infinite.
        """
        if self.normalize == "dot" and not self.length_power:
            task.warn(
                "tracin ran with the plain inner product: losses are means over tokens, so a row's gradient norm falls "
                "like one over the root of its answer's length, and short answers are preferred whatever the target; "
                "the cosine (the default) or length_power=0.5 do not have this bias."
            )
        points, rates = self._checkpoints(task)
        total = rates.sum() if self.normalize == "cosine" else 1.0
        found: RowScores | None = None
        for point, rate in zip(points, rates, strict=True):
            at = task if point is None else task.at_model(point)
            found = add_scores(found, self._at(at), weight=rate / total)
            del at  # its model, before the next one is loaded
        assert found is not None
        values = found.values
        if self.length_power:
            values *= (task.pool.supervised[task.rows].astype(np.float32) ** self.length_power)[:, None]
        kept = rows_with_gradient(task, found.is_zero, found.is_zero_target)
        if self._is_mean(task):
            group = np.arange(len(task.target_names), dtype=np.int64)
        else:
            values, group = with_columns(task, values, kept), task.target_group[kept]
        return TargetScores(
            rows=task.rows,
            values=values,
            group=group,
            target_names=task.target_names,
            extra={"loss": found.loss, "grad_norm": found.grad_norm, "zero_gradient": found.is_zero},
        )

    def _is_mean(self, task: Task) -> bool:
        """Exact gradients against each target's mean: the one form that knows no single target rows."""
        return self.projection == "none" and task.aggregate == "mean"

    def _points(self, model: ModelSettings) -> list[ModelSettings]:
        return [replace(model, name=name, revision=None) for name in self.checkpoints]

    def _checkpoints(
        self, task: Task
    ) -> tuple[Sequence[ModelSettings | None], np.ndarray[tuple[int], np.dtype[np.float64]]]:
        """The model at every checkpoint (None: the task's own), and their learning rates."""
        if not self.checkpoints:
            return [None], np.ones(1)
        points = self._points(task.model_settings)
        if self.learning_rates:
            return points, np.array(self.learning_rates)
        rates = learning_rates_of([Path(name) for name in self.checkpoints])
        known = [rate for rate in rates if rate]
        if len(known) == len(rates):
            return points, np.array(known)
        if known:
            missing = next(name for name, rate in zip(self.checkpoints, rates, strict=True) if not rate)
            raise InvalidSettings(f"{missing} does not say its learning rate, others do; give learning_rates for all")
        task.warn(
            f"tracin weighs its {len(points)} checkpoints equally, since none says its learning rate; "
            "give learning_rates."
        )
        return points, np.ones(len(points))

    def _at(self, task: Task) -> RowScores:
        projector = make_projector(self.projection, dim=self.projection_dim, seed=task.seed)
        if isinstance(projector, NoProjector):
            return exact_scores(
                task,
                cosine=self.normalize == "cosine",
                include_head=self.include_head,
                mean=self._is_mean(task),
                memory_bytes=int(self.memory_gb * 2**30),
            )
        spec = FeatureSpec(
            name="gradients",
            identity={"algorithm": "gradients-v1", "projection": projector.identity, "include_head": self.include_head},
            dtype=self.feature_dtype,
            projection=self.projection,
            projection_dim=self.projection_dim,
            include_head=self.include_head,
        )

        def start() -> FeatureFunction:
            return gradient_features(task, projector, include_head=self.include_head)

        return scores_of_features(
            task,
            pool=(spec, start),
            target=(spec, start),
            cosine=self.normalize == "cosine",
            keep_features=self.keep_features,
            memory_bytes=int(self.memory_gb * 2**30),
        )
