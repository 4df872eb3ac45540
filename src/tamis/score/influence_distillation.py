"""Influence Distillation: exact gradients of a few landmark rows, carried to all rows by cheap embeddings.

After *Influence Distillation* (2025), first order. With unit gradients g of landmarks L and target row j, embeddings e
and a kernel k::

    score(i, j) = k(e_i, E_L) (k(E_L, E_L) + δI)^{-1} G_L g_j          landmarks themselves: <g_i, g_j>

Where the embedding has something to say of the target itself, only what its own cosine leaves is carried (residual
form). Embedding, kernel and damping are chosen by leave-one-out over the landmarks, which also says how far the scores
may be trusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tamis.collect import Task
from tamis.embeddings import Given
from tamis.errors import InvalidInput, InvalidSettings
from tamis.model.load import ModelSettings
from tamis.projection import make_projector
from tamis.score.embedding_candidates import EMBEDDING_NAMES, EmbeddingSettings
from tamis.score.embedding_choice import KernelSettings, choose_embedding
from tamis.score.landmark_gradients import LandmarkGradients, landmark_gradients
from tamis.score.landmark_notes import is_trusted, notes_of_choice, verdict
from tamis.score.landmark_rows import landmark_rows
from tamis.score.landmark_transfer import transferred_scores
from tamis.score.less import moments_digest
from tamis.score.matrix import empty_scores
from tamis.score.row_embeddings import RowEmbeddings
from tamis.score.warmup import random_warmup_rows, warmup_points, warmup_training
from tamis.solve.kernels import KernelName
from tamis.solve.landmarks import LANDMARK_RULES, LandmarkRule
from tamis.training.loop import TrainSettings
from tamis.types import IntArray, TargetScores

__all__ = ["PRESETS", "InfluenceDistillation"]

Warmup = Literal["lora", "full", "none"]

# Settings of the paper (sections 4 and 5.1, appendix J). It names no bandwidth: ours is twice the median distance. What
# is done otherwise whatever the settings, from landmarks that keep their own scores to the clipping of the warm-up, is
# listed under "As published" in docs/methods.md.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "landmarks": 4096,
        "landmark_rule": "uniform",
        "embedding": "jvp",
        "depth": 4,
        "directions": 2,
        "positions": "last",
        "combine": "mean",
        "kernel": "rbf",
        "scale": 2.0,
        "damping": 0.01,
        "centred": False,
        "residual": False,
        "form": "adam",
        "warmup": "full",
        "warmup_rows": 10_000,
        "warmup_epochs": 2,
        "warmup_batch_rows": 128,
        "warmup_learning_rate": 2e-5,
        "projection": "hadamard",
        "projection_dim": 131_072,
        "weights": "none",
    }
}


@dataclass(frozen=True, kw_only=True)
class InfluenceDistillation:
    """Gradient cosine with the target rows: landmarks' own, up to the projection; carried to others by embeddings.

    Cost: the warm-up, a gradient pass over landmarks and target rows, and one cheap embedding of every row. Scores are
    those of ``tracin`` at the warmed-up model as well as the embedding lets them be rebuilt; the notes say how well.

    Args:
        preset: "paper": as published where this library can; settings given beside it count in place of its own.
            ``dataclasses.replace`` gives every setting, so it changes nothing but what it names.
        landmarks: rows with gradients of their own, at most all rows to score.
        landmark_rule: "uniform"; or "k-means++" or "leverage", which need the named embedding of every row in memory.
        embedding: "auto" tries all within the budget on the landmarks; or "error-outer", "error", "hidden-error",
            "hidden-mean", "rds", "jvp", "lens-gradient", "tail-gradient", "gradient", "tfidf", "given".
        embedding_budget: forward passes a row that "auto" may spend, the head not counted: 0 (no block), 0.5, 1 or 2.
        given: folder of embeddings from elsewhere (``tamis.embeddings.Given``): one more candidate, at no cost.
        depth: blocks of shallow embeddings; None: up to 4, as many as the budget allows, and all for the others.
        directions: random directions of "jvp".
        positions: where "jvp" is read: "mean" over the supervised tokens, or "last", as published.
        combine: several directions as their "mean", at the price of one, or "concat".
        side: numbers per side of a sketch; None: each embedding's own.
        tail_blocks: blocks of "tail-gradient".
        kernel: "auto", "rbf", "laplace" or "linear".
        scale: of the kernel, in median squared distances; None: the best of 0.5, 2 and 8.
        damping: δ; None: the best of 0.01, 0.1 and 1.
        centred: take the landmarks' mean embedding off; None: for all but the linear kernel.
        half_whitening: also try every kernel but the linear on half-whitened embeddings, if the landmarks are at least
            twice as many as an embedding has numbers.
        residual: carry only what the embedding's own cosine with the target leaves; "auto": if that is no worse.
        form: gradients of landmarks "raw", or "adam": times Adam's preconditioner at the end of the warm-up.
        warmup: "lora", "full" (all weights, in float32) or "none".
        warmup_share: share of the pool's usable rows, though never fewer than four updates' worth.
        warmup_rows: their number, in place of the share.
        warmup_epochs: epochs; only the end counts.
        warmup_batch_rows: rows of one update.
        warmup_learning_rate: the peak; None: 2e-4 for LoRA, 2e-5 for all weights.
        lora_rank: rank of the adapter.
        lora_alpha: its scale is ``lora_alpha / lora_rank``; None: twice the rank.
        moments: with form "adam", a Trainer checkpoint folder whose ``optimizer.pt`` belongs to the model given, which
            must be that checkpoint: there is no warm-up.
        projection: of landmark and target gradients: "hadamard", "factorized", "rademacher", "mask" or "none".
        projection_dim: numbers of a feature (8192); per side of a layer for "factorized" (16).
        weights: what selected rows weigh: "none", all 1; "first-order", robust weights from their scores.
        keep_embeddings: store the pool's embeddings from a model, which other targets may use. False: rows are scored
            as they are embedded, and only landmarks' and target rows' embeddings are stored.
        feature_dtype: "float16" or "float32", of stored gradients and embeddings.

    Raises:
        InvalidSettings: a value is out of range or does not go with another.
    """

    name: ClassVar[str] = "influence-distillation"

    preset: str | None = None
    landmarks: int = 4096
    landmark_rule: LandmarkRule = "uniform"
    embedding: str = "auto"
    embedding_budget: float = 1.0
    given: str | None = None
    depth: int | None = None
    directions: int = 1
    positions: Literal["mean", "last"] = "mean"
    combine: Literal["mean", "concat"] = "mean"
    side: int | None = None
    tail_blocks: int = 2
    kernel: KernelName | Literal["auto"] = "auto"
    scale: float | None = None
    damping: float | None = None
    centred: bool | None = None
    half_whitening: bool = False
    residual: bool | Literal["auto"] = "auto"
    form: Literal["raw", "adam"] = "raw"
    warmup: Warmup = "lora"
    warmup_share: float = 0.05
    warmup_rows: int | None = None
    warmup_epochs: int = 2
    warmup_batch_rows: int = 16
    warmup_learning_rate: float | None = None
    lora_rank: int = 8
    lora_alpha: float | None = None
    moments: str | None = None
    projection: str = "hadamard"
    projection_dim: int | None = None
    weights: Literal["none", "first-order"] = "none"
    keep_embeddings: bool = True
    feature_dtype: Literal["float16", "float32"] = "float16"

    def __new__(cls, **given: Any) -> InfluenceDistillation:
        """Note which settings are given: one that equals its default wins over a preset too."""
        made = super().__new__(cls)
        made.__dict__["_given"] = frozenset(given)
        return made

    def __post_init__(self) -> None:
        given: frozenset[str] = self.__dict__.pop("_given")
        if self.preset is not None:
            self._fill_in(self.preset, given)
        for field, choices in (
            ("landmark_rule", tuple(LANDMARK_RULES)),
            ("embedding", EMBEDDING_NAMES),
            ("positions", ("mean", "last")),
            ("combine", ("mean", "concat")),
            ("kernel", ("auto", *get_args(KernelName))),
            ("residual", ("auto", True, False)),
            ("form", ("raw", "adam")),
            ("warmup", get_args(Warmup)),
            ("weights", ("none", "first-order")),
            ("feature_dtype", ("float16", "float32")),
        ):
            if getattr(self, field) not in choices:
                listed = ", ".join(str(choice) for choice in choices)
                raise InvalidSettings(f"{field}={getattr(self, field)!r}: expected one of {listed}")
        for field, least in (("landmarks", 2), ("directions", 1), ("tail_blocks", 1), ("lora_rank", 1)):
            if getattr(self, field) < least:
                raise InvalidSettings(f"{field} must be at least {least}, got {getattr(self, field)}")
        for field in ("depth", "side", "warmup_rows"):
            value = getattr(self, field)
            if value is not None and value < (0 if field == "depth" else 1):
                raise InvalidSettings(f"{field} must be at least {0 if field == 'depth' else 1}, got {value}")
        for field in ("scale", "damping", "lora_alpha"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise InvalidSettings(f"{field} must be positive, got {value}")
        if not 0 <= self.embedding_budget < float("inf"):
            raise InvalidSettings(f"embedding_budget must be at least 0, got {self.embedding_budget}")
        if not 0 < self.warmup_share <= 1:
            raise InvalidSettings(f"warmup_share must be above 0 and at most 1, got {self.warmup_share}")
        self._check_together()
        self.warmup_settings()  # checks the others
        make_projector(self.projection, dim=self.projection_dim)

    def _fill_in(self, preset: str, given: frozenset[str]) -> None:
        if preset not in PRESETS:
            raise InvalidSettings(f"preset={preset!r} is unknown; there is {', '.join(PRESETS)}")
        for name, value in PRESETS[preset].items():
            if name not in given:
                object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        if self.embedding == "given" and not self.given:
            raise InvalidSettings("embedding=given needs given, the folder of the embeddings")
        if self.given and self.embedding not in ("given", "auto"):
            raise InvalidSettings(
                f"given names a folder of embeddings, which embedding={self.embedding!r} does not use"
            )
        if self.landmark_rule != "uniform" and self.embedding == "auto":
            raise InvalidSettings(
                f"landmark_rule={self.landmark_rule!r} looks at embeddings of all rows before any is chosen; name an "
                "embedding, or take uniform landmarks"
            )
        if self.moments is not None and self.form != "adam":
            raise InvalidSettings(
                f"moments are read for form=adam only, and form={self.form!r}; set form=adam, or drop moments and set "
                "warmup=none to take the model as it is"
            )
        if self.form == "adam" and self.warmup == "none" and self.moments is None:
            raise InvalidSettings("form=adam needs Adam's moments: warm up, or give a checkpoint folder as moments")

    def warmup_settings(self) -> TrainSettings:
        """The fine-tuning run at whose end gradients are taken."""
        rate = self.warmup_learning_rate
        return warmup_training(
            epochs=self.warmup_epochs,
            batch_rows=self.warmup_batch_rows,
            learning_rate=(2e-5 if self.warmup == "full" else 2e-4) if rate is None else rate,
        )

    def rows_for_warmup(self, task: Task) -> IntArray:
        """The random part of the pool that the warm-up trains on, ascending.

        Raises:
            InvalidInput: the pool has no usable row.
        """
        return random_warmup_rows(
            task, self.name, share=self.warmup_share, batch_rows=self.warmup_batch_rows, rows=self.warmup_rows
        )

    def by_content(self, model: ModelSettings) -> dict[str, Any]:
        """``moments`` by the bytes of the optimizer's state, ``given`` by those of vectors and ids."""
        found: dict[str, Any] = {}
        if self.moments is not None:
            found["moments"] = moments_digest(Path(self.moments))
        if self.given is not None:
            found["given"] = Given(path=self.given).identity
        return found

    def embedding_settings(self) -> EmbeddingSettings:
        """What is said of embeddings."""
        return EmbeddingSettings(
            name=self.embedding,
            budget=self.embedding_budget,
            depth=self.depth,
            directions=self.directions,
            positions=self.positions,
            combine=self.combine,
            side=self.side,
            tail_blocks=self.tail_blocks,
            given=self.given,
        )

    def kernel_settings(self) -> KernelSettings:
        """What is said of the transfer."""
        return KernelSettings(
            name=self.kernel,
            scale=self.scale,
            damping=self.damping,
            centred=self.centred,
            half_whitening=self.half_whitening,
            residual=self.residual,
        )

    def score(self, task: Task) -> TargetScores:
        """Scores of ``task.rows``: one column per target row that has a gradient, or per target with the mean target.

        ``extra`` marks landmarks (``is_landmark``), whose scores are exact up to the projection, and those of them
        without a gradient (``zero_gradient``); their score of 0 says nothing. Whether another row has a gradient is not
        known.

        Raises:
            InvalidInput: no row of a target has a gradient, or fewer than two landmarks have one.
            InvalidSettings: no embedding is within the budget, or the warm-up does not fit the model.
            NonFinite: a loss, gradient or embedding is NaN or infinite.
        """
        if len(task.rows) < 2:
            raise InvalidInput(f"influence-distillation needs at least two rows to score, got {len(task.rows)}")
        task, moments = self._warmed_up(task)
        embeddings = RowEmbeddings(task, dtype=self.feature_dtype)
        landmarks = landmark_rows(
            task, embeddings, count=self.landmarks, rule=self.landmark_rule, settings=self.embedding_settings()
        )
        gradients = landmark_gradients(
            dataclasses.replace(task, rows=landmarks),
            landmarks,
            form=self.form,
            moments=moments,
            projection=self.projection,
            projection_dim=self.projection_dim,
            dtype=self.feature_dtype,
        )
        of_target = task.target_group[gradients.columns]
        targets = [torch.from_numpy(np.flatnonzero(of_target == g)) for g in range(len(task.target_names))]
        if task.aggregate == "mean":
            columns, group = targets, np.arange(len(targets), dtype=np.int64)
        else:
            columns, group = [torch.tensor([j]) for j in range(len(of_target))], of_target
        exact = torch.stack([gradients.scores[:, column].mean(1) for column in columns], dim=1)
        values = self._carried(task, embeddings, gradients, exact, columns, group)
        places = np.searchsorted(task.rows, gradients.rows)
        values[places] = exact.numpy()
        zero = np.searchsorted(task.rows, gradients.without_gradient)
        values[zero] = 0
        is_zero, is_landmark = np.zeros(len(task.rows), np.bool_), np.zeros(len(task.rows), np.bool_)
        is_zero[zero], is_landmark[places] = True, True
        return TargetScores(
            rows=task.rows,
            values=values,
            group=group,
            target_names=task.target_names,
            extra={"zero_gradient": is_zero, "is_landmark": is_landmark | is_zero},
            weights="first-order" if self.weights == "first-order" else "equal",
        )

    def _carried(
        self,
        task: Task,
        embeddings: RowEmbeddings,
        gradients: LandmarkGradients,
        exact: Tensor,
        columns: Sequence[Tensor],
        of_target: IntArray,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Scores of all rows; those of landmarks are written over them later."""
        if len(gradients.rows) + len(gradients.without_gradient) == len(task.rows):
            task.note(
                "Every row to score is a landmark, so all scores are exact up to the projection, and no embedding was "
                "needed"
            )
            return empty_scores(task, len(columns))
        choice = choose_embedding(
            task,
            embeddings,
            gradients,
            columns,
            of_target,
            settings=self.embedding_settings(),
            kernels=self.kernel_settings(),
        )
        for sentence in notes_of_choice(
            choice,
            landmarks=len(gradients.rows),
            rule=self.landmark_rule,
            target_names=task.target_names,
            per_row=task.aggregate == "round-robin",
        ):
            task.note(sentence)
        (task.note if is_trusted(choice) else task.warn)(verdict(choice, task.target_names))
        return transferred_scores(
            task, embeddings, choice, gradients, exact, columns, keep_embeddings=self.keep_embeddings
        )

    def _warmed_up(self, task: Task) -> tuple[Task, Path | None]:
        """The task at the model whose gradients are taken, and where its optimizer's moments lie."""
        if self.moments is not None:
            model = task.model_settings.name
            if Path(self.moments).resolve() != Path(model).resolve():
                task.warn(
                    f"Adam's moments are those of {self.moments}, but gradients are taken at {model}; "
                    "give that checkpoint as the model, unless it is a copy of it"
                )
            return task, Path(self.moments)
        if self.warmup == "none":
            return task, None
        *_, last = warmup_points(
            task,
            task.pool,
            self.rows_for_warmup(task),
            self.warmup_settings(),
            method=self.name,
            lora_rank=None if self.warmup == "full" else self.lora_rank,
            lora_alpha=2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
        )
        return task.at_model(last.model_settings), last.folder
