"""A decoder's blocks: where they are, a model of only the first of them, and which layers lie in the last of them.

Nothing here knows a model family. The blocks are found by structure: the module that holds the token embedding also
holds one list of as many modules as the config counts. A model of the first blocks applies the whole model's final norm
and head to an early state, which is the *logit lens*; with no block at all they read the embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from tamis.errors import InvalidSettings, Unsupported
from tamis.model.checkpointing import without_checkpointing
from tamis.model.targets import input_embeddings
from tamis.types import LayerSpec

__all__ = ["Decoder", "causal_model", "first_blocks", "graph_of_last_blocks", "last_block_layers", "require_depth"]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A causal language model and the part of it that runs its blocks in turn."""

    model: nn.Module  # the causal language model; an adapter's wrapper is taken off, its layers stay
    stack_name: str  # qualified name of the module that holds embedding, blocks and final norm
    list_name: str  # that module's name for its list of blocks

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, first to last."""
        return cast(nn.ModuleList, getattr(self.model.get_submodule(self.stack_name), self.list_name))

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """Find the blocks of ``model``, with or without an adapter.

        Raises:
            Unsupported: the model is not built as a decoder with one list of blocks.
        """
        causal = causal_model(model)
        embedding = input_embeddings(causal)
        count = int(_text_config(causal).num_hidden_layers)
        for stack_name, stack in causal.named_modules():
            if not any(child is embedding for child in stack.children()):
                continue
            lists = [
                name
                for name, child in stack.named_children()
                if isinstance(child, nn.ModuleList) and len(child) == count
            ]
            if len(lists) == 1:
                return cls(model=causal, stack_name=stack_name, list_name=lists[0])
        raise Unsupported(
            f"{type(causal).__name__} keeps its {count} blocks in no list beside the token embedding, so tamis cannot "
            "tell its blocks apart; choose an embedding that runs the whole model"
        )


def causal_model(model: nn.Module) -> nn.Module:
    """The model itself, without an adapter's wrapper; the adapter's layers stay in it and stay active."""
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def require_depth(model: nn.Module, depth: int, *, at_least: int = 0) -> None:
    """Stop if the model has fewer than ``depth`` blocks.

    Raises:
        InvalidSettings: naming both numbers.
    """
    blocks = len(Decoder.of(model).blocks)
    if not at_least <= depth <= blocks:
        raise InvalidSettings(f"{depth} blocks were asked for; expected {at_least} to {blocks}, all that the model has")


def first_blocks(model: nn.Module, count: int) -> nn.Module:
    """A causal language model of the first ``count`` blocks, then the final norm and the head.

    It shares every weight and block with ``model``; what is new are the modules around the list of blocks and the
    config, which says ``count`` blocks. Call it with ``use_cache=False``: no cache fits it. Hooks of the modules around
    the blocks stay behind.

    Raises:
        InvalidSettings: the model has fewer blocks.
        Unsupported: the model's blocks cannot be found, or its forward is wrapped (spread over devices), because the
            wrapper would run the whole model.
    """
    require_depth(model, count)
    decoder = Decoder.of(model)
    shallow = _copied(decoder.model, count)
    parent = shallow
    for name in decoder.stack_name.split(".") if decoder.stack_name else ():
        parent._modules[name] = _copied(parent.get_submodule(name), count)
        parent = parent.get_submodule(name)
    parent._modules[decoder.list_name] = nn.ModuleList(list(decoder.blocks)[:count])
    return shallow


def last_block_layers(model: nn.Module, layers: Sequence[LayerSpec], count: int) -> tuple[LayerSpec, ...]:
    """Those of ``layers`` that lie in the last ``count`` blocks.

    Raises:
        InvalidSettings: the model has fewer blocks.
        Unsupported: none of the layers lies there (an adapter on other blocks, for example).
    """
    require_depth(model, count, at_least=1)
    blocks = list(Decoder.of(model).blocks)[-count:]
    inside = tuple(name + "." for name, module in model.named_modules() if any(module is block for block in blocks))
    found = tuple(layer for layer in layers if layer.name.startswith(inside))
    if not found:
        raise Unsupported(f"none of the {len(layers)} layers that carry gradients lies in the last {count} blocks")
    return found


@contextmanager
def graph_of_last_blocks(model: nn.Module, count: int) -> Iterator[None]:
    """Inside, a forward pass builds no graph before the last ``count`` blocks and keeps nothing of what runs there.

    Recomputation of activations is off meanwhile: it needs a graph from the embeddings on, and the few activations of
    the last blocks are all that there is to save. Everything is restored on exit.

    Raises:
        InvalidSettings: the model has fewer blocks.
    """
    require_depth(model, count, at_least=1)
    blocks = Decoder.of(model).blocks
    was_enabled = torch.is_grad_enabled()
    handles: list[RemovableHandle] = []
    if count < len(blocks):
        handles.append(blocks[0].register_forward_pre_hook(lambda module, args: _switch_graph(False)))
        handles.append(blocks[-count].register_forward_pre_hook(lambda module, args: _switch_graph(True)))
    try:
        with without_checkpointing(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        _switch_graph(was_enabled)  # an error on the way would leave it off


def _switch_graph(on: bool) -> None:
    torch.set_grad_enabled(on)


def _copied(module: nn.Module, count: int) -> nn.Module:
    """The same module under a new object, with its own dicts of children and hooks and a config of ``count`` blocks."""
    if "forward" in vars(module):
        raise Unsupported(
            f"the forward of {type(module).__name__} is wrapped (as device_map does), so its first {count} blocks "
            "cannot run alone; load the model on one device, or choose an embedding that runs the whole model"
        )
    new = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict) and "_hooks" in name:
            vars(new)[name] = type(value)()
        elif name in ("_modules", "_parameters", "_buffers"):
            vars(new)[name] = dict(value)
    config = getattr(module, "config", None)
    if config is not None:
        vars(new)["config"] = _shortened(config, count)
    return new


def _shortened(config: Any, count: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = count
    if kinds:
        text.layer_types = list(kinds[:count])
    return config


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()
