"""Who takes part in a comparison: the methods named, the baselines that always run, and each method's own opponents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tamis.identity import text_sha256
from tamis.settings.compare import CompareSettings, MethodText, method_parts

__all__ = ["FEWEST_DRAWS", "SUBSETS", "Contender", "Kind", "contenders_of", "slug"]

Kind = Literal["untouched", "selected", "online", "uniform", "same-sources", "full", "equal-cost", "subset"]

# Runs on random parts of the pool: no way to spend updates, but a question to every score.
SUBSETS = "random parts of the pool"

# Draws of the uniform baseline: their spread is what a difference to it has to exceed.
FEWEST_DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to spend the updates."""

    name: str
    kind: Kind
    is_baseline: bool
    text: MethodText | None = None  # of a method
    of: str = ""  # the contender whose sources are drawn from, or whose cost is matched

    def draws(self, seeds: int) -> int:
        """Training runs of it at one budget."""
        if self.kind == "untouched":
            return 1
        return max(seeds, FEWEST_DRAWS) if self.kind == "uniform" else seeds


def contenders_of(settings: CompareSettings) -> tuple[Contender, ...]:
    """All of them, the methods named first.

    Random rows of the chosen sources are drawn beside every method named that selects. Every one gets its own ``full``
    at equal cost, unless that turns out to be as many updates as all make.
    """
    named = [
        Contender(name=text.label, kind="online" if text.is_online else "selected", is_baseline=False, text=text)
        for text in settings.contenders
    ]
    selecting = [contender for contender in named if contender.kind == "selected"]
    baselines = [
        Contender(name="uniform", kind="uniform", is_baseline=True),
        *(
            Contender(name=f"random, {one.name}'s sources", kind="same-sources", is_baseline=True, of=one.name)
            for one in selecting
        ),
        *(
            Contender(name=name, kind="selected", is_baseline=True, text=method_parts(name))
            for name in ("bm25", "length")
        ),
        Contender(name="full", kind="full", is_baseline=True),
    ]
    matched = [
        Contender(name=f"full at {one.name}'s cost", kind="equal-cost", is_baseline=True, of=one.name) for one in named
    ]
    return (*named, *matched, *baselines, Contender(name="untouched model", kind="untouched", is_baseline=True))


def slug(text: str) -> str:
    """``text`` as a file name: different texts never share one."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60]
    return plain if plain == text else f"{plain}-{text_sha256(text)[:6]}"
