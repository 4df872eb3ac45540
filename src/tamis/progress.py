"""How far long work is: nowhere, or on standard error as a live bar on a terminal and a plain line every ten seconds
elsewhere.

The time left is honest in a narrow sense: the mean rate of this stage since its first report, and nothing before there
is one. What a resumed run finds already done is reported before any work and so never counts as speed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

if TYPE_CHECKING:  # imports PyTorch
    from tamis.protocols import Progress as ProgressProtocol

__all__ = ["LiveProgress", "NoProgress", "PlainProgress", "Rate", "choose_progress", "is_main_rank", "time_text"]

_SECONDS_BETWEEN_LINES = 10.0


def is_main_rank() -> bool:
    """Whether this process is the one that prints, by what ``torchrun`` and ``accelerate launch`` set."""
    return os.environ.get("RANK", "0") == "0"


def choose_progress(console: Console, *, quiet: bool) -> ProgressProtocol:
    """The right kind of progress for this console."""
    if quiet or not is_main_rank():
        return NoProgress()
    return LiveProgress(console) if console.is_terminal or console.is_jupyter else PlainProgress(console)


class NoProgress:
    """Says nothing. What the library uses unless the caller passes something that does."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Open a silent stage."""
        yield lambda done: None


@dataclass
class Rate:
    """Units per second since the first report, which may stand for work done by an earlier run."""

    clock: Callable[[], float] = time.monotonic
    _first: tuple[float, int] | None = field(default=None, init=False)
    _last: tuple[float, int] | None = field(default=None, init=False)

    def report(self, done: int) -> None:
        """``done`` units are done by now."""
        self._last = (self.clock(), done)
        if self._first is None or done < self._first[1]:
            self._first = self._last

    def per_second(self) -> float | None:
        """Units per second, None before two reports lie apart in time."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    def seconds_left(self, total: int) -> float | None:
        """Time to ``total`` at the rate so far, None before there is a rate."""
        rate = self.per_second()
        if not rate or self._last is None:
            return None
        # Time that has passed since the last report has been worked, too.
        return max(0.0, (total - self._last[1]) / rate - (self.clock() - self._last[0]))


class PlainProgress:
    """One line when a stage has gone on for ten seconds, then every ten seconds, and one when such a stage ends."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Open a stage that prints sparsely."""
        started = spoken = self._clock()
        rate, done = Rate(self._clock), 0

        def advance(units: int) -> None:
            nonlocal done, spoken
            done += units
            rate.report(done)
            if self._clock() - spoken >= _SECONDS_BETWEEN_LINES:
                spoken = self._clock()
                self._say(f"{name}: {done:,} of {total:,} {unit}{_share(done, total)}{_speed(rate, total, unit)}")

        yield advance
        elapsed = self._clock() - started
        if spoken > started or elapsed >= _SECONDS_BETWEEN_LINES:
            self._say(f"{name}: {done:,} {unit} in {time_text(elapsed)}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveProgress:
    """A bar for the stage at work; a finished stage leaves one line behind if it took a second or more."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Open a stage with a live bar."""
        started, done, rate = time.monotonic(), 0, Rate()
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            _RateColumn(rate, unit),
            console=self._console,
            transient=True,
        )
        with bar:
            task = bar.add_task(name, total=total)

            def advance(units: int) -> None:
                nonlocal done
                done += units
                rate.report(done)
                bar.advance(task, units)

            yield advance
        elapsed = time.monotonic() - started
        if elapsed >= 1.0:
            line = Text.assemble(("✓ ", "green"), f"{name}: {done:,} {unit} in {time_text(elapsed)}")
            self._console.print(line, highlight=False)


class _RateColumn(ProgressColumn):
    """Speed and time left of the stage."""

    def __init__(self, rate: Rate, unit: str) -> None:
        super().__init__()
        self._rate, self._unit = rate, unit

    def render(self, task: Task) -> Text:
        return Text(_speed(self._rate, int(task.total or 0), self._unit).lstrip(", "), style="dim")


def _share(done: int, total: int) -> str:
    return f" ({100 * done / total:.0f}%)" if total else ""


def _speed(rate: Rate, total: int, unit: str) -> str:
    per_second, left = rate.per_second(), rate.seconds_left(total)
    if not per_second or left is None:
        return ""
    speed = f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"
    return f", {speed} {unit}/s, {time_text(left)} left"


def time_text(seconds: float) -> str:
    """Seconds as a person says them: ``0.4 s``, ``12 s``, ``4 min 10 s``, ``3 h 20 min``, ``2.5 days``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"
