"""Embeddings made of what the model got wrong: prediction errors, in closed form from one forward pass.

At each position ``t`` that predicts a supervised token, ``h_t`` is the state that the head reads and

    delta_t = W^T (softmax(W h_t) - onehot(y_t))

the gradient of that token's loss with respect to it (``tamis.model.head`` has scaled and capped heads). At a smaller
depth both are read off by the logit lens; with no block at all, ``h_t`` is the normed embedding of the token before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tamis.embeddings.cost import block_flops, head_flops
from tamis.embeddings.kinds import RowFunction, as_result
from tamis.embeddings.states import at_depth, require_depth_setting
from tamis.errors import InvalidSettings
from tamis.maths.similarity import unit_rows
from tamis.model.flops import ModelShape
from tamis.model.head import head_of, prediction_errors
from tamis.model.loss import supervised_positions
from tamis.model.states import by_row, mean_by_row, supervised_states
from tamis.model.targets import embedding_matrix
from tamis.seeds import child_seed, random_normal
from tamis.types import Batch

__all__ = ["ErrorMean", "ErrorOuter", "HiddenError"]

_OUTER = "error-outer-v1"


@dataclass(frozen=True, kw_only=True)
class ErrorMean:
    """Mean of ``delta_t`` over a row's supervised tokens.

    Args:
        depth: run the first ``depth`` blocks only; None: all.
    """

    name: ClassVar[str] = "error"
    depth: int | None = None

    def __post_init__(self) -> None:
        require_depth_setting(self.depth)

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and the depth."""
        return {"algorithm": "error-v1", "depth": self.depth}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of size ``hidden``."""
        shallow, head = at_depth(model, self.depth), head_of(model)

        def embed(batch: Batch) -> dict[str, Tensor]:
            batch = batch.to(embedding_matrix(model).device)
            positions = supervised_positions(batch)
            hidden = supervised_states(shallow, batch, positions)
            return as_result(mean_by_row(prediction_errors(head, hidden, positions.labels), positions), batch)

        return embed

    def numbers(self, shape: ModelShape) -> int:
        """``hidden``."""
        return shape.hidden

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """The blocks, and two products with the head's matrix."""
        return block_flops(shape, self.depth, tokens, sum_sq_len) + 2 * head_flops(shape, supervised_tokens)


@dataclass(frozen=True, kw_only=True)
class HiddenError:
    """Mean state and mean error side by side, each scaled to length 1 before they are joined.

    A state's entries and an error's are in different units, and their ratio differs between models, so neither half may
    decide by its size. The halves are equal for every row, before any centring.

    Args:
        depth: run the first ``depth`` blocks only; None: all.
    """

    name: ClassVar[str] = "hidden-error"
    depth: int | None = None

    def __post_init__(self) -> None:
        require_depth_setting(self.depth)

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and the depth."""
        return {"algorithm": "hidden-error-v1", "depth": self.depth}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of size ``2 hidden``: states first."""
        shallow, head = at_depth(model, self.depth), head_of(model)

        def embed(batch: Batch) -> dict[str, Tensor]:
            batch = batch.to(embedding_matrix(model).device)
            positions = supervised_positions(batch)
            hidden = supervised_states(shallow, batch, positions)
            states = mean_by_row(hidden, positions)
            errors = mean_by_row(prediction_errors(head, hidden, positions.labels), positions)
            return as_result(torch.cat([unit_rows(states), unit_rows(errors).to(states.device)], dim=1), batch)

        return embed

    def numbers(self, shape: ModelShape) -> int:
        """``2 hidden``."""
        return 2 * shape.hidden

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """The blocks, and two products with the head's matrix."""
        return block_flops(shape, self.depth, tokens, sum_sq_len) + 2 * head_flops(shape, supervised_tokens)


@dataclass(frozen=True, kw_only=True)
class ErrorOuter:
    """``(1 / n) sum_t (delta_t P)(h_t Q)^T``: a sketch of the gradient of the head's matrix, carried back one product.

    ``P`` and ``Q`` are fixed Gaussian matrices ``hidden x side`` with entries of variance ``1 / side``; a side is left
    whole if the model is no wider.

    Args:
        depth: run the first ``depth`` blocks only; 0: none, embeddings and head alone; None: all.
        side: the result has ``side * side`` numbers.
        seed: of the two matrices.
    """

    name: ClassVar[str] = "error-outer"
    depth: int | None = None
    side: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        require_depth_setting(self.depth)
        if self.side < 1:
            raise InvalidSettings(f"side must be at least 1, got {self.side}")

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and its settings."""
        return {"algorithm": _OUTER, "depth": self.depth, "side": self.side, "seed": self.seed}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of size ``side * side``, errors along the rows of the square."""
        shallow, head = at_depth(model, self.depth), head_of(model)
        left, right = (self.projection(which, head.weight.shape[1]) for which in ("errors", "states"))

        def embed(batch: Batch) -> dict[str, Tensor]:
            batch = batch.to(embedding_matrix(model).device)
            positions = supervised_positions(batch)
            hidden = supervised_states(shallow, batch, positions)
            errors = prediction_errors(head, hidden, positions.labels)
            hidden = hidden.to(errors)
            if left is not None and right is not None:
                errors, hidden = errors @ left.to(errors), hidden @ right.to(errors)
            outer = torch.bmm(by_row(errors, positions).mT, by_row(hidden, positions))  # (B, side, side)
            return as_result(outer.flatten(1) / positions.counts.to(outer.device)[:, None], batch)

        return embed

    def projection(self, which: str, hidden: int) -> Tensor | None:
        """``P`` ("errors") or ``Q`` ("states"), ``(hidden, side)`` in float64; None stands for the identity."""
        if hidden <= self.side:
            return None
        numbers = random_normal(child_seed(self.seed, _OUTER, which), hidden * self.side)
        matrix: Tensor = torch.from_numpy(numbers).view(hidden, self.side) / self.side**0.5
        return matrix

    def numbers(self, shape: ModelShape) -> int:
        """``side * side``, no more than ``hidden`` a side."""
        return min(self.side, shape.hidden) ** 2

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """The blocks, two products with the head's matrix, and the sketch."""
        side = min(self.side, shape.hidden)
        projected = 2 * shape.hidden * side if side < shape.hidden else 0
        return (
            block_flops(shape, self.depth, tokens, sum_sq_len)
            + 2 * head_flops(shape, supervised_tokens)
            + 2 * supervised_tokens * (projected + side * side)
        )
