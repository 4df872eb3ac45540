"""Keep all candidates and weigh them gently, about 1 each: with interactions (``anchored``) or without (``tilt``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tamis.errors import InvalidSettings
from tamis.online.methods.choice import (
    AlignmentForm,
    Choice,
    Evidence,
    InteractionForm,
    Needs,
    check_settings,
    check_start,
    everything,
    unweighted,
    weighted,
)
from tamis.online.methods.weights import anchored_weights, check_ridge, positive_scale, tilted_weights
from tamis.solve.solution import Status

__all__ = ["Anchored", "Tilt"]


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """Keep every candidate and weight it by matching the target, with a ridge towards weight 1.

    No gradient that was computed is thrown away: all ``keep · oversample`` candidates make up the update. A large
    ``ridge`` is plain training on all of them, a small one approaches matching without a filter.
    """

    name: ClassVar[str] = "anchored"
    keeps_all: ClassVar[bool] = True
    keep: int = 8  # candidates kept; of methods that keep all, what an update of theirs is compared with
    oversample: int = 4  # candidates looked at per candidate kept
    ridge: float = 4.0  # times the mean diagonal of G
    alignment: AlignmentForm = "adam"  # b: how candidates are compared with the target
    interactions: InteractionForm = "metric"  # G: how they are compared with each other
    cold_start: int | None = None  # updates before the method starts; None: 1 for the Jacobian, 10 otherwise

    def __post_init__(self) -> None:
        check_settings(self)
        check_start(self.alignment, self.interactions, self.cold_start)
        check_ridge(self.ridge)

    @property
    def needs(self) -> Needs:
        """Alignments and interactions."""
        return Needs(alignment=self.alignment, interactions=self.interactions)

    def choose(self, evidence: Evidence) -> Choice:
        """Weights of all candidates, about 1 each."""
        rows = np.arange(len(evidence.alignments), dtype=np.int64)
        scale = positive_scale(evidence.alignments, evidence.gram)
        if scale is None:
            return replace(unweighted(rows), fallback="no candidate is aligned with the target")
        solution = anchored_weights(evidence.alignments, evidence.gram, scale=scale, ridge=self.ridge)
        if solution.status is not Status.OPTIMAL:
            return replace(unweighted(rows), scale=scale, fallback=solution.status.value)
        return weighted(rows, solution.value, scale=scale, normalise=True)


@dataclass(frozen=True, kw_only=True)
class Tilt:
    """Keep every candidate; weigh it up or down in proportion to its alignment: anchored without interactions.

    ``w_i = max(0, 1 + c_P b_i / λ)``. Nothing is solved, and no pair of candidates is looked at, only the lengths of
    their gradients and of the sum of the aligned ones.
    """

    name: ClassVar[str] = "tilt"
    keeps_all: ClassVar[bool] = True
    keep: int = 8  # candidates kept; of methods that keep all, what an update of theirs is compared with
    oversample: int = 4  # candidates looked at per candidate kept
    ridge: float = 4.0  # λ over the mean squared length
    alignment: AlignmentForm = "adam"  # b: how candidates are compared with the target
    interactions: InteractionForm = "metric"  # the metric in which lengths are taken
    cold_start: int | None = None  # updates before the method starts; None: 1 for the Jacobian, 10 otherwise

    def __post_init__(self) -> None:
        check_settings(self)
        check_start(self.alignment, self.interactions, self.cold_start)
        check_ridge(self.ridge)
        if self.interactions == "token-level":
            raise InvalidSettings("interactions='token-level' is about pairs, of which a tilt sees none; use 'raw'")

    @property
    def needs(self) -> Needs:
        """Alignments, and lengths of the gradients and of a sum of them."""
        return Needs(alignment=self.alignment, lengths=self.interactions)

    def choose(self, evidence: Evidence) -> Choice:
        """Weights of all candidates, about 1 each."""
        b, lengths = evidence.alignments, evidence.lengths
        assert lengths is not None, "the method asked for lengths"
        scale = positive_scale(b, lengths)
        if scale is None:
            return replace(everything(len(b)), fallback="no candidate is aligned with the target")
        weights = tilted_weights(b, lengths.squares, scale=scale, ridge=self.ridge)
        return weighted(np.arange(len(b), dtype=np.int64), weights, scale=scale, normalise=True)
