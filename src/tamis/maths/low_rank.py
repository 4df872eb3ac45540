"""A matrix as the product of two narrow ones, for inner products with gradients that are never formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LowRank", "cut_to_rank", "cutting_pays"]


@dataclass(frozen=True)
class LowRank:
    """``left right^T``."""

    left: Float[Tensor, "O K"]
    right: Float[Tensor, "I K"]

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """Both factors, elsewhere."""
        return LowRank(self.left.to(device, dtype), self.right.to(device, dtype))

    def whole(self) -> Float[Tensor, "O I"]:
        """The product."""
        return self.left @ self.right.T

    def rows(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T I"]:
        """Rows of the product."""
        return self.left[ids] @ self.right.T


def cutting_pays(shape: tuple[int, int], rank: int) -> bool:
    """Whether products with the narrow matrices take at most half of the operations."""
    outs, ins = shape
    return 2 * rank * (outs + ins) <= outs * ins


def cut_to_rank(matrix: Float[Tensor, "O I"], rank: int, *, seed: int) -> LowRank:
    """The matrix projected onto ``rank`` directions that hold nearly as much of it as its leading singular vectors.

    Randomized subspace iteration with one power step (Halko, Martinsson, Tropp 2011, algorithm 4.4): four products with
    the matrix, of ``rank`` columns each. What is left out is orthogonal to what is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64).to(matrix)
    left = torch.linalg.qr(matrix @ start).Q
    right = torch.linalg.qr(matrix.T @ left).Q
    left = torch.linalg.qr(matrix @ right).Q
    return LowRank(left, matrix.T @ left)
