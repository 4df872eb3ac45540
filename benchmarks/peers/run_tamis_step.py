"""tamis's online step with ``tracin``, as ``OnlineTrainer`` makes it.

Variants say how many candidates are in a forward pass; the choice is one, made of all of them. ``micro-batches`` has
as many as plain training, ``one-pass`` all.
"""

from __future__ import annotations

from typing import Any

import torch
from step_worker import Stepper, adamw, rows_of, serve
from torch import Tensor, nn
from worker import inputs

from tamis.online import METHODS
from tamis.online.proposal import Proposal
from tamis.online.step import OnlineStep
from tamis.types import Batch

VARIANT, GIVEN = inputs()


def batches(ids: Tensor, rows: int) -> list[Batch]:
    found = []
    for at in torch.arange(len(ids)).split(rows):
        ones = torch.ones_like(ids[at])
        found.append(Batch(rows=at, input_ids=ids[at], attention_mask=ones, supervised=ones.bool()))
    return found


class Step:
    """The candidates' pass, the target's pass, the choice and its gradient."""

    def __init__(self, model: nn.Module, given: dict[str, Any]) -> None:
        candidates, keep = rows_of(given, "candidates"), given["keep"]
        rows = len(candidates) if VARIANT == "one-pass" else given["rows_a_pass"]
        self._candidates = batches(candidates, rows)
        self._target = batches(rows_of(given, "target"), rows)
        self._step = OnlineStep(model, METHODS["tracin"](keep=keep, oversample=len(candidates) // keep))
        self._optimizer = adamw(model)  # tracin reads nothing of it but the rate
        self._proposal: Proposal | None = None

    def gradient(self) -> None:
        proposal = self._step.propose(self._candidates, self._target, self._optimizer)
        for name, param in self._step.params.items():
            param.grad = proposal.gradient[name] / proposal.divisor
        self._proposal = proposal

    def found(self) -> tuple[list[float], list[int]]:
        assert self._proposal is not None and self._proposal.alignments is not None
        return self._proposal.alignments.tolist(), sorted(self._proposal.choice.rows.tolist())


def start(model: nn.Module, given: dict[str, Any]) -> Stepper:
    return Step(model, given)


if __name__ == "__main__":
    serve(start, GIVEN, ("tamis", "torch", "transformers"))
