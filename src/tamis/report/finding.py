"""The answer of one check, for every page: how grave it is, what was measured, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SEVERITIES", "Finding", "Severity"]

Severity = Literal["warning", "note", "open", "unmeasured", "passed"]  # open: measured, but not decided
SEVERITIES: tuple[Severity, ...] = ("warning", "note", "open", "unmeasured", "passed")  # the gravest first


@dataclass(frozen=True)
class Finding:
    """The answer of one check."""

    key: str
    severity: Severity
    title: str
    sentence: str
    advice: str = ""

    @property
    def line(self) -> str:
        """The finding where it stands alone, as on a console."""
        return f"{self.title}. {self.sentence}"
