"""The progress of callers who want none. What the library uses unless it is given something that speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["NoProgress"]


class NoProgress:
    """Says nothing. What the library uses unless the caller passes something that does."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Open a silent stage."""
        yield lambda done: None
