"""The second-order term of the robust weights, ``Q``: dense, or low-rank and never formed.

What a solver needs of it is a product ``Q w`` and a solve with ``R_BB = Q_BB + λ I`` on a set B of free rows. The
learning rate η is part of ``Q`` here: the objective is ``-p·w + w·Qw/2 + λ w·w/2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tamis.errors import InvalidInput, InvalidSettings

__all__ = [
    "DenseQuadratic",
    "LandmarkRoot",
    "LowRankQuadratic",
    "landmark_root",
]

# Rows of U multiplied at once: bounds the copies of gathered rows, and float32 sums within one product stay short.
_BLOCK_ROWS = 16384
# Eigenvalues below this share of the largest are rounding, not curvature.
_RANK_CUTOFF = 1e-12


class DenseQuadratic:
    """``Q`` given as an (n, n) matrix that fits in memory; only its symmetric part acts.

    Raises:
        InvalidInput: the matrix is not square or not finite.
    """

    def __init__(self, q: Float[Tensor, "N N2"]) -> None:
        if q.shape[0] != q.shape[1]:
            raise InvalidInput(f"Q must be square, got {q.shape[0]} x {q.shape[1]}")
        _check_finite(q, "Q")
        self.q = (q + q.T) / 2
        self.size = q.shape[0]
        self.dtype, self.device = q.dtype, q.device

    @property
    def mean_diagonal(self) -> float:
        """Mean of the diagonal of ``Q``: the scale that λ has to be seen against."""
        return float(self.q.diagonal().double().mean())

    def apply(self, w: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """``Q w``."""
        return self.q @ w

    def solve(self, free: Bool[Tensor, " N"], rhs: Float[Tensor, "B M"], lam: float) -> Float[Tensor, "B M"]:
        """``(Q_BB + λ I)^{-1} rhs`` for the rows B where ``free`` is true.

        Raises:
            InvalidInput: the matrix is not positive definite.
        """
        rows = free.nonzero()[:, 0]
        matrix = self.q[rows][:, rows].double()
        matrix.diagonal().add_(lam)
        return _solve_symmetric(matrix, rhs.double(), positive=True).to(rhs.dtype)


class LowRankQuadratic:
    """``Q = U S U^T`` with U (n, r) and S diagonal with entries ±1 (all +1 if ``signs`` is None); never n × n.

    Solves are Woodbury's: ``R_BB^{-1} x = (x - U_B (λS + U_B^T U_B)^{-1} U_B^T x) / λ``, or direct where |B| <= r, both
    with one step of refinement. One costs ``2 |B| r²``, of which the Gram matrix ``U_B^T U_B`` is kept and changed by
    the rows that came and went. Vectors and products have the dtype of ``U``; the r × r part is float64.

    Raises:
        InvalidInput: ``signs`` does not fit, or ``U`` is not finite.
    """

    def __init__(self, u: Float[Tensor, "N R"], signs: Float[Tensor, " R2"] | None = None) -> None:
        if signs is not None and (signs.shape[0] != u.shape[1] or bool((signs.abs() != 1).any())):
            raise InvalidInput(f"signs must be {u.shape[1]} numbers, each 1 or -1, one for every column of U")
        _check_finite(u, "U")
        self.u = u
        self.signs = None if signs is None or bool((signs == 1).all()) else signs.to(u.dtype)
        self.size = u.shape[0]
        self.dtype, self.device = u.dtype, u.device
        self._gram = torch.zeros(u.shape[1], u.shape[1], dtype=torch.float64, device=u.device)
        self._gram_rows = torch.zeros(u.shape[0], dtype=torch.bool, device=u.device)

    @property
    def mean_diagonal(self) -> float:
        """Mean of the diagonal of ``Q``: the scale that λ has to be seen against."""
        squares = torch.stack(
            [part.square().sum(0, dtype=torch.float64) for part in torch.split(self.u, _BLOCK_ROWS)]
        ).sum(0)
        return float(self._signed(squares).sum()) / self.size

    def apply(self, w: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """``Q w``."""
        return self.u @ self._signed(self.u.T @ w)

    def solve(self, free: Bool[Tensor, " N"], rhs: Float[Tensor, "B M"], lam: float) -> Float[Tensor, "B M"]:
        """``(Q_BB + λ I)^{-1} rhs`` for the rows B where ``free`` is true; λ > 0.

        Raises:
            InvalidInput: the matrix is not positive definite.
        """
        rows = free.nonzero()[:, 0]
        u = self.u if len(rows) == self.size else self.u[rows]
        if len(rows) <= u.shape[1]:
            matrix = ((u if self.signs is None else u * self.signs) @ u.T).double()
            matrix.diagonal().add_(lam)
            factor = _factor(matrix, positive=True)

            def inverse(x: Tensor) -> Tensor:
                return _resolve(factor, x.double()).to(x.dtype)
        else:
            inner = self._gram_of(free, rows)
            diagonal = torch.full_like(inner[0], lam) if self.signs is None else self.signs.double() * lam
            factor = _factor(inner + diagonal.diag(), positive=self.signs is None)

            def inverse(x: Tensor) -> Tensor:
                return (x - u @ _resolve(factor, (u.T @ x).double()).to(x.dtype)) / lam

        solution = inverse(rhs)
        residual = rhs - lam * solution - u @ self._signed((u.T @ solution).T).T
        return solution + inverse(residual)

    def _signed(self, x: Tensor) -> Tensor:
        return x if self.signs is None else x * self.signs

    def _gram_of(self, free: Tensor, rows: Tensor) -> Tensor:
        """``U_B^T U_B`` in float64, from that of the last B by the rows that differ where they are fewer."""
        added = (free & ~self._gram_rows).nonzero()[:, 0]
        removed = (self._gram_rows & ~free).nonzero()[:, 0]
        # Taking away more than what stays would leave the rounding of the larger matrix in the smaller one.
        if len(added) + len(removed) < len(rows) and 2 * len(removed) <= len(rows):
            gram = self._gram + self.gram(added) - self.gram(removed)
        else:
            gram = self.gram(rows)
        self._gram, self._gram_rows = gram, free.clone()
        return gram

    def gram(self, rows: Int[Tensor, " B"]) -> Float[Tensor, "R R"]:
        """``U_B^T U_B`` in float64 for row numbers B; products within a block are in the dtype of ``U``."""
        gram = torch.zeros(self.u.shape[1], self.u.shape[1], dtype=torch.float64, device=self.device)
        whole = len(rows) == self.size
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = self.u[start : start + _BLOCK_ROWS] if whole else self.u[rows[start : start + _BLOCK_ROWS]]
            gram += part.T @ part
        return gram


@dataclass(frozen=True, kw_only=True)
class LandmarkRoot:
    """``η Q̂ = U U^T`` with ``U = C @ root``: what landmarks pass on to every row through coefficients C (n, ℓ)."""

    root: Float[Tensor, "L R"]
    clipped_share: float  # Σ|clipped eigenvalues| / Σ|eigenvalues| of Q_L


def landmark_root(q_landmarks: Float[Tensor, "L L2"], *, eta: float, pool_size: int) -> LandmarkRoot:
    """A root of ``η (ℓ/n) Q_L``, so that no more than (n, rank) numbers are ever needed for the pool's Q.

    Equation 11 of Influence Distillation: ``Q̂ = (ℓ/n) C Q_L C^T`` with ``Q_L = (1/ℓ) G_L H_T G_L^T = V E V^T``; then
    ``root = √(ηℓ/n) V E^{1/2}``, eigenvalues that are not positive left out: a network's Hessian is indefinite, and its
    negative part has no minimum within the reach of the expansion. ``U = C root`` is kernel ridge regression with the
    rows of ``root`` as the landmarks' values: stream it like scores.

    Args:
        q_landmarks: Q_L; only its symmetric part acts.
        eta: the learning rate η, >= 0.
        pool_size: n.

    Raises:
        InvalidInput: the matrix is not square or not finite.
        InvalidSettings: η is negative.
    """
    if not 0 <= eta < float("inf"):
        raise InvalidSettings(f"the learning rate eta must be 0 or more, got {eta}")
    landmarks = q_landmarks.shape[0]
    if q_landmarks.shape[1] != landmarks:
        raise InvalidInput(f"Q of {landmarks} landmarks must be square, got {landmarks} x {q_landmarks.shape[1]}")
    _check_finite(q_landmarks, "Q")
    values, vectors = torch.linalg.eigh(((q_landmarks + q_landmarks.T) / 2).double())
    kept = values > _RANK_CUTOFF * values.abs().max()
    roots = values[kept].sqrt() * (eta * landmarks / pool_size) ** 0.5
    return LandmarkRoot(
        root=(vectors[:, kept] * roots).to(q_landmarks.dtype),
        clipped_share=_negative_share(values),
    )


def _negative_share(values: Tensor) -> float:
    total = float(values.abs().sum())
    # A negative eigenvalue of rounding size is no curvature.
    negative = values[values < -_RANK_CUTOFF * values.abs().max()]
    return float(negative.abs().sum()) / total if total > 0 else 0.0


def _check_finite(matrix: Tensor, name: str) -> None:
    # In blocks: a sum in another dtype would copy all of U.
    if not all(bool(torch.isfinite(part).all()) for part in torch.split(matrix, _BLOCK_ROWS)):
        raise InvalidInput(f"{name} of the second-order term has entries that are NaN or infinite; leave such rows out")


def _factor(matrix: Tensor, *, positive: bool) -> tuple[Tensor, Tensor | None]:
    """Cholesky factor, or LU with pivots where the matrix need not be positive definite."""
    if not positive:
        lu, pivots = torch.linalg.lu_factor(matrix)
        return lu, pivots
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise InvalidInput(
            "the weights' problem is not convex on its free rows (Cholesky failed): clip the negative eigenvalues of "
            "Q, or take a larger lambda"
        )
    return factor, None


def _resolve(factor: tuple[Tensor, Tensor | None], rhs: Tensor) -> Tensor:
    matrix, pivots = factor
    solution: Tensor = (
        torch.cholesky_solve(rhs, matrix) if pivots is None else torch.linalg.lu_solve(matrix, pivots, rhs)
    )
    return solution


def _solve_symmetric(matrix: Tensor, rhs: Tensor, *, positive: bool) -> Tensor:
    return _resolve(_factor(matrix, positive=positive), rhs)
