"""What can be made of every layer's inputs and output gradients in one backward pass: one small class per quantity.

Each is made for one batch, passed to ``run_batch``, and read afterwards. Half-precision factors are combined in
float32; float64 factors give float64 results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tamis.gradients.ghost import alignments
from tamis.gradients.layers import assembly_dtype, per_sample_gradient, project_side, weighted_gradient
from tamis.maths.similarity import squared_norms
from tamis.protocols import LayerwiseProjector, TwoSidedProjector
from tamis.types import LayerSpec

__all__ = [
    "Alignments",
    "FactorizedFeatures",
    "Factors",
    "LayerwiseFeatures",
    "MaterialisedGradients",
    "WeightedGradient",
]


class FactorizedFeatures:
    """``(g P_out)^T (a P_in)`` of every layer, flattened and concatenated in the order of ``layers``.

    The input is projected in the forward pass and dropped at once, so the frozen pass holds almost nothing of it.
    """

    def __init__(self, projector: TwoSidedProjector, layers: Sequence[LayerSpec]) -> None:
        self._projector, self._layers = projector, layers
        self._parts: dict[str, Tensor] = {}

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The projected input, ``(B, T, k_in)``."""
        _, side = self._projector.sides(layer, act.device, act.dtype)
        return (project_side(act, side, has_bias=layer.has_bias),)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """``(B, k_out * k_in)`` of one layer."""
        side, _ = self._projector.sides(layer, grad_out.device, grad_out.dtype)
        projected = project_side(grad_out, side, has_bias=False)
        self._parts[layer.name] = per_sample_gradient(kept[0], projected, has_bias=False).flatten(1)

    @property
    def features(self) -> Tensor:
        """``(B, K)``."""
        return _joined(self._parts, self._layers)


class MaterialisedGradients:
    """The per-sample gradients themselves: large, for checks and for projections of whole vectors."""

    def __init__(self, layers: Sequence[LayerSpec]) -> None:
        self._slices: dict[str, slice] = {}
        start = 0
        for layer in layers:
            self._slices[layer.name] = slice(start, start + layer.numel)
            start += layer.numel
        self._size = start
        self._grads: Tensor | None = None

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Write the layer's ``(B, O * I)`` into its columns."""
        grads = per_sample_gradient(kept[0], grad_out, has_bias=layer.has_bias).flatten(1)
        if self._grads is None:
            self._grads = grads.new_zeros(grads.shape[0], self._size)
        self._grads[:, self._slices[layer.name]] = grads

    @property
    def grads(self) -> Tensor:
        """``(B, P)``: each layer's ``(O, I)`` matrix row by row, layers in the order given."""
        assert self._grads is not None, "run a batch first"
        return self._grads


class LayerwiseFeatures:
    """Features of a projector that is a sum over layers, and the exact gradient norms, which come nearly free."""

    def __init__(self, projector: LayerwiseProjector) -> None:
        self._projector = projector
        self._features: Tensor | None = None
        self._squares: Tensor | None = None

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Form the layer's gradients, project them, forget them."""
        grads = per_sample_gradient(kept[0], grad_out, has_bias=layer.has_bias)
        part = self._projector.project_layer(layer, grads)
        squares = squared_norms(grads.flatten(1))
        self._features = part if self._features is None else self._features + part.to(self._features.device)
        self._squares = squares if self._squares is None else self._squares + squares.to(self._squares.device)

    @property
    def features(self) -> Tensor:
        """``(B, K)``."""
        assert self._features is not None, "run a batch first"
        return self._features

    @property
    def norms(self) -> Tensor:
        """``(B,)`` Euclidean norms of the unprojected gradients."""
        assert self._squares is not None, "run a batch first"
        return self._squares.sqrt()


class Alignments:
    """Exact inner products with one or several directions, and exact norms, unprojected.

    ``directions`` maps every layer's name to ``(O, I)``, or to ``(J, O, I)`` for ``J`` directions at once; None for
    norms only.
    """

    def __init__(self, directions: Mapping[str, Tensor] | None, *, norms: bool = True) -> None:
        self._directions, self._norms = directions, norms
        self._single = directions is not None and all(matrix.dim() == 2 for matrix in directions.values())
        self._dot: Tensor | None = None
        self._squares: Tensor | None = None

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Add the layer's part, by whichever order needs fewer operations."""
        matrices = None
        if self._directions is not None:
            matrices = self._directions[layer.name].to(grad_out.device)
            matrices = matrices[None] if self._single else matrices
        dots, squares = alignments(kept[0], grad_out, matrices, has_bias=layer.has_bias, norms=self._norms)
        if dots is not None:
            self._dot = dots if self._dot is None else self._dot + dots.to(self._dot.device)
        if squares is not None:
            self._squares = squares if self._squares is None else self._squares + squares.to(self._squares.device)

    @property
    def dot(self) -> Tensor:
        """``(B,)`` for one direction, ``(B, J)`` for several."""
        assert self._dot is not None, "needs directions and a batch that has run"
        return self._dot[:, 0] if self._single else self._dot

    @property
    def norm(self) -> Tensor:
        """``(B,)`` Euclidean norms."""
        assert self._squares is not None, "needs norms=True and a batch that has run"
        return self._squares.clamp_min(0).sqrt()


class WeightedGradient:
    """``sum_b w_b grad l_b`` of every layer, from the same one pass: what an optimizer step would take."""

    def __init__(self, example_weights: Tensor) -> None:
        self._example_weights = example_weights
        self.grads: dict[str, Tensor] = {}  # layer name -> (O, I)

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """One weight-gradient matmul."""
        example_weights = self._example_weights.to(grad_out.device)
        self.grads[layer.name] = weighted_gradient(kept[0], grad_out, example_weights, has_bias=layer.has_bias)


class Factors:
    """The factors ``(act, grad_out)`` themselves, for what must be decided after the backward pass."""

    def __init__(self) -> None:
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # layer name -> ((B, T, I), (B, T, O))

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Hold both: memory grows with the layers."""
        self.factors[layer.name] = (kept[0], grad_out)


def _joined(parts: Mapping[str, Tensor], layers: Sequence[LayerSpec]) -> Tensor:
    first = parts[layers[0].name]
    dtype = assembly_dtype(first.dtype)
    return torch.cat([parts[layer.name].to(first.device, dtype) for layer in layers], dim=1)
