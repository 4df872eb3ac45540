"""What every solver returns: a value, how it ended, and the numbers that say how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

__all__ = ["Solution", "Status"]

V = TypeVar("V")


class Status(Enum):
    """How a solver ended, in sentences for the report that say what to try next."""

    OPTIMAL = "optimal to the stated tolerance, as its certificate shows"
    INACCURATE = (
        "stopped short of the wanted accuracy: the gap bounds what is missing; a larger lambda or float64 gets closer"
    )
    SINGULAR = "the Gram matrix is singular on the set solved on; add a ridge"
    INDEFINITE = "the Gram matrix is not positive semi-definite; symmetrise it and add a ridge"
    MAX_STEPS = "stopped at the step limit before the optimum; raise the limit or add a ridge"
    TIED = "rows tie at the budget, so no lambda leaves exactly that many: the tied rows were not told apart"
    TIES_BROKEN = "rows tie at the budget: the first of them by index were kept, the others left out"
    COUNT_MISSED = "no lambda tried leaves exactly the wanted number of weights: the largest weights were kept"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Solution(Generic[V]):
    """The answer of a solver: the optimum if ``status`` is ``OPTIMAL``, else the best point found.

    ``stats`` holds plain numbers under the names that the solver's docstring lists, its certificate among them: a
    ``gap`` bounds what the objective misses, a ``residual`` is the largest violation of the optimality conditions.
    """

    value: V
    status: Status
    stats: Mapping[str, float | int | str]
