"""What an embedding is: a cheap vector of a row, near another row's where their gradients are near.

Every row's vector has length 1 (or is zero), in float32. Centring by the pool's mean is left to whoever compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.errors import NonFinite
from tamis.maths.similarity import row_norms, unit_rows
from tamis.model.flops import ModelShape
from tamis.types import Batch

__all__ = ["ModelEmbedding", "RowFunction", "TextEmbedder", "TextEmbedding", "as_result"]

RowFunction = Callable[[Batch], dict[str, Tensor]]
"""From a batch to ``embedding`` (B, d), rows of length 1, and ``norm`` (B,), the length that each had before."""


class ModelEmbedding(Protocol):
    """An embedding that the model computes: a frozen dataclass whose fields are its settings."""

    @property
    def name(self) -> str:
        """What a user types to get it."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the numbers besides model and data; two embeddings compare only if this is equal."""
        ...

    def start(self, model: nn.Module) -> RowFunction:
        """Prepare what all batches share; the function may be called with batches in any order."""
        ...

    def numbers(self, shape: ModelShape) -> int:
        """How many numbers a row has."""
        ...

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """Floating-point operations for rows of that many tokens in all, as counted in ``tamis.model.flops``."""
        ...


class TextEmbedder(Protocol):
    """Vectors of texts, once it is known which words are common."""

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """One row per text."""
        ...


class TextEmbedding(Protocol):
    """An embedding that needs the rows' text and no model."""

    @property
    def name(self) -> str:
        """What a user types to get it."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the numbers besides the texts."""
        ...

    def fit(self, texts: Iterable[str]) -> TextEmbedder:
        """Read the pool's texts once; the same embedder then serves pool and target."""
        ...


def as_result(values: Float[Tensor, "B d"], batch: Batch) -> dict[str, Tensor]:
    """A row function's answer.

    Lengths are taken off before anything is averaged over rows: the length of a mean-loss gradient falls with the
    number of tokens, so that the mean of raw ones is that of the shortest rows. They also differ by orders of magnitude
    between models, which half precision on disk would not survive.

    Raises:
        NonFinite: a value is NaN or infinite (names the rows).
    """
    good = torch.isfinite(values).all(dim=1).to(batch.rows.device)
    if not bool(good.all()):
        rows = tuple(batch.rows[~good].tolist())
        shown = ", ".join(str(row) for row in rows[:5])
        raise NonFinite(
            f"embeddings of rows {shown} are NaN or infinite; check the weights, or load the model with another dtype",
            rows=rows,
        )
    return {"embedding": unit_rows(values).float(), "norm": row_norms(values).float()}
