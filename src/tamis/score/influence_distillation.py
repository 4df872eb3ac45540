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
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.embeddings import Given
from tamis.errors import InvalidInput
from tamis.model.load import ModelSettings
from tamis.projection import make_projector
from tamis.score.decisions import gradient_size
from tamis.score.distillation.candidates import EmbeddingSettings
from tamis.score.distillation.choice import Choice, KernelSettings, choose_embedding
from tamis.score.distillation.landmark_gradients import LandmarkGradients, landmark_gradients, require_storable
from tamis.score.distillation.landmark_rows import landmark_rows
from tamis.score.distillation.notes import diagnosis, is_trusted, notes_of_carried_term, notes_of_choice, verdict
from tamis.score.distillation.row_embeddings import RowEmbeddings
from tamis.score.distillation.second_order import LandmarkTerm, SecondOrder
from tamis.score.distillation.settings import check_distillation, landmark_count, preset_values
from tamis.score.distillation.transfer import transferred_scores
from tamis.score.less import moments_digest
from tamis.score.matrix import empty_scores
from tamis.score.warmup import random_warmup_rows, warmup_points, warmup_training
from tamis.solve.kernels import KernelName
from tamis.solve.landmarks import LandmarkRule
from tamis.training.loop import TrainSettings
from tamis.types import IntArray, TargetScores
from tamis.values import check_types

__all__ = ["InfluenceDistillation"]


