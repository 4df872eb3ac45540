"""Fine-tuning once for all ranks: the main process trains and writes checkpoints, the others wait and read them.

A data-parallel warm-up would average in another order and so end in other numbers than one process; a warm-up is short
beside the scoring that follows, which is spread over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from tamis.model.processes import barrier, is_main
from tamis.training.checkpoints import Checkpoint, complete_checkpoints
from tamis.training.loop import Spent, TrainSettings, fine_tune, num_steps, run_identity
from tamis.types import IntArray, TokenizedExample

__all__ = ["warmup"]


def warmup(
    open_model: Callable[[], nn.Module],
    examples: Sequence[TokenizedExample],
    rows: IntArray,
    settings: TrainSettings,
    *,
    seed: int,
    folder: Path,
    name_of: Callable[[int], str],
    advance: Callable[[int], None] = lambda steps: None,
    on_checkpoint: Callable[[Spent], None] = lambda spent: None,
) -> tuple[Checkpoint, ...]:
    """Checkpoints of a fine-tuning run in ``folder``, trained by the main process as far as they are missing.

    ``open_model`` is called on the main process only, and only if updates are missing. All ranks must see ``folder``.
    They meet at a barrier after every update, so that no wait is longer than one update, whatever the time-out of the
    process group. A main process that fails ends the others through the launcher.

    Raises:
        InvalidInput, NonFinite, StoreMismatch, StoreCorrupted: see ``fine_tune``.
    """
    total = num_steps(settings, len(rows))
    identity = run_identity(settings, examples, rows, seed=seed)
    found = complete_checkpoints(folder, identity=identity)
    done = found[-1].step if found else 0
    barrier()  # every rank has looked before the main process writes anything
    if done == total:
        advance(total)
        return tuple(found)

    if not is_main():
        advance(done)
        for _ in range(done, total):
            barrier()
            advance(1)
        return tuple(complete_checkpoints(folder, identity=identity))

    return fine_tune(
        open_model(),
        examples,
        rows,
        settings,
        seed=seed,
        folder=folder,
        name_of=name_of,
        advance=advance,
        after_update=barrier,
        on_checkpoint=on_checkpoint,
    )
