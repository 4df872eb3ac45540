"""JVP embeddings (Influence Distillation, section 4.3): how the output of the first blocks moves with their weights.

    e(x) = 1/|V| sum_{v in V} (d N_l(x) / d theta_l) v

with ``N_l(x)`` the logits after the first ``l`` blocks and ``V`` random Gaussian directions of those blocks' linear
layers (their biases included; norms and embeddings stay). A logit's change is ``W h'``, so ``h' R`` with
``R R^T = W^T W`` is stored instead: the same inner products from d numbers, no logits, no projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tamis.embeddings.cost import block_flops
from tamis.embeddings.kinds import RowFunction, as_result
from tamis.embeddings.states import require_depth_setting
from tamis.errors import InvalidSettings
from tamis.gradients.jvp import gaussian_direction, hidden_tangents, mean_direction
from tamis.model.blocks import first_blocks
from tamis.model.flops import ModelShape
from tamis.model.head import head_of, read_out
from tamis.model.targets import embedding_matrix, gradient_layers
from tamis.types import Batch

__all__ = ["Jvp"]


@dataclass(frozen=True, kw_only=True)
class Jvp:
    """Change of the logits after the first blocks along random directions of those blocks' weights.

    A soft cap on the logits (Gemma) is left out: the change is that of the head's own output.

    Args:
        depth: number of blocks, ``l``; the paper has 4.
        directions: ``|V|``; the paper has 2.
        positions: "mean" over the positions that predict supervised tokens, or "last", each row's last token, as in
            the paper.
        combine: "mean" of the directions, as in the paper, which is one JVP along the mean direction and so costs one;
            or "concat", the directions side by side, one pass for each.
        seed: of the directions.
    """

    name: ClassVar[str] = "jvp"
    depth: int = 4
    directions: int = 1
    positions: Literal["mean", "last"] = "mean"
    combine: Literal["mean", "concat"] = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        require_depth_setting(self.depth, at_least=1)
        if self.directions < 1:
            raise InvalidSettings(f"directions must be at least 1, got {self.directions}")
        if self.positions not in ("mean", "last"):
            raise InvalidSettings(f"positions must be 'mean' or 'last', got {self.positions!r}")
        if self.combine not in ("mean", "concat"):
            raise InvalidSettings(f"combine must be 'mean' or 'concat', got {self.combine!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and its settings."""
        return {
            "algorithm": "jvp-v1",
            "depth": self.depth,
            "directions": self.directions,
            "positions": self.positions,
            "combine": self.combine,
            "seed": self.seed,
        }

    def start(self, model: nn.Module) -> RowFunction:
        """Embeddings of size ``hidden``, or ``directions * hidden`` when they are concatenated."""
        shallow = first_blocks(model, self.depth)
        layers = gradient_layers(shallow)
        table = embedding_matrix(model)
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        drawn = [
            {name: part.to(table.device) for name, part in direction.items()}
            for direction in (
                gaussian_direction(layers, seed=self.seed, index=index, dtype=dtype) for index in range(self.directions)
            )
        ]
        if self.combine == "mean":
            drawn = [mean_direction(drawn)]
        root = read_out(head_of(model))

        def embed(batch: Batch) -> dict[str, Tensor]:
            batch = batch.to(table.device)
            tangents = [
                hidden_tangents(shallow, batch, layers, direction, positions=self.positions) for direction in drawn
            ]
            return as_result(torch.cat([tangent.to(root) @ root for tangent in tangents], dim=1), batch)

        return embed

    def numbers(self, shape: ModelShape) -> int:
        """``hidden``, for each direction that is concatenated."""
        return shape.hidden * (1 if self.combine == "mean" else self.directions)

    def operations(
        self, shape: ModelShape, *, rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float
    ) -> float:
        """Three products for each of the blocks' own, per direction that is run, and the read-out of every row."""
        passes = 1 if self.combine == "mean" else self.directions
        return passes * (3 * block_flops(shape, self.depth, tokens, sum_sq_len) + 2 * rows * shape.hidden**2)
