"""Slow and certain references that the fast paths are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tamis.model.loss import evaluation_mode
from tamis.model.low_rank_linear import LowRankLinear, moved_products
from tamis.types import Batch, LayerSpec


def reference_loss(model: nn.Module, input_ids: Tensor, supervised: Tensor) -> Tensor:
    """Mean cross-entropy of one unpadded row, from full logits."""
    logits = model(input_ids=input_ids[None], use_cache=False).logits[0]
    counts = supervised.clone()
    counts[0] = False
    predicted = logits[:-1][counts[1:]]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return nn.functional.cross_entropy(predicted.to(dtype), input_ids[1:][counts[1:]])


def reference_gradients(
    model: nn.Module, batch: Batch, layers: Sequence[LayerSpec]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
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


def loop_gradients(model: nn.Module, batch: Batch, layers: Sequence[LayerSpec]) -> tuple[Tensor, Tensor]:
    """Losses ``(B,)`` and flat per-sample gradients ``(B, P)``: one row at a time, autograd on trainable weights."""
    losses, grads = reference_gradients(model, batch, layers)
    return losses, torch.stack([torch.cat([row[layer.name].flatten() for layer in layers]) for row in grads])


def functional_gradients(model: nn.Module, batch: Batch, layers: Sequence[LayerSpec]) -> Tensor:
    """Flat per-sample gradients ``(B, P)`` by ``torch.func``: ``vmap`` of ``grad`` over a functional call.

    Its own loss, from full logits and a padded batch of one, so it shares no line with the engine.
    """
    weights = {name: param.detach() for name, param in model.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def loss(chosen: dict[str, Tensor], ids: Tensor, mask: Tensor, supervised: Tensor) -> Tensor:
        call = {"input_ids": ids[None], "attention_mask": mask[None], "use_cache": False}
        logits = torch.func.functional_call(model, ({**weights, **chosen}, buffers), (), call, tie_weights=True).logits[
            0
        ]
        log_probs = torch.log_softmax(logits[:-1].double(), dim=-1)
        token_loss = -log_probs.gather(1, ids[1:, None])[:, 0]
        counts = supervised[1:].to(token_loss.dtype)
        return (token_loss * counts).sum() / counts.sum()

    names: dict[str, tuple[LayerSpec, str]] = {}
    modules = dict(model.named_modules())
    known = {id(param): name for name, param in model.named_parameters()}
    for layer in layers:
        names[known[id(modules[layer.name].weight)]] = (layer, "weight")
        if layer.has_bias:
            names[known[id(modules[layer.name].bias)]] = (layer, "bias")
    chosen = {name: weights[name] for name in names}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(
        chosen, batch.input_ids, batch.attention_mask, batch.supervised
    )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, (layer, leaf) in names.items():
        parts.setdefault(layer.name, {})[leaf] = found[name]
    flat = []
    for layer in layers:
        matrix = parts[layer.name]["weight"]
        matrix = matrix.mT if layer.kind == "conv1d" else matrix
        if layer.has_bias:
            matrix = torch.cat([matrix, parts[layer.name]["bias"][:, :, None]], dim=2)
        flat.append(matrix.flatten(1))
    return torch.cat(flat, dim=1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||``, the largest over rows."""
    got, expected = got.double().reshape(len(got), -1), expected.double().reshape(len(expected), -1)
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())


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


def adam_scores(
    grads: Tensor, scale: Tensor, target: Tensor, offset_product: Tensor | None = None, *, step: float = 0.0
) -> Tensor:
    """Equation 8 of Influence Distillation: ``p = (G ⊙ a)(g_T - step · H_T b)`` for ``G (n, P)``; ``step`` is η/n."""
    return (grads * scale) @ (target if offset_product is None else target - step * offset_product)


def adam_quadratic(grads: Tensor, scale: Tensor, hessian_products: Tensor) -> Tensor:
    """Equation 9, symmetrised and times n: ``(G ⊙ a) H_T (G ⊙ a)^T`` from ``H_T`` times each row of ``G ⊙ a``.

    With a of ones it is equation 4.
    """
    q = (grads * scale) @ hessian_products.T
    return (q + q.T) / 2
