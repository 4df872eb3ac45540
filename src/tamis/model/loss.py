"""Per-sample loss of a batch: the mean cross-entropy over a row's supervised tokens. This convention lives only here.

Logits are formed at the supervised positions alone: with vocabularies of 50k-260k the LM head otherwise dominates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.errors import InvalidInput, NonFinite, Unsupported
from tamis.model.checkpointing import is_checkpointed
from tamis.model.targets import output_embeddings
from tamis.types import Batch

__all__ = [
    "SupervisedPositions",
    "evaluation_mode",
    "gathered_before_head",
    "per_sample_losses",
    "require_finite",
    "supervised_logits",
    "supervised_positions",
    "twice_differentiable_losses",
]

# Logits handled at once: 1 MB of float32 that stays in each core's cache; on a GPU few launches matter more.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 26


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
    model: nn.Module,
    batch: Batch,
    positions: SupervisedPositions | None = None,
    *,
    relabel: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, " B"]:
    """Mean cross-entropy of each row over its supervised tokens, in float32 (float64 for float64 models).

    One forward pass without dropout. Differentiable once. ``relabel`` gives other labels, from the ``(n, V)`` logits.

    Raises:
        InvalidInput: a row has no supervised token.
        Unsupported: the model's LM head is not fed ``(B, T, hidden)``.
    """
    positions = supervised_positions(batch) if positions is None else positions
    logits = supervised_logits(model, batch, positions)
    if relabel is not None:
        positions = replace(positions, labels=relabel(logits))
    losses: Tensor = _MeanCrossEntropy.apply(logits, positions)  # type: ignore[no-untyped-call]
    return losses


def twice_differentiable_losses(model: nn.Module, batch: Batch) -> Float[Tensor, " B"]:
    """The losses of ``per_sample_losses``, differentiable as often as the model is, for two or three times the memory.

    Gradient checkpointing is off: its recomputation cannot be differentiated again.

    Raises:
        InvalidInput: a row has no supervised token.
        Unsupported: the model's LM head is not fed ``(B, T, hidden)``.
    """
    positions = supervised_positions(batch)
    logits = supervised_logits(model, batch, positions, checkpointing=False)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    labels, row, counts = (x.to(logits.device) for x in (positions.labels, positions.row, positions.counts))
    token_losses = nn.functional.cross_entropy(logits.to(dtype), labels, reduction="none")
    return token_losses.new_zeros(len(counts)).index_add(0, row, token_losses) / counts


def supervised_logits(
    model: nn.Module, batch: Batch, positions: SupervisedPositions, *, checkpointing: bool = True
) -> Float[Tensor, "n V"]:
    """The logits that predict the supervised tokens, in the order of ``positions``: one forward pass without dropout.

    Raises:
        Unsupported: the model's LM head is not fed ``(B, T, hidden)``.
    """
    tokens = tuple(batch.input_ids.shape)
    with evaluation_mode(model, checkpointing=checkpointing), gathered_before_head(model, positions, tokens):
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits: Tensor = output.logits.view(-1, output.logits.shape[-1])  # (1, n, V) -> (n, V)
    return logits


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
            recomputed = checkpointing and torch.is_grad_enabled() and is_checkpointed(module)
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
def gathered_before_head(model: nn.Module, positions: SupervisedPositions, tokens: tuple[int, ...]) -> Iterator[None]:
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
    """Cross-entropy that holds one ``(n, V)`` tensor, not three: each block of logits becomes its gradient at once.

    Writing to the logits raises their version, so a model whose last operation had saved them would stop with
    autograd's error; it would never compute with overwritten numbers.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: SupervisedPositions) -> Tensor:
        device = logits.device
        overwritten = logits.detach()  # same memory and version; no view of a tapped head's output, say
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        labels, row, counts = (x.to(device) for x in (positions.labels, positions.row, positions.counts))
        scale = (1 / counts.to(dtype))[row, None]  # (n, 1): d(mean)/d(token loss)
        smallest = torch.finfo(dtype).tiny / torch.finfo(dtype).eps  # below it a probability has lost digits
        token_loss = torch.empty(len(labels), dtype=dtype, device=device)
        chunk = _CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK
        rows = max(1, chunk // logits.shape[1])
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            block, label = logits[part].to(dtype), labels[part, None]
            probs = torch.softmax(block, dim=1)
            likelihood = probs.gather(1, label)
            surprise = -likelihood.log()
            if bool((likelihood < smallest).any()):  # rare; those tokens alone, so that no token sees its neighbours
                in_logs = block.logsumexp(dim=1, keepdim=True) - block.gather(1, label)
                surprise = torch.where(likelihood < smallest, in_logs, surprise)
            token_loss[part] = surprise[:, 0]
            if ctx.needs_input_grad[0]:
                target = overwritten[part]
                gradient = torch.mul(probs, scale[part], out=target if target.dtype == dtype else probs)
                gradient.scatter_add_(1, label, -scale[part])
                if gradient is not target:
                    target.copy_(gradient)
        ctx.save_for_backward(overwritten, row)
        # Summed in float64 over a dense (B, width) table: reproducible on every device, whatever the row's batch mates.
        exact = dtype if device.type == "mps" else torch.float64
        table = torch.zeros(len(counts), positions.width, dtype=exact, device=device)
        table[row, positions.slot.to(device)] = token_loss.to(exact)
        return (table.sum(dim=1) / counts).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        grad, row = ctx.saved_tensors
        if not bool((grad_losses == 1).all()):  # the usual case: the losses are summed, and nothing is left to do
            grad = grad * grad_losses[row, None].to(grad.dtype)
        return grad, None


def _some(rows: tuple[int, ...] | list[int], most: int = 5) -> str:
    shown = ", ".join(str(row) for row in rows[:most])
    return f"{shown} and {len(rows) - most} more" if len(rows) > most else shown
