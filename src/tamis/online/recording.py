"""A recorder among an online trainer's callbacks is told what every choice made its update of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from tamis.errors import Unsupported
from tamis.online.proposal import Proposal
from tamis.trajectory.recorder import TrajectoryRecorder
from tamis.types import Batch

__all__ = ["tell_recorders"]


def tell_recorders(
    callbacks: Iterable[object], candidates: Sequence[Batch], proposal: Proposal, *, reduction: str
) -> None:
    """Rows and coefficients of one choice, as its gradient was made of them; the choice itself is held fixed later.

    Raises:
        Unsupported: the update was made of target rows, which are no samples of the run, or rows are masked where a
            replay would not mask them.
    """
    recorders = [callback for callback in callbacks if isinstance(callback, TrajectoryRecorder)]
    if not recorders:
        return
    choice = proposal.choice
    if not len(choice.rows):
        raise Unsupported("a run of target-only cannot be recorded: its updates are made of target rows")
    coefficients = np.zeros(len(proposal.losses))
    coefficients[choice.rows] = choice.weights
    if reduction == "tokens":
        coefficients = coefficients * proposal.tokens
    _refuse_masked_inside(candidates)
    losses = torch.from_numpy(np.nan_to_num(proposal.losses))  # of candidates that count nothing
    for recorder in recorders:
        recorder.note_choice(candidates, torch.from_numpy(coefficients), losses, proposal.divisor)


def _refuse_masked_inside(candidates: Sequence[Batch]) -> None:
    """A record has a row's tokens up to its last label, all attended to; to that label itself no prediction attends."""
    for batch in candidates:
        labels_after = batch.supervised.flip(1).cumsum(dim=1).flip(1) - batch.supervised.long()
        if bool(((batch.attention_mask == 0) & (labels_after > 0)).any()):
            raise Unsupported(
                "a recorded run has rows with attention_mask 0 before their last label (padded on the left, or masked "
                "inside); pad them on the right and mask padding alone, the replay does too"
            )
