"""Choose and weight candidates inside the training loop, by the optimizer's own state."""

from __future__ import annotations

from tamis.online.methods import METHODS
from tamis.online.methods.baselines import Full, GradMatch, Greats, Less, TargetOnly, TracIn, Uniform
from tamis.online.methods.filter_then_weight import FilterThenWeight
from tamis.online.methods.lookahead import Lookahead
from tamis.online.methods.tilt import Anchored, Tilt
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
