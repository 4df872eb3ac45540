"""The seam of look-ahead selection: batches of coming updates are fetched early, their scores kept for their turn."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamis.errors import Unsupported
from tamis.model.processes import world_size
from tamis.online.checks import require_candidates
from tamis.online.methods.lookahead import Lookahead
from tamis.online.proposal import Proposal
from tamis.online.rehearsal import coming_rates, rehearse
from tamis.online.step import OnlineStep
from tamis.trajectory.optimizer_state import live_optimizer
from tamis.types import Batch, IntArray

__all__ = ["Ahead", "EarlyBatches"]

logger = logging.getLogger(__name__)

_PREFIX = "ahead."


class EarlyBatches:
    """An epoch's batches, of which some can be seen before their turn."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.source, self._held = batches, deque[Any]()

    def __iter__(self) -> EarlyBatches:
        return self

    def __next__(self) -> Any:
        return self._held.popleft() if self._held else next(self.source)

    def peek(self, count: int) -> list[Any]:
        """The coming batches, fewer than ``count`` at the end of the epoch."""
        while len(self._held) < count:
            try:
                self._held.append(next(self.source))
            except StopIteration:
                break
        return list(self._held)[:count]


class Ahead:
    """Scores of coming updates of one training run.

    Args:
        method: the selection.
        args: the Trainer's.

    Raises:
        Unsupported: several processes, or accumulation.
    """

    def __init__(self, method: Lookahead, args: Any) -> None:
        self.method, self._args = method, args
        if world_size() > 1:
            raise Unsupported("lookahead works in one process; launch one, or choose a method that looks at one step")
        if args.gradient_accumulation_steps > 1:
            raise Unsupported(
                "lookahead foresees updates of one choice each; set gradient_accumulation_steps=1 (tamis train: "
                "--accumulation 1) and a larger keep"
            )
        logger.info("lookahead %s", method.cost)
        self._scores = dict[int, tuple[IntArray, Tensor]]()  # by update: rows and scores
        self._early: EarlyBatches | None = None
        self.rehearsed = False  # whether the last proposal came with a rehearsal, which looks at target rows

    def batches(self, source: Iterator[Any]) -> EarlyBatches:
        """``source``, seen through a buffer; the Trainer hands in the same iterator all through an epoch."""
        if self._early is None or self._early.source is not source:
            self._early = EarlyBatches(source)
        return self._early

    def propose(
        self,
        update: int,
        candidates: Sequence[Batch],
        target: Sequence[Batch],
        step: OnlineStep,
        optimizer: Any,
        scheduler: Any,
        to_batches: Callable[[Any], list[Batch]],
    ) -> Proposal:
        """The gradient of ``update`` (from 0), made of the candidates with the best scores.

        Raises:
            InvalidInput: there is no candidate.
            NonFinite: no candidate has a finite score.
            Unsupported: coming learning rates cannot be known, or the optimizer's steps cannot be foreseen.
        """
        require_candidates(sum(len(batch.rows) for batch in candidates))
        scores = self._scored(update, candidates, target, step, optimizer, scheduler, to_batches)
        return step.propose_scored(candidates, scores)

    def _scored(
        self,
        update: int,
        candidates: Sequence[Batch],
        target: Sequence[Batch],
        step: OnlineStep,
        optimizer: Any,
        scheduler: Any,
        to_batches: Callable[[Any], list[Batch]],
    ) -> Tensor:
        """Of the candidates of ``update`` (from 0), rehearsed now or with an earlier update of its block."""
        rows = torch.cat([batch.rows.cpu() for batch in candidates]).numpy()
        known = self._scores.pop(update, None)
        self.rehearsed = known is None or not np.array_equal(known[0], rows)
        if known is not None and np.array_equal(known[0], rows):
            return known[1]
        self._scores.clear()
        last = self._args.max_steps if self._args.max_steps > 0 else update + self.method.horizon
        count = min(self.method.block, last - update)  # no look beyond the end of training
        coming = self._early.peek(count - 1) if self._early is not None and count > 1 else []
        # A choice without a row ends the block, as it will end the run: later scores would be of other updates.
        block = [list(candidates), *takewhile(bool, map(to_batches, coming))]
        live = live_optimizer(optimizer, step.model)
        rates = coming_rates(scheduler, live, min(self.method.horizon, last - update))
        if rates is None:
            raise Unsupported(
                f"lookahead must know coming learning rates, which {type(scheduler).__name__} does not say; use one of "
                "Transformers' schedulers that follow the update's number, or horizon=1"
            )
        found = rehearse(
            self.method, step.model, optimizer, block, target,
            rates=rates,
            clip=float(self._args.max_grad_norm or 0) or None,
            reduction=step.settings.reduction,
            autocast=torch.bfloat16 if self._args.bf16 else None,
        )  # fmt: skip
        self._count(step, block, target)
        for ahead, (batches, scores) in enumerate(zip(block[1:], found[1:], strict=True), start=1):
            own = torch.cat([batch.rows.cpu() for batch in batches]).numpy()
            self._scores[update + ahead] = (own, scores)
        return found[0]

    def _count(self, step: OnlineStep, block: Sequence[Sequence[Batch]], target: Sequence[Batch]) -> None:
        """What a rehearsal cost."""
        for slot, batches in enumerate(block):
            step.count("candidates", batches, times=self.method.spent(slot))
        step.count("target", target, times=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Scores of updates to come, so that a resumed run makes the same choices."""
        found = {}
        for update, (rows, scores) in self._scores.items():
            found[f"{_PREFIX}{update}.rows"] = torch.from_numpy(rows.copy())
            found[f"{_PREFIX}{update}.scores"] = scores
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take what is its own out of a checkpoint's state; the rest is returned."""
        updates = {int(key.split(".")[1]) for key in state if key.startswith(_PREFIX)}
        for update in updates:
            rows: IntArray = state[f"{_PREFIX}{update}.rows"].numpy()
            self._scores[update] = (rows, state[f"{_PREFIX}{update}.scores"])
        return {key: tensor for key, tensor in state.items() if not key.startswith(_PREFIX)}
