"""Per-sample loss of a batch: the mean cross-entropy over a row's supervised tokens. This convention lives only here.

Logits are formed at the supervised positions alone: with vocabularies of 50k-260k the LM head otherwise dominates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.errors import InvalidInput, NonFinite, Unsupported
from tamis.model.targets import output_embeddings
from tamis.types import Batch

__all__ = ["SupervisedPositions", "evaluation_mode", "per_sample_losses", "require_finite", "supervised_positions"]

_CHUNK = 1 << 21  # logits handled at once: 8 MB of float32, so that temporaries stay in cache


@dataclass(frozen=True, kw_only=True)
class SupervisedPositions:
    """Where a batch's logits are needed, in row order. ``n`` is the number of supervised tokens of the batch."""

    row: Tensor  # (n,) batch row
    slot: Tensor  # (n,) 0, 1, ... within the row
    flat: Tensor  # (n,) position in the (B*T) tokens whose logits predict the label
    labels: Tensor  # (n,)
    counts: Tensor  # (B,) supervised tokens of each row
    width: int  # the largest count


def supervised_positions(batch: Batch) -> SupervisedPositions:
    """The positions that predict a supervised token: ``t - 1`` for a token at ``t``. Position 0 never counts.

    Raises:
        InvalidInput: a row has no supervised token, so its loss is a mean over nothing.
    """
    targets = batch.supervised.clone()
    targets[:, 0] = False
    counts = targets.sum(dim=1)
    lengths = counts.tolist()
    if 0 in lengths:
        empty = [int(r) for r, c in zip(batch.rows.tolist(), lengths, strict=True) if c == 0]
        raise InvalidInput(f"rows {_some(empty)} have no supervised token and therefore no loss; leave them out")
    row, position = targets.nonzero(as_tuple=True)
    starts = counts.cumsum(0) - counts
    return SupervisedPositions(
        row=row,
        slot=torch.arange(row.numel(), device=row.device) - starts[row],
        flat=row * batch.input_ids.shape[1] + position - 1,
        labels=batch.input_ids[row, position],
        counts=counts,
        width=max(lengths),
    )


def per_sample_losses(
    model: nn.Module, batch: Batch, positions: SupervisedPositions | None = None
) -> Float[Tensor, " B"]:
    """Mean cross-entropy of each row over its supervised tokens, in float32 (float64 for float64 models).

    One forward pass without dropout. Differentiable once; the backward pass overwrites the logits with their gradient.

    Raises:
        InvalidInput: a row has no supervised token.
        Unsupported: the model's LM head is not fed ``(B, T, hidden)``.
    """
    positions = supervised_positions(batch) if positions is None else positions
    with evaluation_mode(model), _gathered_before_head(model, positions, tuple(batch.input_ids.shape)):
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits = output.logits.view(-1, output.logits.shape[-1])  # (1, n, V) -> (n, V)
    losses: Tensor = _MeanCrossEntropy.apply(logits, positions)  # type: ignore[no-untyped-call]
    return losses


def require_finite(losses: Tensor, batch: Batch) -> None:
    """Stop before a NaN or infinite loss spreads.

    Raises:
        NonFinite: naming the rows (positions in the corpus), also in its ``rows``.
    """
    good = torch.isfinite(losses)
    if not bool(good.all()):
        rows = tuple(batch.rows[~good.to(batch.rows.device)].tolist())
        raise NonFinite(
            f"the loss of rows {_some(rows)} is NaN or infinite; check the weights, or load the model in another dtype",
            rows=rows,
        )


@contextmanager
def evaluation_mode(model: nn.Module, *, checkpointing: bool = True) -> Iterator[None]:
    """Switch dropout off, keep gradient checkpointing (if wanted), and put every module back as it was.

    Transformers checkpoints a block only while the block itself is in training mode, so exactly those blocks stay in
    it, with the dropout rates they hold themselves set to 0 (their submodules are switched like all others).
    """
    before = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    try:
        for module, _ in before:
            recomputed = checkpointing and torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
            module.training = bool(recomputed)
            if recomputed:
                for name, value in vars(module).items():
                    if "dropout" in name and isinstance(value, float) and value != 0.0:
                        rates.append((module, name, value))
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
        for module, training in before:
            module.training = training


@contextmanager
def _gathered_before_head(model: nn.Module, positions: SupervisedPositions, tokens: tuple[int, ...]) -> Iterator[None]:
    """Feed the LM head the supervised positions only, ``(1, n, hidden)``; what the model does to logits is kept."""

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != tokens:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise Unsupported(f"the LM head of {type(model).__name__} is fed {got}; expected {tokens} tokens x hidden")
        picked = hidden.flatten(0, 1).index_select(0, positions.flat.to(hidden.device))
        return (picked.unsqueeze(0), *args[1:])

    handle = output_embeddings(model).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


class _MeanCrossEntropy(torch.autograd.Function):
    """Cross-entropy that holds one ``(n, V)`` tensor, not three: the logits become their own gradient.

    Writing to the logits raises their version, so a model whose last operation had saved them would stop with
    autograd's error; it would never compute with overwritten numbers.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: SupervisedPositions) -> Tensor:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        labels = positions.labels.to(logits.device)
        log_norm = torch.cat([block.to(dtype).logsumexp(dim=-1) for block in _blocks(logits)])  # (n,)
        token_loss = log_norm - logits.gather(1, labels[:, None])[:, 0].to(dtype)
        ctx.save_for_backward(logits, log_norm, labels)
        ctx.positions = positions
        # Summed in float64 over a dense (B, width) table: reproducible on every device, whatever the row's batch mates.
        exact = dtype if logits.device.type == "mps" else torch.float64
        counts = positions.counts.to(logits.device)
        table = torch.zeros(counts.numel(), positions.width, dtype=exact, device=logits.device)
        table[positions.row.to(logits.device), positions.slot.to(logits.device)] = token_loss.to(exact)
        return (table.sum(dim=1) / counts).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        logits, log_norm, labels = ctx.saved_tensors
        row, counts = ctx.positions.row.to(logits.device), ctx.positions.counts.to(logits.device)
        scale = (grad_losses / counts)[row, None]  # (n, 1)
        grad = logits.detach()
        start = 0
        for block in _blocks(grad):
            part = slice(start, start + block.shape[0])
            probs = block.to(log_norm.dtype)  # the block itself, unless it is in half precision
            probs.sub_(log_norm[part, None]).exp_().mul_(scale[part])
            probs.scatter_add_(1, labels[part, None], -scale[part])
            if probs is not block:
                block.copy_(probs)
            start += block.shape[0]
        return grad, None


def _blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(logits, max(1, _CHUNK // logits.shape[1]))


def _some(rows: tuple[int, ...] | list[int], most: int = 5) -> str:
    shown = ", ".join(str(row) for row in rows[:most])
    return f"{shown} and {len(rows) - most} more" if len(rows) > most else shown
