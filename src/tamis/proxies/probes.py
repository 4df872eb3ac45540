"""Inputs and output gradients of sampled tokens, layer by layer: all that a decomposition looks at.

Tokens are drawn uniformly within each row, the same number from every row, real positions only. Gradients are of
``sum_b l_b`` with ``l_b`` a row's mean loss, so no batch size hides in them; at prompt positions they are not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tamis.gradients.per_sample import run_batch
from tamis.seeds import child_seed, random_subset
from tamis.types import Batch, LayerSpec

__all__ = ["LayerProbes", "collect_probes", "count_probes", "passes_within"]


@dataclass(frozen=True, kw_only=True)
class LayerProbes:
    """One layer's probes, tokens in the order of the batches."""

    inputs: Tensor  # (N, I)
    grads: Tensor  # (N, O)


def count_probes(batches: Sequence[Batch], tokens_per_row: int) -> int:
    """``N``: tokens that ``collect_probes`` takes."""
    return sum(min(int(n), tokens_per_row) for batch in batches for n in batch.attention_mask.sum(dim=1).tolist())


def passes_within(layers: Sequence[LayerSpec], probes: int, *, gigabytes: float) -> list[tuple[LayerSpec, ...]]:
    """Consecutive layers whose probes fit into memory together; one layer alone always does."""
    groups: list[list[LayerSpec]] = []
    used = 0.0
    for layer in layers:
        size = 4 * probes * (layer.in_features + layer.out_features) / 2**30
        if not groups or used + size > gigabytes:
            groups.append([])
            used = 0.0
        groups[-1].append(layer)
        used += size
    return [tuple(group) for group in groups]


def collect_probes(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    batches: Sequence[Batch],
    *,
    tokens_per_row: int,
    seed: int,
    advance: Callable[[int], None],
) -> dict[str, LayerProbes]:
    """One forward and backward pass over ``batches``; by layer name, in float32 at least.

    A token is drawn by the seed and its row's position alone, so every layer and every pass sees the same tokens.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    for batch in batches:
        consumer = _SampledTokens(batch, tokens_per_row, seed)
        run_batch(model, batch, layers, consumer)
        for layer in layers:
            parts[layer.name].append(consumer.found.pop(layer.name))
        advance(len(batch.rows))
    whole = {}
    for layer in layers:  # parts go as their layer is joined: both at once would be twice the memory that was allowed
        found = parts.pop(layer.name)
        whole[layer.name] = LayerProbes(inputs=torch.cat([i for i, _ in found]), grads=torch.cat([g for _, g in found]))
        del found
    return whole


class _SampledTokens:
    """Of every layer's input and output gradient, the drawn positions."""

    def __init__(self, batch: Batch, tokens_per_row: int, seed: int) -> None:
        row, position = list[int](), list[int]()
        for b, (at, length) in enumerate(
            zip(batch.rows.tolist(), batch.attention_mask.sum(dim=1).tolist(), strict=True)
        ):
            drawn = random_subset(child_seed(seed, "probe tokens", at), length, min(tokens_per_row, length))
            row += [b] * len(drawn)
            position += drawn.tolist()
        self._row, self._position = torch.tensor(row), torch.tensor(position)
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The drawn inputs ``(N, I)``; layers called twice, whose parts would be joined, were left out before."""
        return (self._drawn(act),)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Hold both."""
        self.found[layer.name] = (_at_least_float32(kept[0]), _at_least_float32(self._drawn(grad_out)))

    def _drawn(self, x: Tensor) -> Tensor:
        return x[self._row.to(x.device), self._position.to(x.device)]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
