"""What one online step proposes: a gradient, and how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tamis.online.methods.choice import Choice, Vector
from tamis.types import IntArray

__all__ = ["Proposal"]


def _none() -> IntArray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The gradient of a step and how it came about. Candidates of all processes are counted through.

    ``gradient / divisor``, both summed over processes (and over the steps of an accumulation), is the update's
    gradient: ``sum_i w_i grad l_i / sum_i w_i``, each ``w_i`` times the row's supervised tokens for ``"tokens"``.
    """

    gradient: dict[str, Tensor]  # this process's part of the numerator, by parameter name
    divisor: float  # of all processes
    choice: Choice
    losses: Vector  # (n,) mean cross-entropy; NaN for candidates that the trained model was not run on
    tokens: IntArray  # (n,) supervised tokens
    alignments: Vector | None = None  # (n,) b; NaN for candidates left out; None if nothing was aligned
    dropped: IntArray = field(default_factory=_none)  # candidates whose loss or gradient was not finite
    target_loss: float | None = None  # mean over the target rows, before the update; None if they were not run now
    target_gradient: dict[str, Tensor] | None = None  # mean over the target rows of all processes, of this look alone
    cold: bool = False  # a uniform choice, because the method has not started yet
    scored: int = 0  # candidates of all processes whose alignments were measured for this choice
    by_source: bool = False  # alignments are those of the candidates' sources
    held_bytes: int = 0  # this process's candidates' gradients while the choice was made, at most
    score_age: int = 0  # choices since the candidates were scored
    target_age: int = 0  # choices since the target was looked at
