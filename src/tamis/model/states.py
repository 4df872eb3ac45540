"""The states that the LM head reads, without the logits of every position, and means of them over a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from tamis.errors import NonFinite, Unsupported
from tamis.model.loss import SupervisedPositions, evaluation_mode
from tamis.model.targets import output_embeddings
from tamis.types import Batch

__all__ = [
    "by_row",
    "last_hidden_states",
    "mean_by_row",
    "states_before_head",
    "supervised_states",
    "weighted_mean_states",
]


def states_before_head(
    model: nn.Module,
    batch: Batch,
    *,
    take: Callable[[Float[Tensor, "B T hidden"]], Tensor],
    params: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What ``take`` makes of the head's input, in one forward pass without dropout.

    The states are caught on their way into the head, which then gets a single state of zeros: neither the other blocks'
    states nor the logits of all positions are kept, and what a model does to its states before the head is included.

    Args:
        model: a causal language model.
        batch: right-padded rows.
        take: called once, inside the pass, with the states after the final norm.
        params: tensors that stand in for the parameters of these names during the pass.

    Raises:
        Unsupported: the head is not fed ``(B, T, hidden)``.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != batch.input_ids.shape:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            expected = f"{tuple(batch.input_ids.shape)} tokens x hidden"
            raise Unsupported(f"the LM head of {type(model).__name__} is fed {got}; expected {expected}")
        caught.append(take(hidden))
        return (hidden.new_zeros(1, 1, hidden.shape[-1]), *args[1:])

    call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    handle = output_embeddings(model).register_forward_pre_hook(catch)
    try:
        with evaluation_mode(model, checkpointing=False):
            functional_call(model, dict(params or {}), (), call)
    finally:
        handle.remove()
    return caught[0]


def last_hidden_states(model: nn.Module, batch: Batch) -> Float[Tensor, "B T hidden"]:
    """The states of all positions, after the final norm, without gradient.

    Raises:
        Unsupported: the head is not fed ``(B, T, hidden)``.
    """
    with torch.no_grad():
        return states_before_head(model, batch, take=lambda hidden: hidden)


def supervised_states(model: nn.Module, batch: Batch, positions: SupervisedPositions) -> Float[Tensor, "n hidden"]:
    """The states from which the supervised tokens are predicted, in the order of ``positions``, without gradient.

    Raises:
        Unsupported: the head is not fed ``(B, T, hidden)``.
    """

    def take(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1).index_select(0, positions.flat.to(hidden.device))

    with torch.no_grad():
        return states_before_head(model, batch, take=take)


def by_row(values: Float[Tensor, "n d"], positions: SupervisedPositions) -> Float[Tensor, "B width d"]:
    """Values of supervised positions, sorted into rows and filled up with zeros; in float32 at least.

    Sums over the middle axis are the same on every device and run, which atomic additions would not be.
    """
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    table = values.new_zeros(len(positions.counts), positions.width, values.shape[1], dtype=dtype)
    table[positions.row.to(values.device), positions.slot.to(values.device)] = values.to(dtype)
    return table


def mean_by_row(values: Float[Tensor, "n d"], positions: SupervisedPositions) -> Float[Tensor, "B d"]:
    """Each row's mean over its supervised positions, in float32 at least."""
    return by_row(values, positions).sum(dim=1) / positions.counts.to(values.device)[:, None]


def weighted_mean_states(
    model: nn.Module, batch: Batch, positions: Literal["all", "supervised"]
) -> Float[Tensor, "B hidden"]:
    """Each row's mean of its last hidden states, weighted by position (from 1), in float32.

    Raises:
        NonFinite: a state is NaN or infinite (names the rows).
    """
    hidden = last_hidden_states(model, batch).float()  # (B, T, hidden)
    counted = (batch.supervised if positions == "supervised" else batch.attention_mask).to(hidden.device)
    weights = torch.arange(1, hidden.shape[1] + 1, device=hidden.device) * counted  # rows are padded on the right
    mean = torch.einsum("bt,bth->bh", weights / weights.sum(dim=1, keepdim=True), hidden)
    good = torch.isfinite(mean).all(dim=1).cpu()
    if not bool(good.all()):
        rows = tuple(batch.rows.cpu()[~good].tolist())
        raise NonFinite(
            f"hidden states of rows {', '.join(map(str, rows[:5]))} are NaN or infinite; "
            "check the weights, or load the model with another --dtype",
            rows=rows,
        )
    return mean
