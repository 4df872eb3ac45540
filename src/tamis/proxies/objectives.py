"""What alignment lowers: the distance of outputs, and the distance of gradients in the low-rank space.

After *IProX* (2026, section 4.2), equations 6 to 8. Losses and divergences are means over the supervised tokens of a
row, then over the rows of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tamis.gradients.per_sample import WeightedGradient, run_batch
from tamis.model.loss import SupervisedPositions
from tamis.model.low_rank_linear import low_rank_layers
from tamis.model.targets import gradient_layers
from tamis.types import Batch

__all__ = ["factor_params", "gradient_distance", "mean_loss", "output_divergence", "target_gradients"]

_EPS = 1e-12


def factor_params(proxy: nn.Module) -> dict[str, nn.Parameter]:
    """What alignment trains: ``A`` and ``B`` of every factored layer, and nothing else."""
    found = {}
    for name, layer in low_rank_layers(proxy).items():
        found[f"{name}.A.weight"] = cast(nn.Parameter, layer.A.weight)
        found[f"{name}.B.weight"] = cast(nn.Parameter, layer.B.weight)
    return found


def output_divergence(target: Tensor, proxy: Tensor, positions: SupervisedPositions, *, temperature: float) -> Tensor:
    """``tau^2 KL(target || proxy)`` of ``(n, V)`` logits at the supervised positions (equation 7)."""
    wide = torch.float64 if proxy.dtype == torch.float64 else torch.float32
    ours, theirs = (log_softmax(logits.to(wide) / temperature, dim=1) for logits in (proxy, target))
    each = kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)  # (n,)
    return temperature**2 * _mean_over_rows(each, positions)


def mean_loss(logits: Tensor, positions: SupervisedPositions) -> Tensor:
    """Mean over rows of their mean cross-entropy, in a form that can be differentiated twice."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    each = cross_entropy(logits.to(wide), positions.labels.to(logits.device), reduction="none")
    return _mean_over_rows(each, positions)


def target_gradients(model: nn.Module, batch: Batch, names: Collection[str]) -> dict[str, Tensor]:
    """``grad_W`` of the batch's mean loss for the layers in ``names``, ``(O, I)``: one frozen pass of the target."""
    layers = [layer for layer in gradient_layers(model) if layer.name in names]
    consumer = WeightedGradient(torch.full((len(batch.rows),), 1 / len(batch.rows)))
    run_batch(model, batch, layers, consumer)
    return {layer.name: consumer.grads[layer.name][:, : layer.in_features] for layer in layers}


def gradient_distance(proxy: nn.Module, loss: Tensor, of_target: Mapping[str, Tensor]) -> Tensor:
    """``L_GA``: mean over layers of ``d(grad_A, G B^T) + d(grad_B, A^T G)`` with ``d = 1 - cos`` (equation 6).

    ``G`` is the target's gradient, a constant; ``A`` and ``B`` beside it are differentiated, as the equation reads. A
    layer whose target gradient is zero has no direction to match and is left out of the mean.
    """
    layers = low_rank_layers(proxy)
    pairs = [(layer.A.weight, layer.B.weight) for layer in layers.values()]
    found = torch.autograd.grad(loss, [param for pair in pairs for param in pair], create_graph=True)
    distances = []
    for index, (name, (left, right)) in enumerate(zip(layers, pairs, strict=True)):
        wanted = of_target[name].to(left)
        if float(wanted.norm()) <= _EPS:
            continue
        distances.append(
            _distance(found[2 * index], wanted @ right.T) + _distance(found[2 * index + 1], left.T @ wanted)
        )
    return torch.stack(distances).mean() if distances else loss.new_zeros(())


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """``1 - cos``; each is brought to length 1 before the product, which would else underflow."""
    cosine: Tensor = ((x / x.norm().clamp_min(_EPS)) * (y / y.norm().clamp_min(_EPS))).sum()
    return 1 - cosine


def _mean_over_rows(each: Tensor, positions: SupervisedPositions) -> Tensor:
    share = 1 / positions.counts.to(each.device, each.dtype)  # (B,)
    return (each * share[positions.row.to(each.device)]).sum() / len(share)
