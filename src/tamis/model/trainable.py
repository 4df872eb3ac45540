"""Every trainable parameter of a model, sorted into layers whose per-sample gradients can be had in one pass.

For updates, where ``targets.gradient_layers`` is for scores: here nothing may be left out, because a parameter without
its part of a weighted gradient would be trained on something else, or not at all.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from tamis.errors import Unsupported
from tamis.model.linear import is_linear
from tamis.model.targets import check_adapter, is_routed, output_embeddings
from tamis.types import LayerSpec

__all__ = ["own_trainable", "trainable_layers"]


def trainable_layers(model: nn.Module) -> tuple[LayerSpec, ...]:
    """Layers that together hold every trainable parameter, in the order of the model's modules.

    Linear layers and ``Conv1D`` with their biases, the LM head, lookup tables, and what other modules without children
    train (norms, lone biases). A matrix shared by embedding and head appears twice; its gradient is the sum of both.

    Raises:
        Unsupported: nothing is trainable, or a parameter is not used by a module of its own; the message names it.
    """
    check_adapter(model)
    head = output_embeddings(model)
    in_head = {id(module) for module in head.modules()}
    layers = []
    for name, module in model.named_modules():
        own = own_trainable(module)
        if not own:
            continue
        first = f"{name}.{next(iter(own))}"
        if is_routed(name):
            raise Unsupported(f"'{first}' belongs to routed experts, whose tokens no longer know their row; freeze it")
        if next(module.children(), None) is not None:
            raise Unsupported(
                f"'{first}' is a parameter of {type(module).__name__}, which has layers inside; only modules without "
                "children can be told apart by rows; freeze it"
            )
        layers.append(_spec(name, module, own, is_head=id(module) in in_head))
    if not layers:
        raise Unsupported(f"{type(model).__name__} has no trainable parameter; unfreeze some or add an adapter")
    return tuple(layers)


def own_trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that ``module`` itself holds, in their order."""
    return {leaf: param for leaf, param in module.named_parameters(recurse=False) if param.requires_grad}


def _spec(name: str, module: nn.Module, own: dict[str, nn.Parameter], *, is_head: bool) -> LayerSpec:
    if isinstance(module, (nn.Linear, Conv1D)) and "weight" in own and is_linear(module):
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        kind = "head" if is_head else "linear" if isinstance(module, nn.Linear) else "conv1d"
        if is_head and isinstance(module, Conv1D):
            raise Unsupported(f"LM head '{name}' is a Conv1D; freeze it")
        return LayerSpec(name=name, out_features=rows, in_features=columns, has_bias="bias" in own, kind=kind)  # type: ignore[arg-type]
    if isinstance(module, nn.Embedding):
        rows, columns = module.weight.shape
        return LayerSpec(name=name, out_features=rows, in_features=columns, has_bias=False, kind="embedding")
    if is_head:
        raise Unsupported(f"LM head '{name}' is a {type(module).__name__}, not a linear layer; freeze it")
    total = sum(param.numel() for param in own.values())
    return LayerSpec(name=name, out_features=total, in_features=1, has_bias=False, kind="vector")
