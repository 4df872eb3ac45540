"""Inner products and cosines of rows, in blocks, accumulated in float32 at least and never NaN."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["cosines", "inner_products", "row_norms", "squared_norms", "unit_rows", "zero_rows"]

# Columns of both sides multiplied at once. Bounds the copies of half-precision inputs, and the running float32 sums of
# a matmul: over 10 million products they are off by 2e-4, block by block by 2e-6.
_BLOCK_COLUMNS = 1 << 16
_BLOCK_SQUARES = 8192  # squares that one running sum may have


def inner_products(x: Float[Tensor, "N K"], y: Float[Tensor, "M K"]) -> Float[Tensor, "N M"]:
    """``x @ y^T``: entry (i, j) is the inner product of row i of ``x`` and row j of ``y``.

    Half-precision inputs are multiplied and summed in float32 (float64 inputs in float64). With gradients as rows a
    positive entry means that a small gradient step on the one lowers the loss of the other.

    Raises:
        ValueError: the rows differ in length.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"rows must have one length, got {x.shape[1]} and {y.shape[1]}; were they projected alike?")
    dtype = _accumulation_dtype(x, y)
    if x.dtype == y.dtype == dtype and x.shape[1] <= _BLOCK_COLUMNS:
        return x @ y.T
    products = torch.zeros(x.shape[0], y.shape[0], dtype=dtype, device=x.device)
    for start in range(0, x.shape[1], _BLOCK_COLUMNS):
        columns = slice(start, start + _BLOCK_COLUMNS)
        products.addmm_(x[:, columns].to(dtype), y[:, columns].to(dtype).T)
    return products


def cosines(x: Float[Tensor, "N K"], y: Float[Tensor, "M K"]) -> Float[Tensor, "N M"]:
    """Cosine of row i of ``x`` and row j of ``y``, in [-1, 1].

    A row of zeros has no direction: its cosines are 0 here, never NaN. Find such rows with ``zero_rows`` and leave
    them out; 0 would otherwise rank them above every row with a negative score.

    Raises:
        ValueError: the rows differ in length.
    """
    return inner_products(unit_rows(x), unit_rows(y)).clamp_(-1, 1)


def unit_rows(x: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Rows scaled to norm 1, in float32 at least; rows of zeros stay zeros.

    Neither very small nor very large rows lose their direction: each is scaled by its largest entry first, whose
    square might otherwise underflow or overflow.
    """
    scaled, largest = _scaled(x)
    norms = squared_norms(scaled).sqrt()[:, None]
    return scaled.div_(torch.where(largest > 0, norms, torch.ones_like(norms)))


def row_norms(x: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Euclidean norm of every row, in float32 at least, without underflow or overflow of the squares."""
    scaled, largest = _scaled(x)
    return squared_norms(scaled).sqrt() * largest[:, 0]


def squared_norms(x: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """``||x_i||^2`` of long rows, in one reading and without a copy.

    Blocks are summed apart and their sums added pairwise: one running float32 sum over millions of squares, which is
    what a norm over the whole row does, is off by 1e-4 to 1e-3.
    """
    count = x.shape[1] // _BLOCK_SQUARES
    whole = count * _BLOCK_SQUARES
    blocks = x[:, :whole].view(x.shape[0], count, _BLOCK_SQUARES)
    squares: Tensor = torch.linalg.vector_norm(blocks, dim=2).square().sum(dim=1)
    rest: Tensor = torch.linalg.vector_norm(x[:, whole:], dim=1).square()
    return squares + rest


def zero_rows(x: Float[Tensor, "N K"]) -> Bool[Tensor, " N"]:
    """True where a row is zero throughout: an example without a gradient, to be listed and left out."""
    return ~x.any(dim=1)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest absolute entry, and those entries (N, 1), 0 for rows of zeros."""
    x = x.to(_accumulation_dtype(x))
    if x.shape[1] == 0:
        return x.clone(), x.new_zeros(x.shape[0], 1)
    largest = x.abs().amax(dim=1, keepdim=True)
    return x / torch.where(largest > 0, largest, torch.ones_like(largest)), largest


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
