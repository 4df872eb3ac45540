"""What a solver returns: the value, how far it may be trusted, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

__all__ = ["Solution", "Status"]

V = TypeVar("V")


class Status(Enum):
    """How a solver ended, as a sentence for the report."""

    OPTIMAL = "optimal, certified by its gap"
    INACCURATE = (
        "stopped short of the wanted accuracy: the gap bounds what is missing; a larger lambda or float64 gets closer"
    )
    TIED = "rows tie at the budget, so no lambda leaves exactly that many: the tied rows were not told apart"
    TIES_BROKEN = "rows tie at the budget: the first of them by index were kept, the others left out"
    COUNT_MISSED = "no lambda tried leaves exactly the wanted number of weights: the largest weights were kept"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Solution(Generic[V]):
    """The answer of a solver; ``stats`` holds plain numbers under the names its docstring lists."""

    value: V
    status: Status
    stats: Mapping[str, float | int | str]
