"""Layer tables and random gradients for projections: shapes of a small model without the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tamis.types import LayerSpec


def layer(name: str, rows: int, columns: int, *, bias: bool = False) -> LayerSpec:
    return LayerSpec(name=name, out_features=rows, in_features=columns, has_bias=bias, kind="linear")


# A wide, a tall and a biased layer, one smaller than most projections, and the two factors of an adapter.
LAYERS = (
    layer("blocks.0.up", 24, 10),
    layer("blocks.0.down", 9, 20),
    layer("blocks.1.query", 12, 11, bias=True),
    layer("blocks.1.gate", 3, 2),
    layer("blocks.1.value.lora_A.default", 2, 30),
    layer("blocks.1.value.lora_B.default", 18, 2),
)

NUMEL = sum(entry.numel for entry in LAYERS)


def random_gradients(
    rows: int, *, seed: int = 0, numel: int = NUMEL, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return torch.randn(rows, numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def low_rank_gradient(entry: LayerSpec, tokens: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(grad, grad_out, act)`` of one example; ``act`` includes the constant input of the bias column."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = entry.shape
    grad_out = torch.randn(tokens, rows, dtype=torch.float64, generator=generator)
    act = torch.randn(tokens, columns, dtype=torch.float64, generator=generator)
    if entry.has_bias:
        act[:, -1] = 1
    return grad_out.T @ act, grad_out, act


def total_of(layers: Sequence[LayerSpec]) -> int:
    return sum(entry.numel for entry in layers)
