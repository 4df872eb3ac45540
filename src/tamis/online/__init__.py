"""Choose and weight candidates inside the training loop, by the optimizer's own state."""

from __future__ import annotations

from tamis.online.scorers import (
    METHODS,
    Anchored,
    FilterThenWeight,
    Full,
    GradMatch,
    Greats,
    Less,
    TargetOnly,
    Tilt,
    TracIn,
    Uniform,
)
from tamis.online.step import StepSettings

__all__ = [
    "METHODS",
    "Anchored",
    "FilterThenWeight",
    "Full",
    "GradMatch",
    "Greats",
    "Less",
    "StepSettings",
    "TargetOnly",
    "Tilt",
    "TracIn",
    "Uniform",
]
