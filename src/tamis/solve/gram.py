"""Problems given by inner products alone: a Gram matrix and a vector, checked once for all solvers that take them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tamis.errors import InvalidInput, NonFinite

__all__ = ["Vector", "as_gram"]

Vector = npt.NDArray[np.float64]


def as_gram(gram: npt.ArrayLike, target: npt.ArrayLike) -> tuple[Vector, Vector]:
    """Both in float64, the matrix made symmetric: projections and half precision leave it slightly off.

    Raises:
        InvalidInput: the shapes do not fit.
        NonFinite: a number is NaN or infinite.
    """
    matrix, vector = np.asarray(gram, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if vector.ndim != 1 or matrix.shape != (len(vector), len(vector)):
        raise InvalidInput(f"expected a Gram matrix (n, n) and a vector (n,), got {matrix.shape} and {vector.shape}")
    if not (np.isfinite(matrix).all() and np.isfinite(vector).all()):
        raise NonFinite("the Gram matrix or the vector holds NaN or infinity; drop those candidates first")
    return (matrix + matrix.T) / 2, vector
