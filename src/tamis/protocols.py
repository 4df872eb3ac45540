"""The interfaces between rooms: one or two methods each. Implementations never inherit from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tamis.types import LayerSpec, TargetScores

__all__ = [
    "LayerConsumer",
    "LayerwiseProjector",
    "Method",
    "Progress",
    "Projector",
    "ReadsFiles",
    "TwoSidedProjector",
    "VectorProjector",
]


class LayerConsumer(Protocol):
    """Receives the input and the output gradient of every layer during one forward/backward of a batch.

    ``act`` is ``(B, T, I)`` (bias column not appended), ``grad_out`` is ``(B, T, O)`` and zero at padded positions,
    because no loss depends on them. ``consume`` is called once per layer and batch: the uses of a layer that is called
    several times are joined along ``T``, so everything kept has ``B`` and ``T`` as its first axes.
    """

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """In the forward pass: what to remember of ``act`` until its output gradient arrives (it costs memory)."""
        ...

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """In the backward pass: combine the two. Must not keep a reference to ``grad_out`` unless that is its job."""
        ...


@runtime_checkable
class Projector(Protocol):
    """Turns per-sample gradients into features of fewer numbers, with inner products preserved in expectation."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the space, algorithm version included; two features compare only if this is equal."""
        ...

    def output_dim(self, layers: Sequence[LayerSpec]) -> int:
        """Numbers per sample."""
        ...


@runtime_checkable
class TwoSidedProjector(Projector, Protocol):
    """A projector of each layer's ``(O, I)`` gradient from both sides, which needs no gradient to be formed."""

    def sides(
        self, layer: LayerSpec, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """``(O, k_out)`` and ``(I, k_in)``, the bias column's row last; None leaves that side whole."""
        ...


@runtime_checkable
class LayerwiseProjector(Projector, Protocol):
    """A projector whose result is a sum over layers, so that only one layer's gradients exist at a time."""

    def project_layer(self, layer: LayerSpec, grads: Tensor) -> Tensor:
        """The layer's part ``(B, K)`` of the features, from its gradients ``(B, O, I)``."""
        ...


@runtime_checkable
class VectorProjector(Projector, Protocol):
    """A projector of whole gradient vectors."""

    def project(self, grads: Tensor) -> Tensor:
        """``(B, P) -> (B, K)``."""
        ...


class Progress(Protocol):
    """Where long work says how far it is. The library never prints; the command line passes one that does."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Open a stage of ``total`` units; call the result with the number of units just done."""
        ...


class Method(Protocol):
    """A way to score the pool: a frozen dataclass whose fields are its settings."""

    @property
    def name(self) -> str:
        """What a user types to get it."""
        ...

    def score(self, task: Any) -> TargetScores:
        """Score ``task.rows`` against ``task.target_rows``; ``task`` is a ``tamis.collect.Task``.

        Positive means that training on the row lowers the target loss.
        """
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A method with settings that name files or folders: a run is known by what is in them, not by where they are."""

    def by_content(self, model: Any) -> dict[str, Any]:
        """Setting -> plain JSON that is equal if and only if what the files hold is; settings that name none are out.

        ``model`` is the run's ``tamis.model.load.ModelSettings``.
        """
        ...
