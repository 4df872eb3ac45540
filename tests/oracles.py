"""Slow and certain references that the fast paths are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tamis.gradients.reference import reference_gradients
from tamis.types import Batch, LayerSpec


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
