"""The data loader of candidates: batches that know the places of their rows, and windows that come several times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Sampler

from tamis.errors import InvalidInput
from tamis.online.numbered import NumberedCollator, NumberedRows
from tamis.online.window import WindowSampler

__all__ = ["candidate_loader"]


def candidate_loader(
    rows: Any,
    collate: Callable[[list[Any]], Any],
    sampler: Sampler[int] | None,
    args: Any,
    *,
    share: int,
    choices: int,
    processes: int,
) -> DataLoader[Any]:
    """``share`` rows to a batch, and every window of ``share`` rows a process ``choices`` times in turn.

    Args:
        rows: the data set.
        collate: makes a batch of its rows.
        sampler: in which order; None for as they come.
        args: the Trainer's.
        share: candidates of one process in one choice.
        choices: made from the same candidates.
        processes: of the run.

    Raises:
        InvalidInput: the data set does not fill one window.
    """
    if choices > 1:
        order: Any = range(len(rows)) if sampler is None else sampler
        windows = WindowSampler(order, share, times=choices, processes=processes)
        if not len(windows):
            raise InvalidInput(
                f"train_dataset has {len(rows)} rows, fewer than the {share * processes} of one window of candidates; "
                "choose a smaller keep or oversample, or give more rows"
            )
        batches: dict[str, Any] = {"batch_sampler": windows}
    else:
        batches = {"batch_size": share, "sampler": sampler, "drop_last": args.dataloader_drop_last}
    return DataLoader(
        NumberedRows(rows),
        collate_fn=NumberedCollator(collate),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        **batches,
    )
