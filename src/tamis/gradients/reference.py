"""The slow loop: one example at a time, plain autograd with trainable weights. Oracle for tests and for a check run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.model.loss import evaluation_mode
from tamis.model.lowrank import LowRankLinear, moved_products
from tamis.types import Batch, LayerSpec

__all__ = ["reference_gradients", "reference_loss"]


def reference_loss(model: nn.Module, input_ids: Tensor, supervised: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy of one unpadded row, from full logits."""
    logits = model(input_ids=input_ids[None], use_cache=False).logits[0]
    counts = supervised.clone()
    counts[0] = False
    predicted = logits[:-1][counts[1:]]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return nn.functional.cross_entropy(predicted.to(dtype), input_ids[1:][counts[1:]])


def reference_gradients(
    model: nn.Module, batch: Batch, layers: Sequence[LayerSpec]
) -> tuple[Float[Tensor, " B"], list[dict[str, Float[Tensor, "O I2"]]]]:
    """Losses, and per row ``{layer name: gradient (O, I + bias)}``, by autograd on the weights themselves."""
    modules = dict(model.named_modules())
    # A factored layer's matrix is nowhere stored; its gradient is that of a matrix of zeros added to the product.
    moves = {
        layer.name: torch.zeros(layer.shape, device=found.A.weight.device, dtype=found.A.weight.dtype).requires_grad_()
        for layer in layers
        if isinstance(found := modules[layer.name], LowRankLinear)
    }
    losses, grads = [], []
    with evaluation_mode(model, checkpointing=False), torch.enable_grad(), moved_products(model, moves):
        for ids, mask, supervised in zip(batch.input_ids, batch.attention_mask, batch.supervised, strict=True):
            length = int(mask.sum())
            loss = reference_loss(model, ids[:length], supervised[:length])
            plain = [layer for layer in layers if layer.name not in moves]
            params = [p for layer in plain for p in _params(modules[layer.name], layer)]
            found = iter(torch.autograd.grad(loss, [*moves.values(), *params]))
            moved = {name: next(found) for name in moves}
            of_plain = {layer.name: _as_matrix(layer, found) for layer in plain}
            grads.append({layer.name: {**moved, **of_plain}[layer.name] for layer in layers})
            losses.append(loss.detach())
    return torch.stack(losses), grads


def _params(module: nn.Module, layer: LayerSpec) -> list[Tensor]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    return [weight, bias] if layer.has_bias and isinstance(bias, Tensor) else [weight]


def _as_matrix(layer: LayerSpec, found: object) -> Tensor:
    weight: Tensor = next(found)  # type: ignore[call-overload]  # an iterator of tensors
    matrix = weight.T if layer.kind == "conv1d" else weight
    if layer.has_bias:
        matrix = torch.cat([matrix, next(found)[:, None]], dim=1)  # type: ignore[call-overload]
    return matrix
