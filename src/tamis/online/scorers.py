"""The online methods: from alignments and interactions of a step's candidates to a choice and its weights.

Pure functions of the evidence, without model, optimizer or randomness. Which inner products a method is given is
stated by its ``needs``. Adding a method: a frozen dataclass here and an entry in ``METHODS``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tamis.errors import InvalidSettings
from tamis.online.choice import (
    AlignmentForm,
    Choice,
    Evidence,
    InteractionForm,
    Method,
    Needs,
    Vector,
    check_forms,
    check_sizes,
)
from tamis.online.weights import anchored_weights, matching_weights, target_scale, tilted_weights
from tamis.solve.greedy import greedy_residual, top
from tamis.solve.omp import match_orthogonally
from tamis.solve.solution import Status
from tamis.types import IntArray

__all__ = [
    "METHODS",
    "Anchored",
    "FilterThenWeight",
    "Full",
    "GradMatch",
    "Greats",
    "Less",
    "TargetOnly",
    "Tilt",
    "TracIn",
    "Uniform",
    "everything",
    "unweighted",
]

_LEAST_RIDGE = 1e-3  # below it, rounding and projection decide what the weights are


@dataclass(frozen=True, kw_only=True)
class FilterThenWeight:
    """Filter the candidates by a greedy residual, then weight the survivors (*Filter-then-Weight*, algorithm 1).

    The defaults are the recommended ones and differ from the paper: exact ``D`` on the unprojected target,
    interactions in the ``D`` metric, the target scaled to the length of a sum (``scale``), weights pulled towards 1.
    ``FilterThenWeight.paper()`` is the method as published; section 4.4's ablations are single settings:
    ``filter="top"`` (hard filter), ``weights="none"`` (filter only), ``alignment="raw"`` with
    ``interactions="raw"`` (vanilla), ``weights="unbounded"``, ``interactions="token-level"``.
    """

    keep: int = 8
    oversample: int = 4
    alignment: AlignmentForm = "adam"
    interactions: InteractionForm = "metric"
    scale: Literal["target"] | float = "target"  # a number is c itself; 1.0 leaves the target as it is
    filter: Literal["greedy", "top", "none"] = "greedy"
    weights: Literal["anchored", "nnls", "unbounded", "none"] = "anchored"
    ridge: float | None = None  # times the mean diagonal of G; None: 4 for anchored weights, 1e-3 for the others
    normalise: bool = True  # weights sum to the number kept, so that learning rate and clipping keep their meaning
    cold_start: int = 10

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)
        check_forms(self.alignment, self.interactions, self.cold_start)
        if self.scale != "target" and not (isinstance(self.scale, (int, float)) and 0 < self.scale < float("inf")):
            raise InvalidSettings(f"scale must be 'target' or a positive number, got {self.scale!r}")
        if self.filter not in ("greedy", "top", "none"):
            raise InvalidSettings(f"filter must be 'greedy', 'top' or 'none', got {self.filter!r}")
        if self.weights not in ("anchored", "nnls", "unbounded", "none"):
            raise InvalidSettings(f"weights must be 'anchored', 'nnls', 'unbounded' or 'none', got {self.weights!r}")
        _check_ridge(self.ridge)

    @classmethod
    def paper(cls, *, keep: int = 8, oversample: int = 4) -> FilterThenWeight:
        """As published: raw interactions beside preconditioned alignments, the target unscaled, weights by NNLS.

        The published alignment keeps second moments of projected gradients (``alignment="projected"``); the exact ``D``
        ranks at least as well and is what the formula means, so it stands here.
        """
        return cls(keep=keep, oversample=oversample, interactions="raw", scale=1.0, weights="nnls", ridge=1e-3)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "filter-then-weight"

    @property
    def keeps_all(self) -> bool:
        """True without a filter."""
        return self.filter == "none"

    @property
    def needs(self) -> Needs:
        """Interactions unless the filter is a plain top and there are no weights."""
        plain = self.filter == "top" and self.weights == "none"
        return Needs(alignment=self.alignment, interactions=None if plain else self.interactions)

    def choose(self, evidence: Evidence) -> Choice:
        """Steps 2 and 3 of algorithm 1."""
        b = evidence.alignments
        count = len(b) if self.keeps_all else min(self.keep, len(b))
        best = top(b, count=count)
        if evidence.interactions is None:
            return unweighted(best)
        gram = evidence.gram
        scale = target_scale(b, gram, best) if self.scale == "target" else float(self.scale)
        if scale is None:
            # No candidate, or not even their sum, points towards the target: nothing to match.
            return replace(unweighted(best), fallback="the best candidates are not aligned with the target")
        if self.filter == "greedy":
            rows = greedy_residual(gram, scale * b, count=count)
        else:
            rows = best if self.filter == "top" else np.arange(len(b), dtype=np.int64)
        if self.weights == "none":
            return replace(unweighted(rows), scale=scale)
        part = gram[np.ix_(rows, rows)]
        if self.weights == "anchored":
            solution = anchored_weights(b[rows], part, ridge=4.0 if self.ridge is None else self.ridge)
            if solution is None:
                return replace(unweighted(rows), scale=scale, fallback="no survivor is aligned with the target")
        else:
            ridge = _LEAST_RIDGE if self.ridge is None else self.ridge
            bounded = self.weights == "nnls"
            solution = matching_weights(b[rows], part, scale=scale, ridge=ridge, bounded=bounded)
        if solution.status is not Status.OPTIMAL:
            return replace(unweighted(rows), scale=scale, fallback=solution.status.value)
        return _weighted(rows, solution.value, scale=scale, normalise=self.normalise)


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """Keep every candidate and weight it by matching the target, with a ridge towards weight 1.

    No gradient that was computed is thrown away: all ``keep · oversample`` candidates make up the update. A large
    ``ridge`` is plain training on all of them, a small one approaches matching without a filter.
    """

    keep: int = 8
    oversample: int = 4
    ridge: float = 4.0  # times the mean diagonal of G
    alignment: AlignmentForm = "adam"
    interactions: InteractionForm = "metric"
    cold_start: int = 10

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)
        check_forms(self.alignment, self.interactions, self.cold_start)
        _check_ridge(self.ridge)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "anchored"

    @property
    def keeps_all(self) -> bool:
        """Always."""
        return True

    @property
    def needs(self) -> Needs:
        """Alignments and interactions."""
        return Needs(alignment=self.alignment, interactions=self.interactions)

    def choose(self, evidence: Evidence) -> Choice:
        """Weights of all candidates, about 1 each."""
        solution = anchored_weights(evidence.alignments, evidence.gram, ridge=self.ridge)
        if solution is None:
            return replace(everything(len(evidence.alignments)), fallback="no candidate is aligned with the target")
        rows = np.arange(len(evidence.alignments), dtype=np.int64)
        if solution.status is not Status.OPTIMAL:
            return replace(unweighted(rows), fallback=solution.status.value)
        return _weighted(rows, solution.value, scale=None, normalise=True)


@dataclass(frozen=True, kw_only=True)
class Tilt:
    """Keep every candidate; weigh it up or down in proportion to its alignment: anchored without interactions.

    ``w_i = max(0, 1 + c_P b_i / λ)``. As good as anchored weights where both were measured, and nothing is solved.
    """

    keep: int = 8
    oversample: int = 4
    ridge: float = 4.0  # λ over the mean diagonal of G
    alignment: AlignmentForm = "adam"
    interactions: InteractionForm = "metric"  # the metric in which lengths are taken
    cold_start: int = 10

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)
        check_forms(self.alignment, self.interactions, self.cold_start)
        _check_ridge(self.ridge)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "tilt"

    @property
    def keeps_all(self) -> bool:
        """Always."""
        return True

    @property
    def needs(self) -> Needs:
        """Alignments, and lengths of the gradients and of a sum of them."""
        return Needs(alignment=self.alignment, interactions=self.interactions)

    def choose(self, evidence: Evidence) -> Choice:
        """Weights of all candidates, about 1 each."""
        weights = tilted_weights(evidence.alignments, evidence.gram, ridge=self.ridge)
        if weights is None:
            return replace(everything(len(evidence.alignments)), fallback="no candidate is aligned with the target")
        return _weighted(np.arange(len(weights), dtype=np.int64), weights, scale=None, normalise=True)


@dataclass(frozen=True, kw_only=True)
class TracIn:
    """The candidates with the largest ``<grad t, grad l_i>`` (Pruthi et al., 2020, with one checkpoint: this step)."""

    keep: int = 8
    oversample: int = 4
    cold_start: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "tracin"

    @property
    def keeps_all(self) -> bool:
        """Never."""
        return False

    @property
    def needs(self) -> Needs:
        """Raw alignments."""
        return Needs(alignment="raw")

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the best."""
        return unweighted(top(evidence.alignments, count=min(self.keep, len(evidence.alignments))))


