"""Kronecker-factored curvature of one layer (K-FAC, EK-FAC), and its damped inverse applied to gradients.

A layer's gradient is a matrix ``G = sum_t g_t a_t^T`` (O, I). K-FAC takes the curvature of its entries to be ``S ⊗ A``
with ``A`` (I, I) the mean of ``a a^T`` over tokens and ``S`` (O, O) the mean over rows of ``sum_t g g^T``: exact where
inputs and output gradients of tokens are independent. EK-FAC keeps the eigenvectors and measures the eigenvalues anew.

Martens and Grosse, 2015; George et al., 2018; for influence functions Grosse et al., 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput, InvalidSettings

__all__ = ["KroneckerBasis", "eigenbasis", "kfac_eigenvalues", "precondition", "squared_coordinates"]


@dataclass(frozen=True, kw_only=True)
class KroneckerBasis:
    """Eigenvectors, as columns, and eigenvalues of both factors of a layer; float64 or as loaded."""

    vectors_in: Float[Tensor, "I I2"]
    values_in: Float[Tensor, " I"]
    vectors_out: Float[Tensor, "O O2"]
    values_out: Float[Tensor, " O"]


def eigenbasis(a: Float[Tensor, "I I2"], s: Float[Tensor, "O O2"]) -> KroneckerBasis:
    """Eigenvectors and eigenvalues of both factors in float64; negative eigenvalues, which are rounding, become 0.

    Raises:
        InvalidInput: a factor is not finite.
    """
    parts = []
    for factor, name in ((a, "inputs"), (s, "output gradients")):
        if not bool(torch.isfinite(factor).all()):
            raise InvalidInput(f"the second moment of a layer's {name} has entries that are NaN or infinite")
        values, vectors = torch.linalg.eigh((factor.double() + factor.double().T) / 2)
        parts.append((vectors, values.clamp_min(0)))
    (vectors_in, values_in), (vectors_out, values_out) = parts
    return KroneckerBasis(vectors_in=vectors_in, values_in=values_in, vectors_out=vectors_out, values_out=values_out)


def kfac_eigenvalues(basis: KroneckerBasis) -> Float[Tensor, "O I"]:
    """Eigenvalues of ``S ⊗ A``, in the order of a gradient's entries in the basis."""
    return torch.outer(basis.values_out, basis.values_in)


def squared_coordinates(
    act: Float[Tensor, "B T I"], grad_out: Float[Tensor, "B T O"], basis: KroneckerBasis
) -> Float[Tensor, "O I"]:
    """``sum_b (Q_out^T G_b Q_in)²`` entry by entry: what EK-FAC averages over rows for its eigenvalues."""
    turned_act = act @ basis.vectors_in.to(act)
    turned_grad = grad_out @ basis.vectors_out.to(grad_out)
    total = turned_act.new_zeros(grad_out.shape[2], act.shape[2])
    for a, g in zip(turned_act, turned_grad, strict=True):  # one row's gradient at a time
        total += (g.T @ a).square_()
    return total


def precondition(
    gradients: Float[Tensor, "J O I"], basis: KroneckerBasis, eigenvalues: Float[Tensor, "O I"], *, damping: float
) -> Float[Tensor, "J O I"]:
    """``(F + δ̄ I)^{-1}`` times each gradient, F with the basis' eigenvectors and the ``eigenvalues``.

    ``damping`` is in units of the mean eigenvalue: ``δ̄ = damping · mean(eigenvalues)``, so that it means the same in
    every layer and at every scale of the loss (0.1 in Grosse et al.). Gradients that are all zero stay so.

    Raises:
        InvalidSettings: the damping is not positive.
        InvalidInput: the curvature is zero everywhere, but a gradient is not, so no damping can be told from it.
    """
    if not 0 < damping < float("inf"):
        raise InvalidSettings(f"damping must be a positive number, got {damping}; curvature alone is singular")
    mean = float(eigenvalues.double().mean())
    if mean <= 0:
        if not bool(gradients.any()):  # a fresh adapter's A, whose B is still zero
            return gradients
        raise InvalidInput("a layer has no curvature: none of the rows used for it has a gradient there; use more rows")
    left, right = basis.vectors_out.to(gradients), basis.vectors_in.to(gradients)
    turned = left.T @ gradients @ right
    scaled = turned / (eigenvalues.double() + damping * mean).to(gradients)
    return left @ scaled @ right.T
