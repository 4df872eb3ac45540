"""What every solver returns: a value, how it ended, and how well the conditions of an optimum hold."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

__all__ = ["Solution", "Status", "Vector", "as_gram"]

Vector = npt.NDArray[np.float64]


class Status(Enum):
    """How a solver ended, in sentences that say what to try next."""

    SOLVED = "solved to the stated tolerance"
    SINGULAR = "the Gram matrix is singular on the set solved on; add a ridge"
    INDEFINITE = "the Gram matrix is not positive semi-definite; symmetrise it and add a ridge"
    MAX_STEPS = "stopped at the step limit before the optimum; raise the limit or add a ridge"


@dataclass(frozen=True, kw_only=True)
class Solution:
    """``value`` is usable if ``status`` is ``SOLVED``; otherwise it is the best point found."""

    value: Vector
    status: Status
    residual: float  # largest violation of the optimality conditions, in units of the linear term
    steps: int


def as_gram(gram: npt.ArrayLike, target: npt.ArrayLike) -> tuple[Vector, Vector]:
    """Both in float64, the matrix made symmetric: projections and half precision leave it slightly off.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """
    matrix, vector = np.asarray(gram, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if vector.ndim != 1 or matrix.shape != (len(vector), len(vector)):
        raise ValueError(f"expected a Gram matrix (n, n) and a vector (n,), got {matrix.shape} and {vector.shape}")
    if not (np.isfinite(matrix).all() and np.isfinite(vector).all()):
        raise ValueError("the Gram matrix or the vector holds NaN or infinity; drop those candidates first")
    return (matrix + matrix.T) / 2, vector
