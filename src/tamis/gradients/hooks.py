"""Taps that hand every layer's input and output gradient to a consumer, with all weights frozen.

A tap is an identity in the autograd graph behind the layer. What the consumer wants to remember of the input is saved
the way autograd saves tensors, so gradient checkpointing drops and recomputes it like everything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tamis.errors import Unsupported
from tamis.maths.autocast import autocast_off
from tamis.model.checkpointing import is_checkpointed
from tamis.model.loss import SupervisedPositions
from tamis.model.targets import input_embeddings, is_tied
from tamis.protocols import LayerConsumer
from tamis.types import Batch, LayerSpec

__all__ = ["Capture", "capture", "frozen"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside, so autograd runs no weight-gradient matmul; restored afterwards."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    for param in trainable:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in trainable:
            param.requires_grad_(True)


@contextmanager
def capture(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    consumer: LayerConsumer,
    batch: Batch,
    positions: SupervisedPositions,
) -> Iterator[Capture]:
    """Tap ``layers`` for one forward/backward of ``batch``; every hook is removed on exit, also after an error.

    Call the result's ``forward_done`` between the forward and the backward pass, and ``check`` after the latter.
    """
    state = Capture(consumer, batch, positions)
    modules = dict(model.named_modules())
    embedding = input_embeddings(model)
    handles: list[RemovableHandle] = []
    try:
        # Checkpointed blocks run again only if their input requires a gradient; without them the graph starts at the
        # first tap, which spares everything before it (the first block's queries, keys and values, for one).
        if any(map(is_checkpointed, modules.values())):
            handles.append(embedding.register_forward_hook(_start_of_gradient))
        lookups = {layer.name for layer in layers if layer.kind == "embedding"}
        own_lookup = any(
            modules[name] is embedding for name in lookups
        )  # then the caller adds a tied matrix's two parts
        for layer in layers:
            module = modules[layer.name]
            if layer.kind == "embedding":
                handles.append(module.register_forward_pre_hook(state.lookup_by_row))
                handles.append(module.register_forward_hook(state.tap_lookup(layer)))
            elif layer.kind == "vector":
                handles.append(module.register_forward_hook(state.tap_single_input(layer), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(state.tap(layer)))
            if layer.kind == "head" and is_tied(model) and not own_lookup:
                handles.append(embedding.register_forward_hook(state.tap_lookup(layer)))
        yield state
    finally:
        for handle in handles:
            handle.remove()


class Capture:
    """What one forward/backward knows about its taps: how often each layer was used, and whose gradient came back."""

    def __init__(self, consumer: LayerConsumer, batch: Batch, positions: SupervisedPositions) -> None:
        self._consumer, self._positions = consumer, positions
        self._tokens = tuple(batch.input_ids.shape)  # (B, T)
        self._uses: dict[str, int] = defaultdict(int)
        self._arrived: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = defaultdict(list)
        self._done: set[str] = set()
        self._in_forward = True  # checkpointing runs the layers again during backward: not a second use

    def forward_done(self) -> None:
        """From here on, calls of a layer are recomputations."""
        self._in_forward = False

    def check(self, layers: Sequence[LayerSpec]) -> None:
        """Every layer must have been called and given a gradient.

        Raises:
            Unsupported: naming the first layer that was not; its gradient would silently be missing.
        """
        for layer in layers:
            if layer.name not in self._done:
                what = "received no gradient" if self._uses[layer.name] else "was never called as a module"
                raise Unsupported(f"layer '{layer.name}' {what}, so its per-sample gradient cannot be captured")

    def tap(self, layer: LayerSpec) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        """A forward hook for the module of ``layer``."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._in_forward:
                self._uses[layer.name] += 1
            if not torch.is_grad_enabled():  # the first forward of reentrant checkpointing builds no graph
                return None
            if not output.requires_grad:
                output = _start_of_gradient(module, args, output)
            tapped: Tensor = _Tap.apply(output, self, layer, args[0].detach())  # type: ignore[no-untyped-call]
            return tapped

        return hook

    def tap_single_input(
        self, layer: LayerSpec
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        """A forward hook for a module whose gradient is found by running it again on its one input.

        Raises (when the model runs):
            Unsupported: the module takes more than one input, which would be missing when it runs again, or gives more
                than one output.
        """
        tap = self.tap(layer)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                raise Unsupported(
                    f"'{layer.name}' ({type(module).__name__}) trains parameters of its own and takes or gives more "
                    "than one tensor, so their per-sample gradient cannot be captured; freeze them"
                )
            return tap(module, args, output)

        return hook

    def lookup_by_row(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook for lookup tables: positions shared by all rows, ``(1, T)``, are looked up for each."""
        rows, width = self._tokens
        if args and isinstance(args[0], Tensor) and args[0].shape == (1, width) and rows > 1:
            return (args[0].expand(rows, width), *args[1:])
        return None

    def tap_lookup(self, layer: LayerSpec) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        """A forward hook for a lookup table, or for the embedding whose matrix is the tied head's.

        A lookup adds ``onehot(id)^T g`` to the matrix's gradient, which is a linear layer's ``grad_out^T act`` with the
        one-hot ids as ``grad_out`` and the embedding's output gradient as ``act``; so it is handed over for a tied
        head. A table of its own is handed over as the ids (kept) and the gradient of its output.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self._in_forward:
                self._uses[layer.name] += 1
            if not output.requires_grad:
                output = _start_of_gradient(module, args, output)
            ids = args[0]
            scale = _lookup_scale(module, ids, output)
            tapped: Tensor = _EmbeddingTap.apply(output, self, layer, module, ids, scale)  # type: ignore[no-untyped-call]
            return tapped

        return hook

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """What the consumer remembers of a layer's input, brought to ``(B, T, I)``."""
        with autocast_off():
            return self._consumer.keep(layer, self._by_row(layer, act))

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """Hand one layer to the consumer; uses of a shared layer are joined along the tokens, whose sum they are."""
        self._hand_over(layer, kept, self._by_row(layer, grad_out))

    def consume_lookup(self, layer: LayerSpec, embedding: nn.Module, ids: Tensor, grad: Tensor) -> None:
        """A table's own gradient, or the token embedding's part of a tied matrix."""
        if layer.kind == "embedding":
            if tuple(ids.shape) != self._tokens:
                raise Unsupported(
                    f"table '{layer.name}' is looked up with ids of shape {tuple(ids.shape)}; expected "
                    f"{self._tokens}, so its rows cannot be told apart; freeze it"
                )
            padding_idx = getattr(embedding, "padding_idx", None)
            if padding_idx is not None:  # PyTorch never gives this row a gradient
                grad = grad.masked_fill((ids == padding_idx)[..., None], 0)
            self._hand_over(layer, self._consumer.keep(layer, ids), grad)
            return
        # Not nn.functional.one_hot: its (B, T, V) of int64 is four times the memory of a half-precision gradient.
        onehot = grad.new_zeros(*ids.shape, layer.out_features).scatter_(-1, ids[..., None], 1)
        padding_idx = getattr(embedding, "padding_idx", None)
        if padding_idx is not None:  # PyTorch never gives this row a gradient
            onehot[..., padding_idx] = 0
        self._hand_over(layer, self._consumer.keep(layer, grad), onehot)

    def _hand_over(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        if self._uses[layer.name] > 1:
            arrived = self._arrived[layer.name]
            arrived.append((kept, grad_out))
            if len(arrived) < self._uses[layer.name]:
                return
            kept = tuple(torch.cat(parts, dim=1) for parts in zip(*(k for k, _ in arrived), strict=True))
            grad_out = torch.cat([g for _, g in arrived], dim=1)
            del self._arrived[layer.name]
        with autocast_off():
            self._consumer.consume(layer, kept, grad_out)
        self._done.add(layer.name)

    def _by_row(self, layer: LayerSpec, x: Tensor) -> Tensor:
        """``(B, T, features)`` of what a layer saw or gave."""
        if layer.kind == "head":  # (1, n, features): the supervised positions only
            at = self._positions
            padded = x.new_zeros(self._tokens[0], at.width, x.shape[-1])
            padded[at.row.to(x.device), at.slot.to(x.device)] = x[0]
            return padded
        if x.shape[:-1] == self._tokens or (layer.kind == "vector" and x.dim() > 2 and x.shape[0] == self._tokens[0]):
            return x
        if x.dim() == 2 and x.shape[0] == self._tokens[0] * self._tokens[1]:  # some models flatten their tokens
            return x.view(*self._tokens, x.shape[1])
        raise Unsupported(
            f"layer '{layer.name}' works on a tensor of shape {tuple(x.shape)}; expected {self._tokens} tokens x "
            "features, so its rows cannot be told apart"
        )


class _Tap(torch.autograd.Function):
    """Identity; gives ``(kept, grad_out)`` to the capture when the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, capture: Capture, layer: LayerSpec, act: Tensor) -> Tensor:
        ctx.capture, ctx.layer = capture, layer
        ctx.save_for_backward(*capture.keep(layer, act))
        return _same_memory(output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.capture.consume(ctx.layer, ctx.saved_tensors, grad_out)
        return grad_out, None, None, None


class _EmbeddingTap(torch.autograd.Function):
    """Identity behind the token embedding; gives its output gradient to the capture."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, capture: Capture, layer: LayerSpec, embedding: nn.Module, ids: Tensor, scale: float
    ) -> Tensor:
        ctx.capture, ctx.layer, ctx.embedding, ctx.ids, ctx.scale = capture, layer, embedding, ids, scale
        return _same_memory(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        scaled = grad if ctx.scale == 1.0 else grad * ctx.scale
        ctx.capture.consume_lookup(ctx.layer, ctx.embedding, ctx.ids, scaled)
        return grad, None, None, None, None, None


def _same_memory(output: Tensor) -> Tensor:
    """The output under another tensor object, as an identity's result must be.

    Not as a view: models that add to a layer's output in place (Falcon, Gemma 3n) could not do so to a view that a
    custom function returned. No layer saves its own output, so nothing that autograd needs is changed by them.
    """
    same: Tensor = output.new_empty(0)
    return same.set_(output.untyped_storage(), output.storage_offset(), output.shape, output.stride())


def _start_of_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """With every weight frozen, the graph starts at an output that needs a gradient."""
    return output.detach().requires_grad_()


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Value for value; NaN is the same as NaN, so that a run which diverged is told of that."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _lookup_scale(embedding: nn.Module, ids: Tensor, output: Tensor) -> float:
    """The constant by which a model multiplies rows of its embedding inside the module (Gemma), else 1.

    Raises:
        Unsupported: the module does anything else with its rows, so the matrix's gradient would be wrong.
    """
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    constant = getattr(embedding, "embed_scale", 1.0)
    factor = constant.to(weight.dtype) if isinstance(constant, Tensor) else constant
    scales_by_frequency = getattr(embedding, "scale_grad_by_freq", False)
    expected = nn.functional.embedding(ids, weight.detach()) * factor
    if scales_by_frequency or not _are_same(output.detach(), expected):
        raise Unsupported(
            f"the token embedding {type(embedding).__name__} is no plain lookup; leave the head out, or freeze it"
        )
    return float(factor)
