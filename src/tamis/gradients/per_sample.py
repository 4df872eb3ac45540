"""One frozen forward and backward pass per batch, and what callers make of it: features, alignments, mean gradients.

The consumers are re-exported, so that this is the one module other rooms import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.errors import InvalidInput, Unsupported
from tamis.gradients.consumers import (
    Alignments,
    FactorizedFeatures,
    Factors,
    LayerwiseFeatures,
    MaterialisedGradients,
    WeightedGradient,
)
from tamis.gradients.hooks import capture, frozen
from tamis.maths.similarity import squared_norms
from tamis.model.loss import (
    SupervisedPositions,
    evaluation_mode,
    per_sample_losses,
    require_finite,
    supervised_positions,
)
from tamis.model.targets import embedding_matrix
from tamis.protocols import LayerConsumer, LayerwiseProjector, Projector, TwoSidedProjector, VectorProjector
from tamis.types import Batch, LayerSpec

__all__ = [
    "Alignments",
    "FactorizedFeatures",
    "Factors",
    "LayerwiseFeatures",
    "MaterialisedGradients",
    "WeightedGradient",
    "mean_gradient",
    "per_sample_features",
    "run_batch",
]

_MAX_ENTRIES = 1 << 28  # gradient numbers materialised at once for whole-vector projections: 1 GB of float32


def run_batch(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[LayerSpec],
    consumer: LayerConsumer,
    *,
    require_finite_losses: bool = True,
    losses_of: Callable[[nn.Module, Batch, SupervisedPositions], Tensor] = per_sample_losses,
) -> Float[Tensor, " B"]:
    """Per-sample losses; the consumer has then seen every layer of ``layers`` once.

    One forward and one backward of ``sum_b l_b`` with all parameters frozen, dropout off. The model is left as it was.
    ``losses_of`` puts another loss in the place of the usual one.
    A row whose loss is not finite spoils its own gradient only; without ``require_finite_losses`` the caller must
    leave it out.

    Raises:
        InvalidInput: a row has no supervised token.
        NonFinite: a loss is NaN or infinite, unless that is allowed.
        Unsupported: a layer cannot be told apart by rows, or never ran.
    """
    batch = batch.to(embedding_matrix(model).device)
    positions = supervised_positions(batch)
    # Evaluation mode spans the backward pass too: gradient checkpointing runs the forward again in there.
    with (
        torch.enable_grad(),
        frozen(model),
        evaluation_mode(model),
        capture(model, layers, consumer, batch, positions) as taps,
    ):
        losses = losses_of(model, batch, positions)
        taps.forward_done()
        if require_finite_losses:
            require_finite(losses.detach(), batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        taps.check(layers)
    return losses.detach()


def per_sample_features(
    model: nn.Module, batch: Batch, layers: Sequence[LayerSpec], projector: Projector
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B K"], Float[Tensor, " B"] | None]:
    """Losses, projected per-sample gradients, and exact gradient norms where they come free (not for factorized).

    Raises:
        Unsupported: the projector has none of the three ways to project.
    """
    if isinstance(projector, TwoSidedProjector):
        factorized = FactorizedFeatures(projector, layers)
        losses = run_batch(model, batch, layers, factorized)
        return losses, factorized.features, None
    if isinstance(projector, LayerwiseProjector):
        layerwise = LayerwiseFeatures(projector)
        losses = run_batch(model, batch, layers, layerwise)
        return losses, layerwise.features, layerwise.norms
    if isinstance(projector, VectorProjector):
        return _vector_features(model, batch, layers, projector)
    raise Unsupported(f"projector {type(projector).__name__} has none of sides, project_layer and project")


def _vector_features(
    model: nn.Module, batch: Batch, layers: Sequence[LayerSpec], projector: VectorProjector
) -> tuple[Tensor, Tensor, Tensor]:
    """As many rows at a time as their whole gradients fit; rows do not depend on each other."""
    rows = max(1, _MAX_ENTRIES // sum(layer.numel for layer in layers))
    found = []
    for few in batch.split(rows):
        consumer = MaterialisedGradients(layers)
        losses = run_batch(model, few, layers, consumer)
        found.append((losses, projector.project(consumer.grads), squared_norms(consumer.grads).sqrt()))
    losses, features, norms = (torch.cat(parts) for parts in zip(*found, strict=True))
    return losses, features, norms


def mean_gradient(
    model: nn.Module, batches: Iterable[Batch], layers: Sequence[LayerSpec], *, unit: bool
) -> dict[str, Float[Tensor, "O I2"]]:
    """Mean over all rows of the per-sample gradients, or of the gradients scaled to length 1 (``unit``), by layer name.

    ``unit`` runs every batch twice: a gradient's length is known only when its last layer has been reached. A row whose
    gradient is zero has no direction and contributes zero to the mean.

    Raises:
        InvalidInput: there are no batches.
    """
    total: dict[str, Tensor] = {}
    rows = 0
    for batch in batches:
        example_weights = torch.ones(len(batch.rows))
        if unit:
            lengths = Alignments(None)
            run_batch(model, batch, layers, lengths)
            example_weights = torch.where(lengths.norm > 0, 1 / lengths.norm, 0)
        weighted = WeightedGradient(example_weights)
        run_batch(model, batch, layers, weighted)
        for name, grad in weighted.grads.items():
            total[name] = total[name].add_(grad) if name in total else grad
        rows += len(batch.rows)
    if not rows:
        raise InvalidInput("a mean gradient needs at least one row; the target has none that can be used")
    return {layer.name: total[layer.name].div_(rows) for layer in layers}
