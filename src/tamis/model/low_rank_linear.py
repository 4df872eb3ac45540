"""A linear layer in two factors, and how such layers are put in a model's place of plain ones.

A proxy of *IProX* is its target with ``W x + b`` replaced by ``A (B x) + b``. The layer is known to the gradient
engine as one matrix (its *product*, comparable with the target's own) or as its two factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["LowRankLinear", "Space", "low_rank_layers", "moved_products", "put_low_rank_layers", "set_space"]

Space = Literal["product", "factors"]


class LowRankLinear(nn.Module):
    """``A (B x) + b``. The bias lies in ``A``, so that both factors are ordinary layers to whatever wraps them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        space: Space = "product",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.B = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.A = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.space: Space = space  # what per-sample gradients are taken of

    def forward(self, x: Tensor) -> Tensor:
        """In the factors' own element type: alignment keeps them in float32 in a half-precision model."""
        out: Tensor = self.A(self.B(x.to(self.B.weight.dtype)))
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` adds."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def put_low_rank_layers(model: nn.Module, ranks: Mapping[str, int], *, space: Space) -> None:
    """Replace the linear layers (or ``Conv1D``) of these names by factors with whatever numbers memory holds.

    They take the device and element type of the layers that they replace.

    Raises:
        KeyError: the model has no linear layer of such a name; the caller knows which file asked for it.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        old = modules.get(name)
        if not isinstance(old, (nn.Linear, Conv1D)):
            raise KeyError(name)
        out_features, in_features = old.weight.shape
        if isinstance(old, Conv1D):
            out_features, in_features = in_features, out_features
        new = LowRankLinear(
            in_features,
            out_features,
            rank,
            bias=old.bias is not None,
            space=space,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, new)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The factored layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def set_space(model: nn.Module, space: Space) -> None:
    """Say what per-sample gradients of the factored layers are taken of."""
    for layer in low_rank_layers(model).values():
        layer.space = space


@contextmanager
def moved_products(model: nn.Module, moves: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, factored layers act as ``A B + move``: ``(O, I)``, or ``(O, I + 1)`` with the bias's move last.

    A gradient or tangent of the move is that of the product, which is nowhere stored.
    """

    def hook(move: Tensor) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            width = args[0].shape[-1]
            change = args[0] @ move[:, :width].T
            moved: Tensor = output + (change + move[:, -1] if move.shape[1] > width else change)
            return moved

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(move)) for name, move in moves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