@dataclass(frozen=True, kw_only=True)
class Less:
    """The candidates whose own Adam step has the largest cosine with the target gradient (Xia et al., 2024)."""

    keep: int = 8
    oversample: int = 4
    cold_start: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "less"

    @property
    def keeps_all(self) -> bool:
        """Never."""
        return False

    @property
    def needs(self) -> Needs:
        """Cosines with each candidate's own Adam step."""
        return Needs(alignment="cosine")

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the best."""
        return unweighted(top(evidence.alignments, count=min(self.keep, len(evidence.alignments))))


@dataclass(frozen=True, kw_only=True)
class Greats:
    """Greedy by ``η <grad t, grad l_i>``, less ``η² <grad l_i, grad l_j>`` for each ``j`` taken (Wang et al., 2024)."""

    keep: int = 8
    oversample: int = 4
    cold_start: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "greats"

    @property
    def keeps_all(self) -> bool:
        """Never."""
        return False

    @property
    def needs(self) -> Needs:
        """Raw inner products."""
        return Needs(alignment="raw", interactions="raw")

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for those chosen; at small learning rates the choice is TracIn's."""
        b, rate = evidence.alignments, evidence.learning_rate
        return unweighted(greedy_residual(rate**2 * evidence.gram, rate * b, count=min(self.keep, len(b))))


