"""The interfaces between rooms: one or two methods each. Implementations never inherit from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from tamis.types import LayerSpec

__all__ = ["LayerConsumer", "Progress", "Projector"]


class LayerConsumer(Protocol):
    """Receives the input and the output gradient of every layer during one forward/backward of a batch.

    Called once per layer and use of that layer. ``act`` is ``(B, T, I)`` (bias column not appended), ``grad_out`` is
    ``(B, T, O)``, both zero contributions at padded positions guaranteed by the loss mask (``grad_out`` is zero there).
    """

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """In the forward pass: what to remember of ``act`` until its output gradient arrives (it costs memory)."""
        ...

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """In the backward pass: combine the two. Must not keep a reference to ``grad_out`` unless that is its job."""
        ...


class Projector(Protocol):
    """Turns per-sample gradients into features of fewer numbers, with inner products preserved in expectation."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the space, algorithm version included; two features compare only if this is equal."""
        ...

    def output_dim(self, layers: Sequence[LayerSpec]) -> int:
        """Numbers per sample."""
        ...


class Progress(Protocol):
    """Where long work says how far it is. The library never prints; the command line passes one that does."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Open a stage of ``total`` units; call the result with the number of units just done."""
        ...
