"""The second-order term of influence distillation, from Hessian products of landmarks to what a selection needs of it.

Which landmarks, the size of the term beside the first (figure 8 of the paper), Adam's offset in the scores (equation
8), and the coefficients that carry the term to every row (equation 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, from_numpy

from tamis.collect import Task
from tamis.errors import InvalidSettings, Unsupported
from tamis.maths.second_order import WORTH_HAVING, TermRatio
from tamis.model.load import resolved_dtype
from tamis.score.distillation.choice import Choice
from tamis.score.distillation.curvature import LandmarkHessians
from tamis.score.distillation.landmark_gradients import LandmarkGradients
from tamis.score.distillation.notes import USABLE
from tamis.score.distillation.row_embeddings import RowEmbeddings
from tamis.score.distillation.transfer import transfer_coefficients
from tamis.score.matrix import empty_scores
from tamis.seeds import child_seed, random_subset
from tamis.solve.leave_one_out import try_candidates
from tamis.types import Curvature, FloatArray, IntArray

__all__ = ["LandmarkTerm", "SecondOrder"]


@dataclass(frozen=True, kw_only=True)
class LandmarkTerm:
    """The term among the landmarks drawn for it."""

    rows: IntArray  # (L,) pool rows
    products: FloatArray | None  # (C, L, L); None where only its size was asked for
    ratio: FloatArray  # (C,)
    eta: float
    scores: Float[Tensor, "n C"]  # of all landmarks, Adam's offset in them
    offset: dict[str, Any] | None  # what decides Adam's offset; None if scores hold none
    is_carried: bool  # there are rows that it must be carried to

    def curvature(
        self,
        task: Task,
        embeddings: RowEmbeddings,
        gradients: LandmarkGradients,
        choice: Choice | None,
        without_gradient: IntArray,
        *,
        keep_embeddings: bool,
    ) -> Curvature:
        """What the selection needs: coefficients of every row, computed as far as they are not in the store.

        Args:
            task: its rows.
            embeddings: of its rows.
            gradients: of all landmarks.
            choice: what carries; None where every row is one of these landmarks.
            without_gradient: places in ``task.rows`` of landmarks without a gradient, which bend nothing.
            keep_embeddings: as for scores.
        """
        assert self.products is not None
        if choice is None or not self.is_carried:
            coefficients = empty_scores(task, len(self.rows))
            coefficients[:] = 0
            coefficients[np.searchsorted(task.rows, self.rows), np.arange(len(self.rows))] = 1
        else:
            coefficients = transfer_coefficients(task, embeddings, choice, self.rows, keep_embeddings=keep_embeddings)
            self._foretell(task, embeddings, gradients, choice)
        coefficients[without_gradient] = 0
        return Curvature(coefficients=coefficients, products=self.products, eta=self.eta, ratio=self.ratio)

    def _foretell(self, task: Task, embeddings: RowEmbeddings, gradients: LandmarkGradients, choice: Choice) -> None:
        """What to expect of the term on other rows, by leaving out each of its own landmarks, which are fewer.

        What is carried is ``Q w``. With equal weights that is known for the landmarks: the sums of their products.
        """
        assert self.products is not None
        rows = embeddings.of(choice.embedding, task.pool, self.rows)(0, len(self.rows))
        pulls = from_numpy(self.products.sum(2, dtype=np.float64).T.copy())  # (L, C)
        gram = gradients.gram_of(np.searchsorted(gradients.rows, self.rows))
        (found,) = try_candidates(rows, gram=gram, scores=pulls, grid=[choice.candidate])
        assert found.recovery is not None and found.mean_spearman is not None
        said = (
            f"Expected of the second-order term on rows that are not among its {len(self.rows)} landmarks, found by "
            f"leaving out each in turn: gradients rebuilt with a cosine of {found.recovery:.2f}, and rows in the order "
            f"of what equal weights take off them with a mean rank correlation of {found.mean_spearman:.2f}"
        )
        if found.mean_spearman >= USABLE:
            task.note(said)
        else:
            task.warn(
                f"{said}. That is too little to select by: set weights=first-order or none, or raise hessian_landmarks."
            )


@dataclass(frozen=True, kw_only=True)
class SecondOrder:
    """What is wanted of the second-order term.

    Args:
        eta: learning rate η.
        landmarks: how many of the landmarks to draw.
        whole: all products between them, not only the size of their sum.
        moments: a checkpoint folder for Adam's form, None for raw gradients.
        momentum: how much of Adam's offset the scores hold, with ``moments`` and ``whole``.
        memory_bytes: bound on vectors of θ's size held at once.
    """

    eta: float
    landmarks: int
    whole: bool
    moments: Path | None
    momentum: Literal["paper", "whole", "none"]
    memory_bytes: int

    def check(self, task: Task) -> None:
        """Refuse a model that cannot be differentiated twice, before anything is computed with it.

        Raises:
            InvalidSettings: its weights have 16 bits.
            Unsupported: its attention has no second derivative.
        """
        settings, dtype = task.model_settings, resolved_dtype(task.model_settings)
        if dtype not in ("float32", "float64"):
            raise InvalidSettings(
                f"the second-order term takes Hessian products, which in {dtype} would be mostly rounding; load the "
                "model with --dtype float32"
            )
        if settings.attention not in ("sdpa", "eager"):
            raise Unsupported(
                f"the second-order term differentiates twice, which attention '{settings.attention}' does not allow; "
                "load the model with --attention sdpa or --attention eager"
            )

    def start(
        self, task: Task, gradients: LandmarkGradients, columns: Sequence[Tensor], exact: Float[Tensor, "n C"]
    ) -> LandmarkTerm:
        """Hessian products of the landmarks drawn; a note, or a warning above 5 %, says how much the term matters.

        Args:
            task: at the model whose gradients were taken.
            gradients: of all landmarks.
            columns: for each score column, the columns of ``gradients.scores`` that it is the mean of.
            exact: the landmarks' scores.
        """
        known = len(gradients.rows)
        drawn = np.arange(known)
        if self.landmarks < known:
            drawn = random_subset(child_seed(task.seed, "hessian landmarks"), known, self.landmarks)
        rows = gradients.rows[drawn]
        groups = [gradients.columns[column.numpy()] for column in columns]
        hessians = LandmarkHessians(task, groups, moments=self.moments, memory_bytes=self.memory_bytes)
        products = hessians.products(rows) if self.whole else None
        sums = hessians.equal_weights(rows) if products is None else products.sum((1, 2), dtype=np.float64)
        first = exact[from_numpy(drawn)].double().sum(0).numpy()
        terms = [
            TermRatio(first=float(t1), second=self.eta / 2 * float(curved) / len(rows))
            for t1, curved in zip(first, sums, strict=True)
        ]
        self._report(task, terms, len(rows))
        scores, offset = exact, None
        if self.whole and self.moments is not None and self.momentum != "none":
            share = self.eta / (len(task.rows) if self.momentum == "paper" else 1)
            scores = exact - share * from_numpy(hessians.offsets(gradients.rows))
            offset = {"eta": self.eta, "momentum": self.momentum}
        return LandmarkTerm(
            rows=rows,
            products=products,
            ratio=np.array([term.ratio for term in terms], np.float32),
            eta=self.eta,
            scores=scores,
            offset=offset,
            is_carried=len(rows) + len(gradients.without_gradient) < len(task.rows),
        )

    def _report(self, task: Task, terms: Sequence[TermRatio], count: int) -> None:
        ratios = [term.ratio for term in terms]
        size = f"{min(ratios):.2g}" if len(ratios) == 1 else f"{min(ratios):.2g} to {max(ratios):.2g}"
        form = "Adam-scaled" if self.moments is not None else "raw"
        said = (
            f"The second-order term is {size} of the first at eta {self.eta:.3g}, with {count} equally weighted "
            f"landmarks and {form} gradients of length 1; it grows in proportion to eta"
        )
        if max(ratios) <= WORTH_HAVING:
            task.note(f"{said}. At 5 % or less the first order may stand alone")
        elif self.whole:
            task.note(f"{said}. Above 5 % it changes which rows are selected")
        else:
            task.warn(
                f"{said}. Above 5 % it changes which rows are selected: set weights=second-order, or lower eta if you "
                "will train with less."
            )