@dataclass(frozen=True, kw_only=True)
class GradMatch:
    """Orthogonal matching pursuit of the raw target (Killamsetty et al., 2021; FTW, algorithm 2).

    Negative weights become 0, and the weights then sum to the number kept.
    """

    keep: int = 8
    oversample: int = 4
    ridge: float = 0.1  # times the mean diagonal of G
    cold_start: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)
        _check_ridge(self.ridge)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "grad-match"

    @property
    def keeps_all(self) -> bool:
        """Never."""
        return False

    @property
    def needs(self) -> Needs:
        """Raw inner products."""
        return Needs(alignment="raw", interactions="raw")

    def choose(self, evidence: Evidence) -> Choice:
        """The pursuit's order and its last weights."""
        b, gram = evidence.alignments, evidence.gram
        unit = float(np.diag(gram).mean()) if len(b) else 0.0
        if not unit > 0:
            return replace(unweighted(top(b, count=min(self.keep, len(b)))), fallback="all gradients are zero")
        rows, solution = match_orthogonally(gram / unit, b / unit, count=min(self.keep, len(b)), ridge=self.ridge)
        return _weighted(rows, np.maximum(solution.value, 0.0), scale=1.0, normalise=True)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """``keep`` candidates drawn at random, weight 1 each: the baseline that always runs. Only those are computed."""

    keep: int = 8
    oversample: int = 4
    cold_start: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "uniform"

    @property
    def keeps_all(self) -> bool:
        """Never."""
        return False

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the candidates given: the draw happened before they were computed."""
        return everything(len(evidence.alignments))


@dataclass(frozen=True, kw_only=True)
class Full:
    """Plain training on all ``keep · oversample`` candidates, weight 1 each."""

    keep: int = 8
    oversample: int = 4
    cold_start: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "full"

    @property
    def keeps_all(self) -> bool:
        """Always."""
        return True

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for all."""
        return everything(len(evidence.alignments))


@dataclass(frozen=True, kw_only=True)
class TargetOnly:
    """Train on the target rows themselves: a warning, not a method. A small target is memorised."""

    keep: int = 8
    oversample: int = 4
    cold_start: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "target-only"

    @property
    def keeps_all(self) -> bool:
        """Never: no candidate is used."""
        return False

    @property
    def needs(self) -> Needs:
        """The target's gradient and nothing else."""
        return Needs(target_only=True)

    def choose(self, evidence: Evidence) -> Choice:
        """No candidate."""
        return unweighted(np.zeros(0, dtype=np.int64))


METHODS: dict[str, type[Method]] = {
    "filter-then-weight": FilterThenWeight,
    "tilt": Tilt,
    "anchored": Anchored,
    "tracin": TracIn,
    "less": Less,
    "greats": Greats,
    "grad-match": GradMatch,
    "uniform": Uniform,
    "full": Full,
    "target-only": TargetOnly,
}


def unweighted(rows: IntArray) -> Choice:
    """Weight 1 for ``rows``."""
    return Choice(rows=rows, weights=np.ones(len(rows)), weight_sum=float(len(rows)))


def everything(count: int) -> Choice:
    """Weight 1 for all of ``count`` candidates."""
    return unweighted(np.arange(count, dtype=np.int64))


def _weighted(rows: IntArray, weights: Vector, *, scale: float | None, normalise: bool) -> Choice:
    """Bring the weights to the sum of plain training, ``len(rows)``; equal weights where they have no usable sum."""
    total = float(weights.sum())
    if not total > 1e-6 * float(np.abs(weights).sum()):
        return replace(unweighted(rows), scale=scale, fallback="the weights have no positive sum")
    if normalise:
        weights = weights * (len(rows) / total)
    return Choice(rows=rows, weights=weights, normalised=normalise, weight_sum=total, scale=scale)


def _check_ridge(ridge: float | None) -> None:
    if ridge is not None and not _LEAST_RIDGE <= ridge < float("inf"):
        raise InvalidSettings(f"ridge must be at least {_LEAST_RIDGE} (times the mean diagonal), got {ridge}")
