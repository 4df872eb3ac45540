"""The best low-rank factors of a matrix where errors count by direction, and the gauge in which they are trained.

After *IProX* (2026, section 4.1): ``S = C_d^{1/2} W C_h^{1/2} = U s V^T`` and, of rank ``R``,
``A = C_d^{-1/2} U_R s_R^{1/2}``, ``B = s_R^{1/2} V_R^T C_h^{-1/2}``. ``A B`` minimises
``|C_d^{1/2} (W - A B) C_h^{1/2}|``, which is then the norm of the singular values left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.maths.moment_roots import InvertedRoot, MomentRoot
from tamis.seeds import child_seed, random_normal

__all__ = ["WeightedFactors", "balance", "weighted_svd"]

_OVERSAMPLING, _POWER_STEPS = 16, 2


@dataclass(frozen=True, kw_only=True)
class WeightedFactors:
    """Factors whose first ``r`` columns and rows are the best factors of rank ``r``, for every ``r`` up to theirs."""

    left: Tensor  # (O, R) A
    right: Tensor  # (R, I) B
    values: Tensor  # (K,) weighted singular values that are known, largest first; K >= R
    energy: float  # sum of the squares of all of them, known or not


def weighted_svd(
    weight: Float[Tensor, "O I"],
    left: MomentRoot | InvertedRoot,
    right: MomentRoot | InvertedRoot,
    *,
    rank: int,
    randomised: bool = False,
    seed: int = 0,
) -> WeightedFactors:
    """Factors of ``weight`` of rank ``rank``, not yet balanced.

    Args:
        weight: the matrix.
        left: root of the output side's second moment.
        right: root of the input side's.
        rank: columns kept.
        randomised: find the leading part by random projection with power steps in place of a whole decomposition.
        seed: of that projection.
    """
    weighted = left.times(right.times(weight.T).T)
    u, s, v = _leading(weighted, rank, seed) if randomised else _all(weighted)
    root = s[:rank].sqrt()
    return WeightedFactors(
        left=left.inverse_times(u[:, :rank] * root),
        right=right.inverse_times(v[:, :rank] * root).T,
        values=s,
        energy=float(weighted.double().square().sum()),
    )


def balance(
    left: Float[Tensor, "O R"], right: Float[Tensor, "R I"]
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """The same product with ``A^T A = B B^T``: QR of both, then the singular values of the small middle shared evenly.

    The product leaves ``A -> A M``, ``B -> M^-1 B`` free. Output gradients are tiny, so the weighting makes ``A`` huge
    and ``B`` tiny: one learning rate then wrecks ``B``, and gradients of the factors are gradients of ``B`` alone.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = s.sqrt()
    return q_left @ (u * root), (q_right @ (vh.T * root)).T


def _all(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def _leading(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """After *Finding Structure with Randomness* (Halko, Martinsson and Tropp, 2011), algorithms 4.4 and 5.1."""
    columns = matrix.shape[1]
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    numbers = random_normal(child_seed(seed, "range finder", *matrix.shape), columns * width)
    found = matrix @ torch.from_numpy(numbers).view(columns, width).to(matrix)
    for _ in range(_POWER_STEPS):  # orthonormalised in between, or the small directions drown in rounding
        found = torch.linalg.qr(found).Q
        found = matrix @ torch.linalg.qr(matrix.T @ found).Q
    basis = torch.linalg.qr(found).Q  # (O, width)
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh.T
