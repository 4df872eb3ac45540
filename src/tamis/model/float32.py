"""A forward pass in float32 whatever the weights are stored in: where 16 bits would round away what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.maths.autocast import autocast_off
from tamis.model.blocks import Decoder

__all__ = ["in_float32"]

_NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes in float32 at least, also under autocast: 16-bit weights are cast while they are used.

    Memory grows by one block and what lies around the blocks, the embeddings and the head, in float32; a model whose
    blocks cannot be told apart is cast as a whole. Weights that are quantized compute as they always do.
    """
    with ExitStack() as stack:
        stack.enter_context(autocast_off())
        stack.enter_context(_without_own_autocast(model))
        for module, parts in _units(model):
            if any(tensor is not None and tensor.dtype in _NARROW for part in parts for tensor in _tensors(part)):
                stack.enter_context(_widened_while_it_runs(module, parts))
        yield


def _units(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Modules that run, each with those whose tensors are cast while it does: parts look into one another's."""
    try:
        blocks = list(Decoder.of(model).blocks)
    except Unsupported:
        return [(model, list(model.modules()))]
    inside = {part for block in blocks for part in block.modules()}
    around = [module for module in model.modules() if module not in inside]
    return [(model, around), *((block, list(block.modules())) for block in blocks)]


def _tensors(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


@contextmanager
def _widened_while_it_runs(module: nn.Module, parts: list[nn.Module]) -> Iterator[None]:
    narrow = list[tuple[dict[str, Any], str, Tensor]]()

    def widen(*_: Any) -> None:
        for part in parts:
            owners: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for own in owners:
                for name, tensor in own.items():
                    if tensor is not None and tensor.dtype in _NARROW:
                        narrow.append((own, name, tensor))
                        own[name] = tensor.float()

    def restore(*_: Any) -> None:
        while narrow:
            own, name, tensor = narrow.pop()
            own[name] = tensor

    hooks = module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True)
    try:
        yield
    finally:
        restore()
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_own_autocast(model: nn.Module) -> Iterator[None]:
    """A Trainer in 16 bits leaves a forward on its model that enters autocast, which no context around it undoes."""
    owners: list[Any] = [module for module in model.modules() if "_original_forward" in module.__dict__]
    wrapped = [owner.forward for owner in owners]
    for owner in owners:
        owner.forward = owner._original_forward
    try:
        yield
    finally:
        for owner, forward in zip(owners, wrapped, strict=True):
            owner.forward = forward
