"""Candidates that are scored once and chosen from several times: the kept scores, and the sampler that brings the same
rows again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from tamis.online.evidence import Measured
from tamis.types import IntArray

__all__ = ["Window", "WindowSampler"]

_PREFIX = "window."


class Window:
    """Scores of one window of candidates and which of them were taken.

    Args:
        choices: made from it at most.
    """

    def __init__(self, choices: int) -> None:
        self._choices = choices
        self._places = torch.zeros(0, dtype=torch.int64)
        self._measured: Measured | None = None
        self._taken = torch.zeros(0, dtype=torch.bool)
        self.age = 0  # choices made since the one that scored it

    def holds(self, places: Tensor) -> bool:
        """Whether these candidates (places in the data, of all processes) are scored, with choices and rows left."""
        found = self._measured
        if found is None or self.age + 1 >= self._choices or not torch.equal(self._places, places):
            return False
        # Rows without labels or without a finite score make a window smaller than its choices want.
        return bool((found.good & ~self._taken).any())

    def open(self, places: Tensor, measured: Measured) -> None:
        """Keep new scores; nothing is taken yet."""
        self._places, self._measured, self.age = places, measured, 0
        self._taken = torch.zeros(len(places), dtype=torch.bool)

    def next(self) -> tuple[Measured, Tensor]:
        """The scores, and which candidates are left, for one more choice."""
        assert self._measured is not None
        self.age += 1
        return self._measured, ~self._taken

    def take(self, rows: IntArray) -> None:
        """These were chosen."""
        self._taken[torch.from_numpy(rows)] = True

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint in the middle of a window must keep."""
        found = self._measured
        if found is None:
            return {}
        state = {
            "places": self._places, "taken": self._taken, "age": torch.tensor(self.age), "losses": found.losses,
            "alignments": found.alignments, "good": found.good,
        }  # fmt: skip
        if found.gram is not None:
            state["gram"] = found.gram
        return {f"{_PREFIX}{name}": value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``; other entries are not looked at."""
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        if own:
            self._places, self._taken, self.age = own["places"], own["taken"], int(own["age"])
            self._measured = Measured(
                losses=own["losses"], alignments=own["alignments"], good=own["good"], gram=own.get("gram")
            )


class WindowSampler(BatchSampler):
    """Batches of ``size`` rows, each window of them ``times`` times over; what does not fill a window is left out.

    A window is one batch for every process. Launchers deal batches out in turn, so that with the batches of a window
    one after another, and the window repeated as a whole, a process sees its own part of it again and again.

    Args:
        sampler: of rows.
        size: rows of one process.
        times: choices made from one window.
        processes: of the run.
    """

    def __init__(self, sampler: Sampler[int] | Any, size: int, *, times: int, processes: int) -> None:
        super().__init__(sampler, size, drop_last=True)
        self._times, self._processes = times, processes

    def __iter__(self) -> Iterator[list[int]]:
        window: list[list[int]] = []
        for batch in super().__iter__():
            window.append(batch)
            if len(window) == self._processes:
                for _ in range(self._times):
                    yield from window
                window = []

    def __len__(self) -> int:
        return super().__len__() // self._processes * self._processes * self._times
