"""The per-sample gradients of one layer, held in the form that takes the least room, and what can be asked of them.

Three forms, one interface: the matrices themselves (small layers, long rows), the factors ``grad_out^T act`` (large
layers, short rows), and ids with the gradients of the rows looked up (tables). All answers are float32 at least.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tamis.gradients.ghost import alignments
from tamis.gradients.layers import (
    assembly_dtype,
    inner_products,
    per_sample_gradient,
    project_side,
    weighted_gradient,
    with_bias_column,
)
from tamis.maths.low_rank import LowRank

__all__ = ["Factored", "Held", "Lookups", "Materialised", "materialising_is_smaller"]


class Held(Protocol):
    """Per-sample gradients ``G_b``, each ``(O, I)``, of ``B`` rows."""

    @property
    def nbytes(self) -> int:
        """Memory held, shared tensors counted every time."""
        ...

    def dots(self, direction: Float[Tensor, "O I"] | LowRank) -> Float[Tensor, " B"]:
        """``<G_b, M>``."""
        ...

    def weighted(self, coefficients: Float[Tensor, " B"]) -> Float[Tensor, "O I"]:
        """``sum_b c_b G_b`` over the rows whose coefficient is not zero; the others are not even read."""
        ...

    def rows(self, first: int, stop: int) -> Float[Tensor, "B R I"]:
        """Rows ``first`` to ``stop`` of every ``G_b``."""
        ...

    def sketch(self, left: Float[Tensor, "O K1"] | None, right: Float[Tensor, "I K2"] | None) -> Float[Tensor, "B K"]:
        """``left^T G_b right``, flattened; None stands for the identity."""
        ...


class Materialised:
    """The matrices themselves."""

    def __init__(self, grads: Float[Tensor, "B O I"]) -> None:
        self._grads = grads

    @property
    def nbytes(self) -> int:
        """Of the matrices."""
        return self._grads.nbytes

    def dots(self, direction: Float[Tensor, "O I"] | LowRank) -> Float[Tensor, " B"]:
        """One matrix-vector product."""
        direction = direction.whole() if isinstance(direction, LowRank) else direction
        flat = direction.to(self._grads).reshape(1, -1)
        return inner_products(self._grads.flatten(1), flat)[:, 0]

    def weighted(self, coefficients: Float[Tensor, " B"]) -> Float[Tensor, "O I"]:
        """One vector-matrix product."""
        used = coefficients.nonzero()[:, 0]
        chosen = self._grads if len(used) == len(coefficients) else self._grads[used]
        total: Tensor = torch.tensordot(coefficients[used].to(chosen), chosen, dims=1)
        return total

    def rows(self, first: int, stop: int) -> Float[Tensor, "B R I"]:
        """A view."""
        return self._grads[:, first:stop]

    def sketch(self, left: Float[Tensor, "O K1"] | None, right: Float[Tensor, "I K2"] | None) -> Float[Tensor, "B K"]:
        """Projected from both sides."""
        found = self._grads
        if right is not None:
            found = found @ right.to(found)
        if left is not None:
            found = left.to(found).T @ found
        return found.flatten(1)


class Factored:
    """The factors; ``G_b = grad_out_b^T act_b``, with a column for the bias."""

    def __init__(self, act: Float[Tensor, "B T I"], grad_out: Float[Tensor, "B T O"], *, has_bias: bool) -> None:
        self.act, self.grad_out, self.has_bias = act, grad_out, has_bias

    @property
    def nbytes(self) -> int:
        """Of both factors."""
        return self.act.nbytes + self.grad_out.nbytes

    def dots(self, direction: Float[Tensor, "O I"] | LowRank) -> Float[Tensor, " B"]:
        """In the order that needs fewer operations; with a direction of low rank, ``<g L, a R>``."""
        if isinstance(direction, LowRank):
            dtype = assembly_dtype(self.act.dtype)
            low = direction.to(self.act.device, dtype)
            ins = project_side(self.act.to(dtype), low.right, has_bias=self.has_bias)  # (B, T, K)
            return ((self.grad_out.to(dtype) @ low.left) * ins).sum(dim=(1, 2))
        found, _ = alignments(
            self.act, self.grad_out, direction.to(self.act.device)[None], has_bias=self.has_bias, norms=False
        )
        assert found is not None
        return found[:, 0]

    def weighted(self, coefficients: Float[Tensor, " B"]) -> Float[Tensor, "O I"]:
        """One weight-gradient matmul over the rows used."""
        used = coefficients.nonzero()[:, 0]
        act, grad_out = self.act, self.grad_out
        if len(used) < len(coefficients):
            act, grad_out = act[used], grad_out[used]
        weights = coefficients[used]
        # A head's gradient at every position is the largest tensor of a pass: not multiplied where nothing changes.
        return weighted_gradient(act, grad_out, None if bool((weights == 1).all()) else weights, has_bias=self.has_bias)

    def rows(self, first: int, stop: int) -> Float[Tensor, "B R I"]:
        """The gradients of a few outputs."""
        return per_sample_gradient(self.act, self.grad_out[..., first:stop], has_bias=self.has_bias)

    def sketch(self, left: Float[Tensor, "O K1"] | None, right: Float[Tensor, "I K2"] | None) -> Float[Tensor, "B K"]:
        """Both factors projected, then multiplied; no gradient is formed."""
        dtype = assembly_dtype(self.act.dtype)
        act = with_bias_column(self.act, has_bias=self.has_bias).to(dtype)
        grad_out = self.grad_out.to(dtype)
        act = act if right is None else act @ right.to(act)
        grad_out = grad_out if left is None else grad_out @ left.to(grad_out)
        return per_sample_gradient(act, grad_out, has_bias=False).flatten(1)


class Lookups:
    """A table's rows used: ``G_b`` has the sum of ``grads[b, t]`` in row ``ids[b, t]``, and zeros elsewhere."""

    def __init__(self, ids: Int[Tensor, "B T"], grads: Float[Tensor, "B T I"], *, table_rows: int) -> None:
        self._ids, self._grads, self._table_rows = ids, grads, table_rows

    @property
    def nbytes(self) -> int:
        """Of ids and gradients."""
        return self._ids.nbytes + self._grads.nbytes

    def dots(self, direction: Float[Tensor, "O I"] | LowRank) -> Float[Tensor, " B"]:
        """The direction's rows that were looked up, times their gradients."""
        table = direction.to(self._grads.device, assembly_dtype(self._grads.dtype))
        looked_up = table.rows(self._ids) if isinstance(table, LowRank) else table[self._ids]  # (B, T, I)
        return (looked_up * self._grads).sum(dim=(1, 2))

    def weighted(self, coefficients: Float[Tensor, " B"]) -> Float[Tensor, "O I"]:
        """Scattered into a table of zeros."""
        used = coefficients.nonzero()[:, 0]
        ids, grads = self._ids[used], self._grads[used].to(assembly_dtype(self._grads.dtype))
        grads = grads * coefficients[used].to(grads)[:, None, None]
        table = grads.new_zeros(self._table_rows, grads.shape[2])
        return table.index_add_(0, ids.flatten(), grads.flatten(0, 1))

    def rows(self, first: int, stop: int) -> Float[Tensor, "B R I"]:
        """Scattered into a few rows per sample."""
        batch, _, width = self._grads.shape
        grads = self._grads.to(assembly_dtype(self._grads.dtype))
        found = grads.new_zeros(batch, stop - first, width)
        sample, position = ((self._ids >= first) & (self._ids < stop)).nonzero(as_tuple=True)
        at = (sample, self._ids[sample, position] - first)
        return found.index_put_(at, grads[sample, position], accumulate=True)

    def sketch(self, left: Float[Tensor, "O K1"] | None, right: Float[Tensor, "I K2"] | None) -> Float[Tensor, "B K"]:
        """As for factors, with the rows of ``left`` looked up in place of a product with one-hot ids."""
        grads = self._grads.to(assembly_dtype(self._grads.dtype))
        grads = grads if right is None else grads @ right.to(grads)
        if left is None:
            left = torch.eye(self._table_rows)  # only tables smaller than a projection stay whole
        return per_sample_gradient(grads, left.to(grads)[self._ids], has_bias=False).flatten(1)


def materialising_is_smaller(act: Float[Tensor, "B T I"], grad_out: Float[Tensor, "B T O"], *, has_bias: bool) -> bool:
    """Whether the matrices (float32 at least) take less room than the factors they are made of."""
    entries = grad_out.shape[2] * (act.shape[2] + int(has_bias))
    return act.shape[0] * entries * assembly_dtype(act.dtype).itemsize <= act.nbytes + grad_out.nbytes
