"""Which layers of a model can be put in factors, and by name why the others cannot.

The linear layers of the blocks are compressed. Embeddings, norms and the LM head stay as they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.model.blocks import Decoder
from tamis.model.loss import per_sample_losses
from tamis.model.targets import coverage, embedding_matrix, gradient_layers
from tamis.types import Batch, LayerSpec

__all__ = ["Compressible", "LeftOut", "find_compressible"]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Layers that stay as they are; block numbers are replaced by ``*``."""

    layers: str
    numel: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Compressible:
    """The layers to compress, in the model's order, and the matrices that stay although they are large."""

    layers: tuple[LayerSpec, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Numbers in the layers' matrices, biases apart."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)


def find_compressible(model: nn.Module, batch: Batch) -> Compressible:
    """Look at the model and run one batch through it to see which of its linear layers act as such.

    Raises:
        Unsupported: none does.
    """
    layers = gradient_layers(model)
    reasons: dict[str, str] = {}
    inside, notes = _names_inside_blocks(model)
    seen = _uses(model, layers, batch)
    for layer in layers:
        if not layer.name.startswith(inside):
            reasons[layer.name] = "stands outside the blocks"
        elif len(seen[layer.name]) != 1:
            uses = len(seen[layer.name])
            reasons[layer.name] = f"is used {uses} times in a pass" if uses else "is not called as a module"
        elif not seen[layer.name][0]:
            reasons[layer.name] = "does not work on one vector per token"
        elif min(layer.out_features, layer.in_features) < 2:
            reasons[layer.name] = "is too small: its factors would hold no fewer numbers"
    kept = tuple(layer for layer in layers if layer.name not in reasons)
    if not kept:
        first = f" ('{layers[0].name}' {reasons[layers[0].name]})" if layers else ""
        raise Unsupported(f"{type(model).__name__} has no linear layer that can be put in factors{first}")
    left_out = (*_grouped(layers, reasons), *_matrices_not_seen(model, layers))
    return Compressible(layers=kept, left_out=left_out, notes=notes)


def _names_inside_blocks(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Beginnings of the names of layers in blocks, and what to say where blocks cannot be told apart."""
    try:
        decoder = Decoder.of(model)
    except Unsupported:
        said = f"The blocks of {type(model).__name__} cannot be told apart, so every linear layer but its head counts."
        return ("",), (said,)
    blocks = {id(block) for block in decoder.blocks}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in blocks), ()


def _uses(model: nn.Module, layers: Sequence[LayerSpec], batch: Batch) -> dict[str, list[bool]]:
    """For each layer, one entry a call: whether it was given one vector per token."""
    batch = batch.to(embedding_matrix(model).device)
    rows, width = batch.input_ids.shape
    uses: dict[str, list[bool]] = defaultdict(list)

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            act = args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None
            fits = act is not None and isinstance(output, Tensor)
            uses[name].append(fits and act is not None and act.shape[:-1] in ((rows, width), (rows * width,)))

        return note

    handles = [model.get_submodule(layer.name).register_forward_hook(hook(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            per_sample_losses(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return uses


def _grouped(layers: Sequence[LayerSpec], reasons: dict[str, str]) -> list[LeftOut]:
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for layer in layers:
        if layer.name in reasons:
            groups[_pattern(layer.name), reasons[layer.name]] += layer.out_features * layer.in_features
    return [LeftOut(layers=name, numel=numel, reason=reason) for (name, reason), numel in groups.items()]


def _matrices_not_seen(model: nn.Module, layers: Sequence[LayerSpec]) -> list[LeftOut]:
    """Experts and matrices of other modules: no linear layers to begin with."""
    return [
        LeftOut(layers=row.parameters, numel=row.numel, reason=row.reason)
        for row in coverage(model, layers).rows
        if not row.covered and ("expert" in row.reason or "is not a linear layer" in row.reason)
    ]


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
