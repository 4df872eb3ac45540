"""From scores of a few landmarks to scores of the whole pool: kernel ridge regression, solved once, streamed.

With ``C = k(E, E_L) (k(E_L, E_L) + δI)^{-1}`` the fit is ``p̂ = C P_L``. C would have n × ℓ entries and is never formed:
``A = (K + δI)^{-1} P_L`` is solved once in float64, then ``p̂ = k(chunk, E_L) A``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput, InvalidSettings, NonFinite
from tamis.solve.kernels import EmbeddingMap, Kernel, kernel_matrix, median_squared_distance

__all__ = [
    "KernelRidge",
    "LandmarkKernel",
    "damped_cholesky",
    "fit_kernel_ridge",
    "kernel_among",
    "landmark_kernel",
    "line_fit",
    "mean_directions",
]

# Damping is raised tenfold at most so often: from 1e-12 that reaches 1e8, beyond any kernel of unit rows.
_MAX_RAISES = 20


@dataclass(frozen=True, kw_only=True)
class LandmarkKernel:
    """The factorised kernel among the landmarks: everything of a fit that does not depend on the scores."""

    transform: EmbeddingMap
    landmarks: Float[Tensor, "L E"]  # through the map
    kernel: Kernel
    median: float
    damping: float  # δ used
    times_raised: int  # by a factor of ten each, because the Cholesky factorisation failed
    factor: Float[Tensor, "L L"]  # of K + δI, float64


@dataclass(frozen=True, kw_only=True)
class KernelRidge:
    """Fitted scores. With a direct part: ``p̂ = b0 + b1 s + k(x, E_L) A``, ``s = <x, mean target embedding>``."""

    basis: LandmarkKernel
    scores: Float[Tensor, "L M"]  # exact, of the landmarks
    coefficients: Float[Tensor, "L M"]  # A, float64
    directions: Float[Tensor, "M E"] | None = None  # mean target embeddings, through the map
    intercepts: Float[Tensor, " M"] | None = None  # b0
    slopes: Float[Tensor, " M"] | None = None  # b1

    def predict(self, embeddings: Float[Tensor, "N E"]) -> Float[Tensor, "N M"]:
        """Scores of raw embeddings, none of them treated as a landmark; float64 only if ``embeddings`` are."""
        x = self.basis.transform.apply(embeddings)
        kernel = kernel_matrix(x, self.basis.landmarks.to(x), self.basis.kernel, self.basis.median)
        predicted = kernel @ self.coefficients.to(x)
        if self.directions is not None and self.intercepts is not None and self.slopes is not None:
            predicted += (x @ self.directions.to(x).T) * self.slopes.to(x) + self.intercepts.to(x)
        return predicted


def landmark_kernel(
    embeddings: Float[Tensor, "L E"],
    *,
    transform: EmbeddingMap,
    kernel: Kernel,
    damping: float = 0.1,
) -> LandmarkKernel:
    """Factorise ``k(E_L, E_L) + δI`` for the raw ``embeddings`` of the landmarks, in float64.

    If the factorisation fails (copies among the landmarks and a tiny δ), δ is raised tenfold until it does not; the
    result says how often.

    Args:
        embeddings: raw, as those of the pool.
        transform: the map of the pool.
        kernel: its name and scale c.
        damping: δ > 0.

    Raises:
        InvalidInput: there are no landmarks.
        InvalidSettings: the damping is not positive.
        NonFinite: an embedding is NaN or infinite.
    """
    if len(embeddings) == 0:
        raise InvalidInput("kernel ridge regression needs at least one landmark, got none")
    mapped = transform.apply(embeddings)
    if not bool(torch.isfinite(mapped).all()):
        raise NonFinite("an embedding of a landmark is NaN or infinite; leave that row out")
    median = median_squared_distance(mapped)
    among = kernel_among(mapped, kernel, median)
    factor, used, raised = damped_cholesky(among, damping)
    return LandmarkKernel(
        transform=transform,
        landmarks=mapped,
        kernel=kernel,
        median=median,
        damping=used,
        times_raised=raised,
        factor=factor,
    )


def kernel_among(mapped: Float[Tensor, "L E"], kernel: Kernel, median: float) -> Float[Tensor, "L L"]:
    """``k(E_L, E_L)`` in float64, exactly symmetric."""
    among = kernel_matrix(mapped.double(), mapped.double(), kernel, median)
    if kernel.name != "linear":
        among.fill_diagonal_(1.0)
    return (among + among.T) / 2


def damped_cholesky(kernel: Float[Tensor, "L L"], damping: float) -> tuple[Float[Tensor, "L L"], float, int]:
    """Cholesky factor of ``K + δI`` (float64), the δ that it took, and how often δ was raised tenfold.

    Raises:
        InvalidSettings: the damping is not positive.
        NonFinite: no damping helps, since the kernel has entries that are NaN or infinite.
    """
    if not 0 < damping < float("inf"):
        raise InvalidSettings(f"damping must be a positive number, got {damping}; copies among landmarks need it")
    for raised in range(_MAX_RAISES + 1):
        damped = kernel.double().clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and bool(torch.isfinite(factor).all()):
            return factor, damping, raised
        damping *= 10
    raise NonFinite("the kernel of the landmarks cannot be factorised; its embeddings must be finite numbers")


def fit_kernel_ridge(
    basis: LandmarkKernel, scores: Float[Tensor, "L2 M"], *, directions: Float[Tensor, "M2 E"] | None = None
) -> KernelRidge:
    """Fit the landmarks' exact ``scores``, one column per target: ``A = (K + δI)^{-1} P_L``.

    With ``directions`` (``mean_directions``) in residual form: the direct score ``s = <e, mean target e>`` is scaled
    to P_L by least squares, and only what it leaves is transferred. It lifts embeddings near the gradients themselves.

    Raises:
        InvalidInput: a landmark has no row of scores, or a target no direction.
        NonFinite: a score is NaN or infinite.
    """
    if len(scores) != len(basis.landmarks):
        raise InvalidInput(f"{len(basis.landmarks)} landmarks need as many rows of scores, got {len(scores)}")
    if not bool(torch.isfinite(scores).all()):
        rows = (~torch.isfinite(scores)).any(1).nonzero()[:, 0].tolist()
        raise NonFinite(f"{len(rows)} landmarks have scores that are NaN or infinite, the first is number {rows[0]}")
    values = scores.double()
    if directions is None:
        return KernelRidge(basis=basis, scores=scores, coefficients=torch.cholesky_solve(values, basis.factor))
    if directions.shape != (scores.shape[1], basis.landmarks.shape[1]):
        raise InvalidInput(
            f"{scores.shape[1]} targets need one mean embedding of {basis.landmarks.shape[1]} numbers each, got "
            f"{directions.shape[0]} of {directions.shape[1]}; embed pool and target alike"
        )
    direct = basis.landmarks.double() @ directions.double().T
    intercepts, slopes = line_fit(direct, values)
    rest = values - intercepts - slopes * direct
    return KernelRidge(
        basis=basis,
        scores=scores,
        coefficients=torch.cholesky_solve(rest, basis.factor),
        directions=directions,
        intercepts=intercepts,
        slopes=slopes,
    )


def mean_directions(transform: EmbeddingMap, targets: Sequence[Float[Tensor, "_ E"]]) -> Float[Tensor, "M E"]:
    """Mean unit embedding of each target's raw rows, through the pool's map."""
    return torch.stack([transform.apply(rows).mean(0) for rows in targets])


def line_fit(x: Float[Tensor, "N M"], y: Float[Tensor, "N M"]) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Intercept and slope of the least-squares line of each column of ``y`` on that of ``x``; 0 if x is constant."""
    centred = x - x.mean(0)
    spread = centred.square().sum(0)
    constant = spread <= 1e-24 * x.square().sum(0)
    slopes = (centred * y).sum(0) / torch.where(constant, torch.ones_like(spread), spread)
    slopes = torch.where(constant, torch.zeros_like(slopes), slopes)
    return y.mean(0) - slopes * x.mean(0), slopes
