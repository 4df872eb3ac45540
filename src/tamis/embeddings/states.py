"""Embeddings made of hidden states alone: one forward pass, no label is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tamis.embeddings.cost import block_flops
from tamis.embeddings.kinds import RowFunction, as_result
from tamis.errors import InvalidSettings
from tamis.model.blocks import first_blocks
from tamis.model.flops import ModelShape
from tamis.model.loss import supervised_positions
from tamis.model.states import mean_by_row, supervised_states, weighted_mean_states
from tamis.model.targets import embedding_matrix
from tamis.types import Batch

__all__ = ["HiddenMean", "Rds", "at_depth", "require_depth_setting"]


@dataclass(frozen=True, kw_only=True)
class HiddenMean:
    """Mean of the states from which a row's supervised tokens are predicted.

    Args:
        depth: run the first ``depth`` blocks only, then the final norm; None: all.
    """

    name: ClassVar[str] = "hidden-mean"
    depth: int | None = None

    def __post_init__(self) -> None:
        require_depth_setting(self.depth)

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and the depth."""
        return {"algorithm": "hidden-mean-v1", "depth": self.depth}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of size ``hidden``."""
        shallow = at_depth(model, self.depth)

        def embed(batch: Batch) -> dict[str, Tensor]:
            batch = batch.to(embedding_matrix(model).device)
            positions = supervised_positions(batch)
            return as_result(mean_by_row(supervised_states(shallow, batch, positions), positions), batch)

        return embed

    def numbers(self, shape: ModelShape) -> int:
        """``hidden``."""
        return shape.hidden

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """The blocks; no logits."""
        return block_flops(shape, self.depth, tokens, sum_sq_len)


@dataclass(frozen=True, kw_only=True)
class Rds:
    """The representation of RDS+ (Ivison et al., 2025): mean of the last states, the i-th token weighing i.

    Args:
        positions: "all" tokens, as published, or the "supervised" ones only.
    """

    name: ClassVar[str] = "rds"
    positions: Literal["all", "supervised"] = "all"

    def __post_init__(self) -> None:
        if self.positions not in ("all", "supervised"):
            raise InvalidSettings(f"positions must be 'all' or 'supervised', got {self.positions!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and the positions."""
        return {"algorithm": "rds-v1", "positions": self.positions}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of size ``hidden``."""

        def embed(batch: Batch) -> dict[str, Tensor]:
            batch = batch.to(embedding_matrix(model).device)
            return as_result(weighted_mean_states(model, batch, self.positions), batch)

        return embed

    def numbers(self, shape: ModelShape) -> int:
        """``hidden``."""
        return shape.hidden

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """All blocks; no logits."""
        return block_flops(shape, None, tokens, sum_sq_len)


def at_depth(model: nn.Module, depth: int | None) -> nn.Module:
    """The model, or a model of its first ``depth`` blocks."""
    return model if depth is None else first_blocks(model, depth)


def require_depth_setting(depth: int | None, *, at_least: int = 0) -> None:
    """Stop at a depth that no model has.

    Raises:
        InvalidSettings: it is no whole number, or below ``at_least``.
    """
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < at_least):
        raise InvalidSettings(f"depth must be a number of blocks, at least {at_least}, got {depth!r}")
