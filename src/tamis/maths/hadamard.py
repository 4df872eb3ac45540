"""The Walsh-Hadamard transform, without ever forming its matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["fwht", "hadamard_matrix"]

# Largest Kronecker factor, as a power of two. Every factor is a pass over memory: butterflies make one for each bit and
# have little to do in it, two large factors make two and do far more than they must; 32 lies between.
_MAX_FACTOR_BITS = 5


def hadamard_matrix(size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Float[Tensor, "N N"]:
    """The ±1 matrix of Sylvester's construction, ``H[i, j] = (-1)^popcount(i & j)``, unnormalised.

    Raises:
        ValueError: ``size`` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Sylvester matrix has a power of two rows, got {size}")
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def fwht(x: Float[Tensor, "*B N"], *, overwrite: bool = False) -> Float[Tensor, "*B N"]:
    """``x @ H`` along the last axis, ``H`` the unnormalised ±1 Sylvester matrix of size ``N``.

    ``H_N`` is the Kronecker product of small Sylvester matrices, ``H_N = H_f1 (x) H_f2 (x) ...``; each factor is one
    matrix product over the fitting view of the data, without transposes. ``fwht(fwht(x)) == N * x``, and
    ``fwht(x) / sqrt(N)`` is orthogonal.

    Args:
        x: float32 or float64; on CUDA, TF32 must be off (PyTorch's default) for float32 precision.
        overwrite: use the memory of ``x`` (which must be contiguous) as one of the two buffers of ``x``'s size; its
            content is then lost. Otherwise a third one is taken.

    Raises:
        ValueError: ``N`` is not a power of two, the dtype is not float32 or float64, or ``overwrite`` is asked for a
            tensor that is not contiguous.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"the last axis must be a power of two long, got {size}; pad with zeros")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the transform needs float32 or float64, got {x.dtype}")
    if overwrite and not x.is_contiguous():
        raise ValueError("overwrite=True needs a contiguous tensor")
    source = x if overwrite else x.clone(memory_format=torch.contiguous_format)
    target = torch.empty_like(source)
    if source.numel() == 0:
        return source
    right = 1  # entries that belong to the factors already done; they vary fastest
    for factor in _factors(size):
        h = hadamard_matrix(factor, dtype=x.dtype, device=x.device)
        if right == 1:
            torch.mm(source.view(-1, factor), h, out=target.view(-1, factor))
        else:
            blocks = source.view(-1, factor, right)
            torch.bmm(h.expand(blocks.shape[0], factor, factor), blocks, out=target.view(-1, factor, right))
        source, target = target, source
        right *= factor
    return source


def _factors(size: int) -> list[int]:
    """Powers of two of nearly equal size, at most 32 each, whose product is ``size``."""
    bits = size.bit_length() - 1
    count = -(-bits // _MAX_FACTOR_BITS)
    return [2 ** (bits // count + (index < bits % count)) for index in range(count)]
