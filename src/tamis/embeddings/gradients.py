"""Embeddings made of a backward pass: sketches of the gradients of some or all blocks.

For every linear layer the feature is ``(g P)^T (a Q)``, summed over positions, with ``a`` the layer's inputs, ``g`` its
output gradients and ``P``, ``Q`` small matrices of random signs (``tamis.projection.factorized``): no weight gradient
is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tamis.embeddings.cost import gradient_flops, sketch_flops, sketch_numbers
from tamis.embeddings.kinds import RowFunction, as_result
from tamis.embeddings.states import require_depth_setting
from tamis.errors import InvalidSettings
from tamis.gradients.per_sample import FactorizedFeatures, run_batch
from tamis.model.blocks import first_blocks, graph_of_last_blocks, last_block_layers
from tamis.model.flops import ModelShape
from tamis.model.targets import gradient_layers
from tamis.projection import FactorizedProjector
from tamis.types import Batch, LayerSpec

__all__ = ["Gradient", "LensGradient", "TailGradient"]


@dataclass(frozen=True, kw_only=True)
class LensGradient:
    """Gradient of the first blocks, of the loss that the final norm and the head see right behind them.

    Args:
        depth: number of blocks.
        side: numbers per side of a layer's sketch.
        seed: of the sketch.
    """

    name: ClassVar[str] = "lens-gradient"
    depth: int = 4
    side: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_depth_setting(self.depth, at_least=1)
        _require_side(self.side)

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm, its settings and the sketch."""
        sketch = FactorizedProjector(dim=self.side, seed=self.seed).identity
        return {"algorithm": "lens-gradient-v1", "depth": self.depth, "sketch": sketch}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of ``side * side`` numbers for every layer."""
        shallow = first_blocks(model, self.depth)
        return _sketches(shallow, gradient_layers(shallow), side=self.side, seed=self.seed)

    def numbers(self, shape: ModelShape) -> int:
        """``side * side`` for every layer of the first blocks, no side larger than the layer's."""
        return sketch_numbers(shape, self.depth, self.side)

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """Forward and back through the first blocks and the head."""
        passes = gradient_flops(
            shape,
            forward=self.depth,
            backward=self.depth,
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            sum_sq_len=sum_sq_len,
        )
        return passes + sketch_flops(shape, self.depth, self.side, tokens)


@dataclass(frozen=True, kw_only=True)
class TailGradient:
    """Gradient of the last blocks: all others only run forward, and nothing of them is kept.

    Args:
        blocks: how many.
        side: numbers per side of a layer's sketch.
        seed: of the sketch.
    """

    name: ClassVar[str] = "tail-gradient"
    blocks: int = 2
    side: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise InvalidSettings(f"blocks must be at least 1, got {self.blocks}")
        _require_side(self.side)

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm, its settings and the sketch."""
        sketch = FactorizedProjector(dim=self.side, seed=self.seed).identity
        return {"algorithm": "tail-gradient-v1", "blocks": self.blocks, "sketch": sketch}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of ``side * side`` numbers for every layer of those blocks."""
        layers = last_block_layers(model, gradient_layers(model), self.blocks)
        embed = _sketches(model, layers, side=self.side, seed=self.seed)

        def embed_tail(batch: Batch) -> dict[str, Tensor]:
            with graph_of_last_blocks(model, self.blocks):
                return embed(batch)

        return embed_tail

    def numbers(self, shape: ModelShape) -> int:
        """``side * side`` for every layer of the last blocks, no side larger than the layer's."""
        return sketch_numbers(shape, self.blocks, self.side)

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """Forward through everything, back through the head and the last blocks."""
        passes = gradient_flops(
            shape,
            forward=None,
            backward=self.blocks,
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            sum_sq_len=sum_sq_len,
        )
        return passes + sketch_flops(shape, self.blocks, self.side, tokens)


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Gradient of all blocks.

    Args:
        side: numbers per side of a layer's sketch.
        seed: of the sketch.
    """

    name: ClassVar[str] = "gradient"
    side: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _require_side(self.side)

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and the sketch."""
        return {"algorithm": "gradient-v1", "sketch": FactorizedProjector(dim=self.side, seed=self.seed).identity}

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of ``side * side`` numbers for every layer."""
        return _sketches(model, gradient_layers(model), side=self.side, seed=self.seed)

    def numbers(self, shape: ModelShape) -> int:
        """``side * side`` for every layer, no side larger than the layer's."""
        return sketch_numbers(shape, None, self.side)

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """Forward and back through everything."""
        passes = gradient_flops(
            shape,
            forward=None,
            backward=None,
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            sum_sq_len=sum_sq_len,
        )
        return passes + sketch_flops(shape, None, self.side, tokens)


def _sketches(model: nn.Module, layers: Sequence[LayerSpec], *, side: int, seed: int) -> RowFunction:
    projector = FactorizedProjector(dim=side, seed=seed)

    def embed(batch: Batch) -> dict[str, Tensor]:
        consumer = FactorizedFeatures(projector, layers)
        run_batch(model, batch, layers, consumer)
        return as_result(consumer.features, batch)

    return embed


def _require_side(side: int) -> None:
    if side < 1:
        raise InvalidSettings(f"side must be at least 1, got {side}")
