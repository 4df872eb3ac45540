"""The data loader of candidates: batches that know the places of their rows, and windows that come several times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

from tamis.errors import InvalidInput
from tamis.online.numbered import NumberedCollator, NumberedRows, filler
from tamis.online.window import WindowSampler

__all__ = ["ShareSampler", "candidate_loader"]


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
    order: Any = range(len(rows)) if sampler is None else sampler
    if choices > 1:
        windows = WindowSampler(order, share, times=choices, processes=processes)
        if not len(windows):
            raise InvalidInput(
                f"train_dataset has {len(rows)} rows, fewer than the {share * processes} of one window of candidates; "
                "choose a smaller keep or oversample, or give more rows"
            )
        batches: dict[str, Any] = {"batch_sampler": windows}
    elif processes > 1 and not args.dataloader_drop_last:
        batches = {"batch_sampler": ShareSampler(order, share, processes=processes)}
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


class ShareSampler(BatchSampler):
    """A batch of ``size`` rows for every process in turn; what is left for the last choice is divided among them.

    Launchers want batches of one size, and would fill the last ones up with rows of the first choice, as candidates
    once more. Here fillers stand in their place, which nobody takes for candidates.

    Args:
        sampler: of rows.
        size: rows of one process in one choice.
        processes: of the run.
    """

    def __init__(self, sampler: Sampler[int] | Any, size: int, *, processes: int) -> None:
        super().__init__(sampler, size, drop_last=False)
        self._processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        places = iter(self.sampler)
        while choice := list(islice(places, self.batch_size * self._processes)):
            each, more = divmod(len(choice), self._processes)
            left = iter(choice)
            for number in range(self._processes):
                own = list(islice(left, each + (number < more)))
                yield own + [filler(choice[0])] * (self.batch_size - len(own))

    def __len__(self) -> int:
        order: Any = self.sampler  # a launcher may have put another one in its place
        return -(-len(order) // (self.batch_size * self._processes)) * self._processes
