"""Parameters as the matrices that per-sample gradients come in, and back: weights beside biases, tied tables once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tamis.maths.low_rank import cutting_pays
from tamis.model.trainable import own_trainable
from tamis.types import LayerSpec

__all__ = ["ParamMatrix", "param_matrices"]


@dataclass(frozen=True, kw_only=True)
class ParamMatrix:
    """One matrix of trainable numbers and the layers whose gradients add up to its own: one, or head and embedding."""

    name: str  # of its first layer
    layers: tuple[LayerSpec, ...]
    params: tuple[tuple[str, nn.Parameter], ...]  # qualified name and parameter, in the order of the matrix's parts
    transposed: bool  # the module stores (I, O)

    @property
    def kind(self) -> str:
        """Of its first layer."""
        return self.layers[0].kind

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``, a bias column included."""
        return self.layers[0].shape

    def is_cut_to(self, rank: int | None) -> bool:
        """Whether a direction is cut to ``rank`` here: in layers that multiply by the matrix, and where it saves work.

        A table that is looked up and a norm's weights are never; None cuts nothing.
        """
        multiplies = any(layer.kind in ("linear", "conv1d", "head") for layer in self.layers)
        return rank is not None and multiplies and cutting_pays(self.shape, rank)

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``(O, I)`` from one tensor per parameter, each in its parameter's shape."""
        parts = [tensors[name] for name, _ in self.params]
        if self.kind == "vector":
            return torch.cat([part.flatten() for part in parts])[:, None]
        matrix = parts[0].T if self.transposed else parts[0]
        return torch.cat([matrix, parts[1][:, None]], dim=1) if len(parts) > 1 else matrix

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of ``joined``, in memory of their own: fused optimizers read gradients as if they were dense."""
        if self.kind == "vector":
            sizes = [param.numel() for _, param in self.params]
            parts = torch.split(matrix[:, 0], sizes)
            return {name: part.clone().view_as(param) for part, (name, param) in zip(parts, self.params, strict=True)}
        width = self.layers[0].in_features
        weight = matrix[:, :width]
        found = {self.params[0][0]: (weight.T if self.transposed else weight).contiguous()}
        if len(self.params) > 1:
            found[self.params[1][0]] = matrix[:, width].contiguous()
        return found


def param_matrices(model: nn.Module, layers: Sequence[LayerSpec]) -> tuple[ParamMatrix, ...]:
    """The matrices behind ``layers`` (of ``trainable_layers``); layers that share a parameter share a matrix."""
    modules = dict(model.named_modules())
    names = {id(param): name for name, param in model.named_parameters()}  # a tied parameter has one name
    grouped: dict[int, list[LayerSpec]] = {}
    for layer in layers:
        grouped.setdefault(id(next(iter(_own(modules[layer.name], layer).values()))), []).append(layer)
    matrices = []
    for group in grouped.values():
        group.sort(key=lambda layer: not layer.has_bias)  # a tied head's bias belongs to the shared matrix too
        module = modules[group[0].name]
        params = tuple((names[id(param)], param) for param in _own(module, group[0]).values())
        matrices.append(
            ParamMatrix(name=group[0].name, layers=tuple(group), params=params, transposed=isinstance(module, Conv1D))
        )
    return tuple(matrices)


def _own(module: nn.Module, layer: LayerSpec) -> dict[str, nn.Parameter]:
    """Trainable parameters of a layer in the order of its matrix: the weight before the bias."""
    own = own_trainable(module)
    if layer.kind == "vector":
        return own
    return {leaf: own[leaf] for leaf in ("weight", "bias") if leaf in own}
