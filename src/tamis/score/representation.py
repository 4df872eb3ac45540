"""RDS+ (Ivison et al., 2025): rows whose hidden states look like a target row's. One forward pass, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.errors import InvalidSettings, NonFinite, Unsupported
from tamis.maths.similarity import cosines
from tamis.model.loss import evaluation_mode
from tamis.model.targets import output_embeddings
from tamis.score.matrix import empty_scores
from tamis.store.reader import StageReader
from tamis.types import Batch, IntArray, TargetScores

__all__ = ["RdsPlus", "last_hidden_states", "weighted_mean_states"]

_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class RdsPlus:
    """Cosine between position-weighted means of the last hidden states of pool row and target row.

    The ``i``-th token of a row of ``T`` tokens weighs ``i / (1 + ... + T)``, since later states have seen more of the
    row. ``positions="supervised"`` keeps those proportions and leaves out all tokens but the supervised ones: with
    long prompts the original form sees mostly the prompt.
    """

    name: ClassVar[str] = "rds+"
    positions: Literal["all", "supervised"] = "all"

    def __post_init__(self) -> None:
        if self.positions not in ("all", "supervised"):
            raise InvalidSettings(f"positions must be 'all' or 'supervised', got {self.positions!r}")

    def score(self, task: Task) -> TargetScores:
        """One column per target row."""
        targets = torch.from_numpy(self._embed(task, task.target, task.target_rows).read("embedding"))
        values = empty_scores(task, len(targets))
        pool = self._embed(task, task.pool, task.rows)
        for start, block in pool.blocks("embedding", _BLOCK_ROWS):
            values[start : start + len(block)] = cosines(torch.from_numpy(block), targets).numpy()
        return TargetScores(rows=task.rows, values=values, group=task.target_group, target_names=task.target_names)

    def _embed(self, task: Task, corpus: Corpus, rows: IntArray) -> StageReader:
        def start() -> Callable[[Batch], Mapping[str, Tensor]]:
            return lambda batch: {"embedding": weighted_mean_states(task.loaded.model, batch, self.positions)}

        spec = {"algorithm": "hidden-states-v1", "embedding": "rds+", "positions": self.positions}
        return task.map_rows(corpus, rows, name="hidden-states", spec=spec, start=start, work="forward")


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


def last_hidden_states(model: nn.Module, batch: Batch) -> Float[Tensor, "B T hidden"]:
    """The states that the LM head reads, after the final norm, without dropout or gradient.

    Caught on their way into the head, which then gets a single position: neither the other blocks' states nor the
    logits of all positions are kept. Where a model scales the states before the head, a cosine does not notice.

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
        caught.append(hidden)
        return (hidden[:, -1:], *args[1:])

    handle = output_embeddings(model).register_forward_pre_hook(catch)
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    return caught[0]
