"""How far projected cosines are from exact ones, measured on pairs of examples, for any projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput
from tamis.maths.similarity import cosines, zero_rows

__all__ = ["PairErrors", "measure_distortion"]


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Exact cosines of all pairs of a few examples, and how far the projected ones are from them."""

    cosine: Float[Tensor, " n"]  # exact: <x, y> / (‖x‖‖y‖)
    error: Float[Tensor, " n"]  # projected - exact

    @property
    def rms(self) -> float:
        """Root of the mean squared error: the noise that the projection adds to a cosine."""
        return float(self.error.square().mean().sqrt())


def measure_distortion(products: Float[Tensor, "N N"], features: Float[Tensor, "N K"]) -> PairErrors:
    """Cosines of the projected gradients against the exact ones, for the ``N (N - 1) / 2`` pairs of rows.

    Args:
        products: exact inner products of the gradients, squared norms on the diagonal.
        features: the projected gradients.

    Raises:
        InvalidInput: there are fewer than two rows, or a row has a zero gradient.
    """
    if len(products) < 2:
        raise InvalidInput(f"pairs need at least two rows, got {len(products)}")
    norms = products.diagonal().double().sqrt()
    if bool((norms == 0).any()) or bool(zero_rows(features).any()):
        raise InvalidInput("a zero gradient has no cosine; leave rows without a gradient out")
    first, second = torch.triu_indices(len(products), len(products), offset=1)
    exact = (products.double() / (norms[:, None] * norms))[first, second]
    projected = cosines(features.double(), features.double())[first, second]
    return PairErrors(cosine=exact, error=projected - exact)
