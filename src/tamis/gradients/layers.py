"""One short function per quantity of a linear layer, from its inputs and output gradients; no model, no hooks.

The layer's per-sample gradient is ``grad_out_b^T act_b``, summed over all positions, ``(O, I)``. A trainable bias is
one more column, whose input is 1. Half-precision factors are assembled in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "assembly_dtype",
    "inner_products",
    "per_sample_gradient",
    "project_side",
    "weighted_gradient",
    "with_bias_column",
]


def assembly_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 factors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_bias_column(act: Float[Tensor, "B T I"], *, has_bias: bool) -> Float[Tensor, "B T I2"]:
    """The layer's input with the constant 1 that its bias multiplies."""
    return torch.cat([act, act.new_ones(*act.shape[:2], 1)], dim=2) if has_bias else act


def per_sample_gradient(
    act: Float[Tensor, "B T I"], grad_out: Float[Tensor, "B T O"], *, has_bias: bool
) -> Float[Tensor, "B O I2"]:
    """``einsum("bto,bti->boi", grad_out, act)``, in float32 at least."""
    grads = _matmul(grad_out.mT, act)
    if has_bias:
        bias = grad_out.sum(dim=1, dtype=grads.dtype)  # (B, O)
        grads = torch.cat([grads, bias[:, :, None]], dim=2)
    return grads


def weighted_gradient(
    act: Float[Tensor, "B T I"],
    grad_out: Float[Tensor, "B T O"],
    example_weights: Float[Tensor, " B"] | None,
    *,
    has_bias: bool,
) -> Float[Tensor, "O I2"]:
    """``sum_b w_b grad_out_b^T act_b``: one weight-gradient matmul over the whole batch; None for weights 1."""
    dtype = assembly_dtype(grad_out.dtype)
    if example_weights is None:
        weighted = grad_out.to(dtype)
    else:  # one kernel, which converts as it multiplies
        weighted = grad_out * example_weights.to(grad_out.device, dtype)[:, None, None]
    weighted = weighted.flatten(0, 1)  # (B*T, O)
    grad = weighted.T @ act.flatten(0, 1).to(dtype)
    if has_bias:
        grad = torch.cat([grad, weighted.sum(dim=0)[:, None]], dim=1)
    return grad


def project_side(
    x: Float[Tensor, "B T F"], side: Float[Tensor, "F2 K"] | None, *, has_bias: bool
) -> Float[Tensor, "B T K2"]:
    """``x @ side``, where ``side`` has one row more than ``x`` has features if a constant 1 belongs to them.

    None stands for the identity.
    """
    if side is None:
        return with_bias_column(x, has_bias=has_bias)
    if not has_bias:
        return x @ side
    return torch.addmm(side[-1], x.flatten(0, 1), side[:-1]).view(*x.shape[:2], side.shape[1])


def inner_products(x: Float[Tensor, "B N"], directions: Float[Tensor, "J N"]) -> Float[Tensor, "B J"]:
    """``<x_b, d_j>`` of long rows, block by block: one running float32 sum over millions of products is off by 1e-4.

    Also faster than one matmul of long rows.
    """
    blocks = x.shape[1] // _BLOCK
    whole = blocks * _BLOCK
    left = x[:, :whole].view(x.shape[0], blocks, _BLOCK).transpose(0, 1)  # (blocks, B, n)
    right = directions[:, :whole].view(directions.shape[0], blocks, _BLOCK).permute(1, 2, 0)  # (blocks, n, J)
    return torch.bmm(left, right).sum(dim=0) + x[:, whole:] @ directions[:, whole:].T


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Batched product in float32 at least."""
    dtype = assembly_dtype(left.dtype)
    if left.dtype == dtype:
        return torch.bmm(left, right)
    if (
        left.is_cuda and _HAS_OUT_DTYPE and torch.version.cuda is not None
    ):  # half-precision tensor cores with float32 accumulation and result
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


_BLOCK = 8192  # numbers that one running sum may have
_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
