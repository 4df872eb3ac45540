"""Choose and weight candidates inside the training loop, by the optimizer's own state."""

from __future__ import annotations

from tamis.online.baselines import Full, GradMatch, Greats, Less, TargetOnly, TracIn, Uniform
from tamis.online.lookahead import Lookahead
from tamis.online.scorers import METHODS, Anchored, FilterThenWeight, Tilt
from tamis.online.settings import StepSettings

__all__ = [
    "METHODS",
    "Anchored",
    "FilterThenWeight",
    "Full",
    "GradMatch",
    "Greats",
    "Less",
    "Lookahead",
    "StepSettings",
    "TargetOnly",
    "Tilt",
    "TracIn",
    "Uniform",
]
