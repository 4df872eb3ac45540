"""What Kronecker factors are made of, summed over rows in the passes of ``run_batch``; and the losses of these passes.

Each row's loss is ``sum_s l_s / √c`` over its c supervised tokens: with labels drawn from the model's own predictions,
the outer product of its gradient has the generalised Gauss-Newton matrix of the row's mean loss as its expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tamis.gradients.layers import assembly_dtype, with_bias_column
from tamis.maths.kronecker import KroneckerBasis, squared_coordinates
from tamis.model.loss import SupervisedPositions, per_sample_losses
from tamis.seeds import child_seed, random_uniform
from tamis.types import Batch, LayerSpec

__all__ = ["Labels", "SecondMoments", "SquaredCoordinates", "curvature_losses", "label_sampler"]

Labels = Literal["sampled", "empirical"]

_POSITIONS = 256  # whose distributions exist in float64 at once


def curvature_losses(labels: Labels, *, seed: int) -> Callable[[nn.Module, Batch, SupervisedPositions], Tensor]:
    """The losses whose gradients make up the curvature, for ``run_batch``.

    "sampled" draws a label at every supervised position from the model's prediction there (the true Fisher matrix);
    "empirical" keeps the rows' own labels. A draw depends on the seed, the row and the position only.
    """

    def losses(model: nn.Module, batch: Batch, positions: SupervisedPositions) -> Tensor:
        relabel = None
        if labels == "sampled":
            relabel = label_sampler(batch, positions, seed)
        found = per_sample_losses(model, batch, positions, relabel=relabel)
        return found * positions.counts.to(found).sqrt()

    return losses


def label_sampler(batch: Batch, positions: SupervisedPositions, seed: int) -> Callable[[Tensor], Tensor]:
    """From logits ``(n, V)`` to labels drawn from their distributions, the same for a row whatever its batch."""
    counts = positions.counts.tolist()
    draws = [
        torch.from_numpy(random_uniform(child_seed(seed, "sampled labels", int(row)), count))
        for row, count in zip(batch.rows.tolist(), counts, strict=True)
    ]
    uniform = torch.cat(draws)

    def sample(logits: Tensor) -> Tensor:
        # By the inverse of the distribution function, in float64 where there is such a thing; few positions at a time.
        dtype = torch.float32 if logits.device.type == "mps" else torch.float64
        u = uniform.to(logits.device, dtype)[:, None]
        labels = []
        for start in range(0, len(logits), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            cumulative = torch.softmax(logits[part].detach().to(dtype), dim=1).cumsum(1)
            labels.append(torch.searchsorted(cumulative, u[part] * cumulative[:, -1:], right=True)[:, 0])
        return torch.cat(labels).clamp_(max=logits.shape[1] - 1)

    return sample


class SecondMoments:
    """``sum a a^T`` over real tokens and ``sum g g^T`` of every layer, the bias column included, added up over batches.

    Padding has no output gradient, but it has inputs: they are left out. ``tokens`` counts the a of each layer: more
    than the rows' tokens if the layer is called several times.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}  # (I, I)
        self.output_grads: dict[str, Tensor] = {}  # (O, O)
        self.tokens: dict[str, Tensor] = {}  # (1,)
        self._mask = torch.zeros(0)

    def see(self, batch: Batch) -> None:
        """Call before every batch."""
        self._mask = batch.attention_mask

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Two products of one layer."""
        act, dtype = with_bias_column(kept[0], has_bias=layer.has_bias), assembly_dtype(grad_out.dtype)
        uses = act.shape[1] // self._mask.shape[1]  # of a layer that is called several times
        real = self._mask.to(act.device).bool().repeat(1, uses)
        tokens = act[real].to(dtype)
        grads = grad_out.flatten(0, 1).to(dtype)
        for total, part in (
            (self.inputs, tokens.T @ tokens),
            (self.output_grads, grads.T @ grads),
            (self.tokens, tokens.new_full((1,), len(tokens))),
        ):
            total[layer.name] = total[layer.name].add_(part) if layer.name in total else part


class SquaredCoordinates:
    """``sum_b (Q_out^T G_b Q_in)²`` of every layer, added up over batches."""

    def __init__(self, bases: Mapping[str, KroneckerBasis], layers: Sequence[LayerSpec]) -> None:
        self._bases = {layer.name: bases[layer.name] for layer in layers}
        self.squares: dict[str, Tensor] = {}  # (O, I)

    def see(self, batch: Batch) -> None:
        """Nothing hangs on the batch."""

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """One layer."""
        dtype = assembly_dtype(grad_out.dtype)
        act = with_bias_column(kept[0], has_bias=layer.has_bias).to(dtype)
        part = squared_coordinates(act, grad_out.to(dtype), self._bases[layer.name])
        self.squares[layer.name] = self.squares[layer.name].add_(part) if layer.name in self.squares else part