@dataclass(frozen=True, kw_only=True)
class InfluenceDistillation:
    """Gradient cosine with the target rows: landmarks' own, up to the projection; carried to others by embeddings.

    Cost: the warm-up, a gradient pass over landmarks and target rows, and one cheap embedding of every row. Scores are
    those of ``tracin`` at the warmed-up model as well as the embedding lets them be rebuilt; the notes say how well.

    Args:
        preset: "paper": as published where this library can; "true-gradients": the same with the gradient of every row,
            the paper's yardstick, which corresponds to LESS. Settings given beside a preset count in place of its own.
            ``dataclasses.replace`` gives every setting, so it changes nothing but what it names.
        landmarks: rows with gradients of their own, at most all rows to score; "auto": all of up to 768 rows, which
            costs about what carrying does at the default budget; of more a tenth, from 256 to 4,096; "all": all rows.
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
        warmup_pool_share: share of the pool's usable rows, though never fewer than four updates' worth.
        warmup_rows: their number, in place of the share.
        warmup_epochs: epochs; only the end counts.
        warmup_update_rows: rows of one update.
        warmup_learning_rate: the peak; None: 2e-4 for LoRA, 2e-5 for all weights.
        lora_rank: rank of the adapter.
        lora_alpha: its scale is ``lora_alpha / lora_rank``; None: twice the rank.
        moments: with form "adam", a Trainer checkpoint folder whose ``optimizer.pt`` belongs to the model given, which
            must be that checkpoint: there is no warm-up.
        projection: of landmark and target gradients: "hadamard", "factorized", "rademacher", "mask" or "none".
        projection_dim: numbers of a feature (8192); per side of a layer for "factorized" (16).
        weights: what selected rows weigh: "none", all 1; "first-order", robust weights from their scores;
            "second-order", which also selects by how the target's loss bends (Hessian products, in float32).
        eta: learning rate η of the second-order term, for gradients of length 1; None: the warm-up's, if there is one.
        hessian_landmarks: landmarks, drawn at random, between which Hessian products are taken: the rank of the term.
        hessian_ratio: report the size of the second-order term beside the first with the other weights, too: one
            Hessian product per target row, or per target with ``--aggregate mean``.
        momentum: with form "adam" and second-order weights, what of the update no weight changes: "paper", equation 8,
            which divides it by the number of rows; "whole", as Adam's own step has it; "none".
        memory_gb: bound on vectors of the gradients' size that Hessian products hold at once.
        keep_embeddings: store the pool's embeddings from a model, which other targets may use. False: rows are scored
            as they are embedded, and only landmarks' and target rows' embeddings are stored.
        feature_dtype: "float16" or "float32", of stored gradients and embeddings.

    Raises:
        InvalidSettings: a value is out of range or does not go with another.
    """

    name: ClassVar[str] = "influence-distillation"

    preset: str | None = None
    landmarks: int | Literal["auto", "all"] = "auto"
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
    warmup: Literal["lora", "full", "none"] = "lora"
    warmup_pool_share: float = 0.05
    warmup_rows: int | None = None
    warmup_epochs: int = 2
    warmup_update_rows: int = 16
    warmup_learning_rate: float | None = None
    lora_rank: int = 8
    lora_alpha: float | None = None
    moments: str | None = None
    projection: str = "hadamard"
    projection_dim: int | None = None
    weights: Literal["none", "first-order", "second-order"] = "none"
    eta: float | None = None
    hessian_landmarks: int = 256
    hessian_ratio: bool = False
    momentum: Literal["paper", "whole", "none"] = "paper"
    memory_gb: float = 2.0
    keep_embeddings: bool = True
    feature_dtype: Literal["float16", "float32"] = "float16"

    def __new__(cls, **given: Any) -> InfluenceDistillation:
        """Note which settings are given: one that equals its default wins over a preset too."""
        made = super().__new__(cls)
        made.__dict__["_given"] = frozenset(given)
        return made

    def __post_init__(self) -> None:
        given: frozenset[str] = self.__dict__.pop("_given")
        check_types(self)
        if self.preset is not None:
            for name, value in preset_values(self.preset).items():
                if name not in given:
                    object.__setattr__(self, name, value)
        check_distillation(self)
        self.warmup_settings()  # checks the others
        make_projector(self.projection, dim=self.projection_dim)

    def warmup_settings(self) -> TrainSettings:
        """The fine-tuning run at whose end gradients are taken."""
        rate = self.warmup_learning_rate
        return warmup_training(
            epochs=self.warmup_epochs,
            update_rows=self.warmup_update_rows,
            learning_rate=(2e-5 if self.warmup == "full" else 2e-4) if rate is None else rate,
        )

    def rows_for_warmup(self, task: Task) -> IntArray:
        """The random part of the pool that the warm-up trains on, ascending.

        Raises:
            InvalidInput: the pool has no usable row.
        """
        return random_warmup_rows(
            task, self.name, share=self.warmup_pool_share, update_rows=self.warmup_update_rows, rows=self.warmup_rows
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
            InvalidInput: no row of a target has a gradient, fewer than two landmarks have one, or ``given`` lacks rows.
            InvalidSettings: no embedding is within the budget, or the warm-up or second order does not fit the model.
            NonFinite: a loss, gradient or embedding is NaN or infinite.
            Unsupported: the model cannot be embedded in the way that was named, or be differentiated twice.
        """
        self._check(task)
        task, moments = self._warmed_up(task)
        embeddings = RowEmbeddings(task, dtype=self.feature_dtype)
        landmarks = landmark_rows(
            task,
            embeddings,
            count=landmark_count(self.landmarks, len(task.rows)),
            rule=self.landmark_rule,
            settings=self.embedding_settings(),
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
        second = self._second_order(task, moments)
        chosen = None if second is None else second.start(task, gradients, columns, exact)
        if chosen is not None:
            exact = chosen.scores
        choice = self._choice(task, embeddings, gradients, columns, group, chosen)
        is_exact = _all_are_landmarks(task, gradients)
        if choice is None or is_exact:
            values = empty_scores(task, len(columns))
        else:
            values = transferred_scores(
                task,
                embeddings,
                choice,
                gradients,
                exact,
                columns,
                offset=None if chosen is None else chosen.offset,
                keep_embeddings=self.keep_embeddings,
            )
        places = np.searchsorted(task.rows, gradients.rows)
        values[places] = exact.numpy()
        zero = np.searchsorted(task.rows, gradients.without_gradient)
        values[zero] = 0
        is_zero, is_landmark = np.zeros(len(task.rows), np.bool_), np.zeros(len(task.rows), np.bool_)
        is_zero[zero], is_landmark[places] = True, True
        curvature = None
        if self.weights == "second-order":
            assert chosen is not None
            curvature = chosen.curvature(
                task, embeddings, gradients, choice, zero, keep_embeddings=self.keep_embeddings
            )
        return TargetScores(
            rows=task.rows,
            values=values,
            group=group,
            target_names=task.target_names,
            extra={"zero_gradient": is_zero, "is_landmark": is_landmark | is_zero},
            weights="equal" if self.weights == "none" else self.weights,
            curvature=curvature,
            diagnosis=(
                {"verdict": "all scores are exact up to the projection"}
                if choice is None or is_exact
                else diagnosis(choice, task.target_names, self.embedding_settings())
            ),
        )

    def _check(self, task: Task) -> None:
        """Refuse what cannot end well before the warm-up, not after the hours that this and gradients may take."""
        if len(task.rows) < 2:
            raise InvalidInput(
                f"influence-distillation needs at least two rows to score, got {len(task.rows)}: scores are carried "
                "from some rows to others; give a pool or a --shortlist of more rows, or score with tracin"
            )
        if (second := self._second_order(task, None)) is not None:
            second.check(task)
        if self.given is not None:
            self._check_given(task, Given(path=self.given))
        # The warm-up does not change how large gradients of all weights are.
        if self.projection == "none" and self.warmup == "full" and self.moments is None:
            require_storable(
                gradient_size(dataclasses.replace(task)),  # a model that is loaded for it is gone again
                landmarks=landmark_count(self.landmarks, len(task.rows)),
                target_rows=len(task.target_rows),
                dtype=self.feature_dtype,
            )

    def _check_given(self, task: Task, folder: Given) -> None:
        wanted: list[tuple[Corpus, IntArray, str]] = [(task.pool, task.rows, "")]
        if self.residual is not False:
            without = "; --set residual=false scores without those of the target"
            wanted.append((task.target, task.target_rows, without))
        for corpus, rows, otherwise in wanted:
            missing = folder.missing([corpus.examples.ids[int(row)] for row in rows])
            if missing:
                raise InvalidInput(
                    f"{self.given} has no embedding for {len(missing)} of {len(rows)} {corpus.name} rows (first: "
                    f"{', '.join(map(repr, missing[:3]))}); compute them, or write the rows' own ids into the folder's "
                    f"ids.json{otherwise}"
                )

    def _second_order(self, task: Task, moments: Path | None) -> SecondOrder | None:
        if self.weights != "second-order" and not self.hessian_ratio:
            return None
        return SecondOrder(
            eta=self.warmup_settings().learning_rate if self.eta is None else self.eta,
            landmarks=self.hessian_landmarks,
            whole=self.weights == "second-order",
            moments=moments if self.form == "adam" else None,
            momentum=self.momentum,
            memory_bytes=int(self.memory_gb * 2**30),
        )

    def _choice(
        self,
        task: Task,
        embeddings: RowEmbeddings,
        gradients: LandmarkGradients,
        columns: Sequence[Tensor],
        of_target: IntArray,
        second: LandmarkTerm | None,
    ) -> Choice | None:
        """What carries scores, and the second-order term, to other rows; None if there is nothing to carry."""
        is_exact = _all_are_landmarks(task, gradients)
        if is_exact:
            task.note(
                "Every row to score is a landmark, so all scores are exact up to the projection, and no embedding was "
                "needed for the scores"
            )
            if second is None or second.products is None or not second.is_carried:
                return None
            # What carries the term is judged on its own landmarks: these may be all rows of a large pool.
            gradients = gradients.only(np.searchsorted(gradients.rows, second.rows))
        choice = choose_embedding(
            task,
            embeddings,
            gradients,
            columns,
            of_target,
            settings=self.embedding_settings(),
            kernels=self.kernel_settings(),
        )
        if is_exact:
            said: tuple[str, ...] = notes_of_carried_term(choice, landmarks=len(gradients.rows))
        else:
            said = notes_of_choice(
                choice,
                landmarks=len(gradients.rows),
                rule=self.landmark_rule,
                target_names=task.target_names,
                per_row=task.aggregate == "round-robin",
            )
        for sentence in said:
            task.note(sentence)
        if not is_exact:
            judged = verdict(choice, task.target_names, self.embedding_settings())
            (task.note if is_trusted(choice) else task.warn)(judged)
        return choice

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


def _all_are_landmarks(task: Task, gradients: LandmarkGradients) -> bool:
    return len(gradients.rows) + len(gradients.without_gradient) == len(task.rows)
