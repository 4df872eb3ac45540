"""Filter, then weight: the recommended online method, and with ``paper()`` the published one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from tamis.errors import InvalidSettings
from tamis.online.methods.choice import (
    AlignmentForm,
    Choice,
    Evidence,
    InteractionForm,
    Needs,
    Vector,
    check_settings,
    check_start,
    unweighted,
    weighted,
)
from tamis.online.methods.weights import (
    LEAST_RIDGE,
    anchored_weights,
    check_ridge,
    matching_weights,
    positive_scale,
    target_scale,
)
from tamis.solve.greedy import greedy_residual, top
from tamis.solve.solution import Status
from tamis.types import IntArray

__all__ = ["FilterThenWeight"]

_PAPER_DIM = 256  # table 5's best, and the dimension of the running times


@dataclass(frozen=True, kw_only=True)
class FilterThenWeight:
    """Filter the candidates by a greedy residual, then weight the survivors (*Filter-then-Weight*, algorithm 1).

    The defaults are the recommended ones and differ from the paper: exact ``D`` on the unprojected target,
    interactions in the ``D`` metric, the target scaled to the length of a sum (``scale``), weights pulled towards 1.
    ``FilterThenWeight.paper()`` is the method as published, with changes to it as arguments.

    Where neither the best ``keep`` candidates nor their sum point towards the target, there is nothing to filter by or
    to match, and those candidates get equal weights (all candidates, without a filter).
    """

    name: ClassVar[str] = "filter-then-weight"
    keep: int = 8  # candidates kept; of methods that keep all, what an update of theirs is compared with
    oversample: int = 4  # candidates looked at per candidate kept
    alignment: AlignmentForm = "adam"  # b: how candidates are compared with the target
    interactions: InteractionForm = "metric"  # G: how they are compared with each other
    scale: Literal["target"] | float = "target"  # a number is c itself; 1.0 leaves the target as it is
    filter: Literal["greedy", "top", "none"] = "greedy"  # by what is left of the target, the plain top, or keep all
    # matching pulled towards 1, towards 0 and w >= 0, towards 0 with any sign, or all 1
    weights: Literal["anchored", "nnls", "unbounded", "none"] = "anchored"
    ridge: float | None = None  # times the mean diagonal of G; None: 4 for anchored weights, 1e-3 for the others
    normalise: bool = True  # weights sum to the number kept, so that learning rate and clipping keep their meaning
    projection_dim: int | None = None  # per side of every layer's sketch; None: as StepSettings say, exact if possible
    token_level: bool = False  # compare equal token positions only, of candidates and target too: an ablation
    cold_start: int | None = None  # updates before the method starts; None: 1 for the Jacobian, 10 otherwise

    def __post_init__(self) -> None:
        check_settings(self)
        check_start(self.alignment, self.interactions, self.cold_start)
        if self.scale != "target" and self.scale <= 0:
            raise InvalidSettings(f"scale={self.scale}: expected 'target' or a number above zero")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise InvalidSettings(f"projection_dim must be at least 1, got {self.projection_dim}")
        check_ridge(self.ridge)
        if self.token_level and (self.alignment not in ("adam", "projected", "raw") or self.interactions != "raw"):
            raise InvalidSettings(
                f"token_level=True with alignment={self.alignment!r} and interactions={self.interactions!r}: positions "
                "are compared by alignment 'adam', 'projected' or 'raw' and interactions='raw'"
            )

    @classmethod
    def paper(cls, *, keep: int = 8, oversample: int = 4, **changes: Any) -> FilterThenWeight:
        """As published: alignments by second moments of projected gradients, raw interactions of the same projections.

        The target is left unscaled, the filter is greedy, weights solve equation 6 over ``w >= 0`` and are used as they
        come. ``changes`` are settings of this class and make the ablations of section 4.4 (all eight are in
        docs/methods/online-filter-then-weight.md); ``alignment="adam", projection_dim=None`` puts the exact ``D`` on
        the unprojected target, which ranks candidates better and is what equation 10 means.

        Where the paper is silent, this is done:

        1. The ridge λ of equation 6 has no value there: 1e-3 of the mean diagonal of ``G``.
        2. Gradients enter the second moments of section 3.4 one per update: the update's own, as Adam sees it, after
           clipping.
        3. The first update has no second moment to divide by: one uniform update (``cold_start=1``).
        4. Numbers that never had a gradient have ``D`` = 1/ε in equation 9: 0 here.
        5. The projection is "Gaussian, for example", of 256 numbers per side of a layer: random signs of that size;
           sides no longer than that, and the rank side of an adapter, stay whole, and norms and biases too.
        6. A sample's loss may be a sum or a mean over its tokens: a mean, and rows count alike
           (``StepSettings(reduction="rows")``).
        7. That sum is not divided there, though written as a mean: by the number kept, a constant that Adam's step does
           not depend on.
        8. Ties go to the lowest index.
        9. Where the best candidates do not point towards the target, or all weights are zero, the best candidates get
           equal weights.
        10. Target rows: as many as the trainer's ``target_rows`` (16 there for ``keep=8``), drawn without replacement
            until all had their turn.
        """
        settings: dict[str, Any] = {
            "alignment": "projected", "interactions": "raw", "scale": 1.0, "filter": "greedy", "weights": "nnls",
            "ridge": 1e-3, "normalise": False, "projection_dim": _PAPER_DIM, "cold_start": 1,
        }  # fmt: skip
        return cls(keep=keep, oversample=oversample, **{**settings, **changes})

    @property
    def keeps_all(self) -> bool:
        """True without a filter."""
        return self.filter == "none"

    @property
    def needs(self) -> Needs:
        """Interactions unless neither filter nor weights look at pairs."""
        plain = self.filter != "greedy" and self.weights == "none"
        interactions: InteractionForm = "token-level" if self.token_level else self.interactions
        return Needs(
            alignment=self.alignment,
            interactions=None if plain else interactions,
            sketch_dim=self.projection_dim,
            token_level=self.token_level,
        )

    def choose(self, evidence: Evidence) -> Choice:
        """Steps 2 and 3 of algorithm 1."""
        b = evidence.alignments
        best = top(b, count=min(self.keep, len(b)))
        rows = np.arange(len(b), dtype=np.int64) if self.keeps_all else best
        if self.needs.interactions is None:
            return unweighted(rows)
        gram, scale = evidence.gram, None
        if self.filter == "greedy" or self.weights in ("nnls", "unbounded"):
            scale = target_scale(b, gram, best)
            if scale is None:
                # No candidate, or not even their sum, points towards the target: nothing to match.
                return replace(unweighted(rows), fallback="the best candidates are not aligned with the target")
            scale = scale if self.scale == "target" else float(self.scale)
        if self.filter == "greedy":
            assert scale is not None
            rows = greedy_residual(gram, scale * b, count=len(best))
        if self.weights == "none":
            return replace(unweighted(rows), scale=scale)
        return self._weigh(rows, b[rows], gram[np.ix_(rows, rows)], scale)

    def _weigh(self, rows: IntArray, b: Vector, gram: Vector, scale: float | None) -> Choice:
        if self.weights == "anchored":
            anchor = positive_scale(b, gram)
            if anchor is None:
                return replace(unweighted(rows), scale=scale, fallback="no survivor is aligned with the target")
            scale = anchor if scale is None else scale
            solution = anchored_weights(b, gram, scale=anchor, ridge=4.0 if self.ridge is None else self.ridge)
        else:
            assert scale is not None
            ridge = LEAST_RIDGE if self.ridge is None else self.ridge
            solution = matching_weights(b, gram, scale=scale, ridge=ridge, bounded=self.weights == "nnls")
        if solution.status is not Status.OPTIMAL:
            return replace(unweighted(rows), scale=scale, fallback=solution.status.value)
        return weighted(rows, solution.value, scale=scale, normalise=self.normalise)
