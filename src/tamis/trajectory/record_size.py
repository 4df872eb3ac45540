"""What the record of a run will take on disk, before it starts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from tamis.disk import check_writable
from tamis.errors import InvalidInput, InvalidSettings
from tamis.trajectory.optimizer_state import LiveOptimizer

__all__ = ["announce_record", "saves_of"]

logger = logging.getLogger(__name__)


def announce_record(
    folder: Path, live: LiveOptimizer, *, every: int, steps: int, saves: set[int], most_gb: float | None
) -> None:
    """Say what the record of a run will take, and refuse what does not fit.

    Args:
        folder: of the record.
        live: what is trained.
        every: updates between two states.
        steps: of the run.
        saves: after which of them there is a state in any case.
        most_gb: the most that it may take, None for as much as there is.

    Raises:
        InvalidInput: there is not enough room.
        InvalidSettings: it is more than was allowed.
    """
    check_writable(folder)
    numbers = (2 if live.kind == "sgd" else 3) * sum(group.numel for group in live.groups)
    one = numbers * next(iter(live.params.values())).element_size()
    fixed = {0, steps} | saves
    count = len(fixed.union(range(0, steps, every)))
    size = count * one
    logger.info(
        "recording %d updates into %s: %d states of %d numbers, about %.2f GB, and the rows",
        steps, folder, count, numbers, size / 1e9,
    )  # fmt: skip

    def smaller(most: float) -> str:
        others = int(most // one) - len(fixed)
        if others > 0:
            return f"record fewer states, every={-(-steps // others)} or more"
        return (
            f"the {len(fixed)} states at the start, at the end and at the trainer's checkpoints take "
            f"{len(fixed) * one / 1e9:.3g} GB alone: save fewer checkpoints (save_strategy, save_steps)"
        )

    if most_gb is not None and size > most_gb * 1e9:
        raise InvalidSettings(
            f"the record would take {size / 1e9:.3g} GB and most_gb={most_gb:g}; "
            f"{smaller(most_gb * 1e9)}, or allow more"
        )
    place = next(folder for folder in (folder, *folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise InvalidInput(
            f"the record would take {size / 1e9:.3g} GB and {folder} has {free / 1e9:.3g} GB free; "
            f"{smaller(free)}, or choose another folder"
        )


def saves_of(args: Any, state: Any, loader: Any) -> set[int]:
    """After how many updates the trainer may save a checkpoint, and so the recorder a state. Of "best": if all are."""
    try:
        batches = len(loader)
    except TypeError:  # a stream; the Trainer takes the whole run for one epoch
        epoch = state.max_steps
    else:
        epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    intervals = [epoch] if args.load_best_model_at_end else []  # see on_epoch_end
    strategy, steps = args.save_strategy, state.save_steps
    if strategy == "best":
        strategy, steps = args.eval_strategy, state.eval_steps
    if strategy == "epoch":
        intervals.append(epoch)
    elif strategy == "steps" and steps >= 1:
        intervals.append(int(steps))
    return {step for interval in intervals for step in range(interval, state.max_steps, interval)}
