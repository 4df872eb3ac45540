"""The methods to compare with, as published and at one step: ``uniform`` and ``full`` belong into every comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tamis.online.methods.choice import (
    Choice,
    Evidence,
    Needs,
    check_settings,
    everything,
    top_choice,
    unweighted,
    weighted,
)
from tamis.online.methods.weights import check_ridge
from tamis.solve.greedy import greedy_residual
from tamis.solve.omp import match_orthogonally
from tamis.solve.solution import Status

__all__ = ["Full", "GradMatch", "Greats", "Less", "TargetOnly", "TracIn", "Uniform"]


@dataclass(frozen=True, kw_only=True)
class TracIn:
    """The candidates with the largest ``<grad t, grad l_i>`` (Pruthi et al., 2020, with one checkpoint: this step)."""

    name: ClassVar[str] = "tracin"
    keeps_all: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(alignment="raw")
    keep: int = 8  # candidates kept
    oversample: int = 4  # candidates looked at per candidate kept
    cold_start: int = 0  # uniform updates before the method starts

    def __post_init__(self) -> None:
        check_settings(self)

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the best."""
        return top_choice(evidence, self.keep)


@dataclass(frozen=True, kw_only=True)
class Less:
    """The candidates whose own Adam step has the largest cosine with the target gradient (Xia et al., 2024)."""

    name: ClassVar[str] = "less"
    keeps_all: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(alignment="cosine")
    keep: int = 8  # candidates kept
    oversample: int = 4  # candidates looked at per candidate kept
    cold_start: int = 0  # uniform updates before the method starts

    def __post_init__(self) -> None:
        check_settings(self)

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the best."""
        return top_choice(evidence, self.keep)


@dataclass(frozen=True, kw_only=True)
class Greats:
    """Greedy by ``η <grad t, grad l_i>``, less ``η² <grad l_i, grad l_j>`` for each ``j`` taken (Wang et al., 2024)."""

    name: ClassVar[str] = "greats"
    keeps_all: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(alignment="raw", interactions="raw")
    keep: int = 8  # candidates kept
    oversample: int = 4  # candidates looked at per candidate kept
    cold_start: int = 0  # uniform updates before the method starts

    def __post_init__(self) -> None:
        check_settings(self)

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for those chosen; at small learning rates the choice is TracIn's."""
        b, rate = evidence.alignments, evidence.learning_rate
        # The whole score over η: the same order, and at rate 0 (the start of a warm-up) the order of its limit.
        return unweighted(greedy_residual(rate * evidence.gram, b, count=min(self.keep, len(b))))


@dataclass(frozen=True, kw_only=True)
class GradMatch:
    """Orthogonal matching pursuit of the raw target (Killamsetty et al., 2021; FTW, algorithm 2).

    Negative weights become 0, and the weights then sum to the number kept.
    """

    name: ClassVar[str] = "grad-match"
    keeps_all: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(alignment="raw", interactions="raw")
    keep: int = 8  # candidates kept
    oversample: int = 4  # candidates looked at per candidate kept
    ridge: float = 0.1  # times the mean diagonal of G
    cold_start: int = 0  # uniform updates before the method starts

    def __post_init__(self) -> None:
        check_settings(self)
        check_ridge(self.ridge)

    def choose(self, evidence: Evidence) -> Choice:
        """The pursuit's order and its last weights."""
        b, gram = evidence.alignments, evidence.gram
        unit = float(np.diag(gram).mean()) if len(b) else 0.0
        if not unit > 0:
            return replace(top_choice(evidence, self.keep), fallback="all gradients are zero")
        rows, solution = match_orthogonally(gram / unit, b / unit, count=min(self.keep, len(b)), ridge=self.ridge)
        if solution.status is not Status.OPTIMAL:
            return replace(unweighted(rows), fallback=solution.status.value)
        return weighted(rows, np.maximum(solution.value, 0.0), scale=1.0, normalise=True)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """``keep`` candidates drawn at random, weight 1 each: the baseline that always runs. Only those are computed."""

    name: ClassVar[str] = "uniform"
    keeps_all: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs()
    keep: int = 8  # candidates kept
    oversample: int = 4  # candidates looked at per candidate kept
    cold_start: int = 0  # uniform updates before the method starts

    def __post_init__(self) -> None:
        check_settings(self)

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the candidates given: the draw happened before they were computed."""
        return everything(len(evidence.alignments))


@dataclass(frozen=True, kw_only=True)
class Full:
    """Plain training on all ``keep · oversample`` candidates, weight 1 each."""

    name: ClassVar[str] = "full"
    keeps_all: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()
    keep: int = 8  # an update is of all keep x oversample candidates
    oversample: int = 4  # 1 for updates of keep rows
    cold_start: int = 0  # of no effect: all candidates are taken from the first update on

    def __post_init__(self) -> None:
        check_settings(self)

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for all."""
        return everything(len(evidence.alignments))


@dataclass(frozen=True, kw_only=True)
class TargetOnly:
    """Train on the target rows themselves: a warning, not a method. A small target is memorised."""

    name: ClassVar[str] = "target-only"
    keeps_all: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(target_only=True)
    keep: int = 8  # keep x oversample candidates count as seen by an update; none of them is used
    oversample: int = 4  # as for keep
    cold_start: int = 0  # of no effect: the target is all there is from the first update on

    def __post_init__(self) -> None:
        check_settings(self)

    def choose(self, evidence: Evidence) -> Choice:
        """No candidate."""
        return unweighted(np.zeros(0, dtype=np.int64))
