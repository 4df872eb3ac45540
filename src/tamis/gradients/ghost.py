"""Inner products and norms of per-sample gradients, in whichever order needs fewer operations.

*Direct* forms ``grad_out_b^T act_b`` a few samples at a time and reads it; *factored* never forms it: dots as
``<g, a M^T>``, norms as ``<g g^T, a a^T>`` over pairs of positions. Both give the same numbers; the choice is by
:func:`direct_is_cheaper`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.gradients.layers import assembly_dtype, inner_products, per_sample_gradient, with_bias_column
from tamis.maths.similarity import squared_norms

__all__ = ["alignments", "direct_alignments", "direct_is_cheaper", "factored_alignments"]

_READ_COST = 4  # one pass over a number in memory costs about as much as this many multiply-adds
_CHUNK = 1 << 23  # gradient entries formed at once: 32 MB of float32


def direct_is_cheaper(*, tokens: int, out_features: int, in_features: int, directions: int, norms: bool) -> bool:
    """Whether to form the per-sample gradient, by operations per sample (FTW Table 1, plus reading what is formed)."""
    size = out_features * in_features
    direct = tokens * size + _READ_COST * size * (1 + directions + norms)
    dots = directions * (tokens * size + _READ_COST * tokens * out_features)
    pairs = tokens**2 * (out_features + in_features + _READ_COST) if norms else 0
    return direct <= dots + pairs


def alignments(
    act: Float[Tensor, "B T I"],
    grad_out: Float[Tensor, "B T O"],
    directions: Float[Tensor, "J O I2"] | None,
    *,
    has_bias: bool,
    norms: bool,
) -> tuple[Float[Tensor, "B J"] | None, Float[Tensor, " B"] | None]:
    """``(<G_b, M_j>, ||G_b||^2)`` of the layer's per-sample gradients ``G_b``, by the cheaper order."""
    direct = direct_is_cheaper(
        tokens=act.shape[1],
        out_features=grad_out.shape[2],
        in_features=act.shape[2] + int(has_bias),
        directions=0 if directions is None else len(directions),
        norms=norms,
    )
    chosen = direct_alignments if direct else factored_alignments
    return chosen(act, grad_out, directions, has_bias=has_bias, norms=norms)


def direct_alignments(
    act: Float[Tensor, "B T I"],
    grad_out: Float[Tensor, "B T O"],
    directions: Float[Tensor, "J O I2"] | None,
    *,
    has_bias: bool,
    norms: bool,
) -> tuple[Float[Tensor, "B J"] | None, Float[Tensor, " B"] | None]:
    """The gradients of a few samples at a time, then their products."""
    rows = max(1, _CHUNK // (grad_out.shape[2] * (act.shape[2] + int(has_bias))))
    flat = None if directions is None else directions.flatten(1).to(assembly_dtype(act.dtype))  # (J, O*I2)
    dots, squares = [], []
    for a, g in zip(torch.split(act, rows), torch.split(grad_out, rows), strict=True):
        grads = per_sample_gradient(a, g, has_bias=has_bias).flatten(1)  # (b, O*I2)
        if flat is not None:
            dots.append(inner_products(grads, flat))
        if norms:
            squares.append(squared_norms(grads))
    return torch.cat(dots) if dots else None, torch.cat(squares) if squares else None


def factored_alignments(
    act: Float[Tensor, "B T I"],
    grad_out: Float[Tensor, "B T O"],
    directions: Float[Tensor, "J O I2"] | None,
    *,
    has_bias: bool,
    norms: bool,
) -> tuple[Float[Tensor, "B J"] | None, Float[Tensor, " B"] | None]:
    """The same numbers without any ``(O, I)`` gradient."""
    dtype = assembly_dtype(act.dtype)
    a, g = with_bias_column(act, has_bias=has_bias).to(dtype), grad_out.to(dtype)
    dots = None
    if directions is not None:
        dots = torch.stack([((a @ m.T.to(dtype)) * g).sum(dim=(1, 2)) for m in directions], dim=1)
    squares = (torch.bmm(g, g.mT) * torch.bmm(a, a.mT)).sum(dim=(1, 2)) if norms else None
    return dots, squares
