"""A finished comparison in one value: what the page, the console and ``verdict.json`` are all made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tamis.comparison.datamodel import Foretold
from tamis.comparison.verdict import Difference, Standing

__all__ = ["CompareResult", "Conclusion", "SelectionFacts", "largest_source"]


@dataclass(frozen=True, kw_only=True)
class SelectionFacts:
    """What is known of a method's selection before anything is trained on it."""

    name: str
    budget: str
    folder: str
    rows: int
    largest_source: str
    largest_share: float
    pool_rows: int  # that could have been selected
    pool_share: float  # of them, those of the largest source
    warnings: tuple[str, ...]  # of its own report


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The verdict in words."""

    title: str
    sentence: str
    next_steps: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """What was compared, also on disk under ``out``."""

    out: Path  # folder of the result
    metric: str  # "loss" or "exact-match"
    budget: str  # that of the verdict
    seeds: int  # training runs of every contender
    held_out_rows: int  # rows that only measured
    tasks: tuple[str, ...]  # names of the targets
    standings: tuple[Standing, ...]  # every contender at every budget, best first within a budget
    differences: tuple[Difference, ...]  # contenders against opponents, with both tests
    selections: tuple[SelectionFacts, ...]  # what is known of every method's selection before anything is trained on it
    foretold: tuple[Foretold, ...]  # the linear datamodelling score of each method; empty unless asked for
    conclusion: Conclusion  # the verdict in words: title, sentence, next steps, warnings
    manifest: Mapping[str, Any]  # what determined the result and what it cost, as manifest.json

    def at(self, budget: str) -> list[Standing]:
        """The standings at one budget, best first."""
        return [standing for standing in self.standings if standing.budget == budget]

    def standing(self, name: str, budget: str | None = None) -> Standing | None:
        """Of one contender, at the verdict's budget unless another is named; None if it did not take part there."""
        wanted = budget or self.budget
        return next((s for s in self.standings if s.name == name and s.budget == wanted), None)

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis compare --json`` prints it."""
        return {
            "verdict": self.conclusion.title,
            "details": self.conclusion.sentence,
            "metric": self.metric,
            "budget": self.budget,
            "seeds": self.seeds,
            "held_out_rows": self.held_out_rows,
            "standings": [_plain_standing(standing) for standing in self.standings],
            "differences": [_plain_difference(difference) for difference in self.differences],
            "linear_datamodelling": [asdict(foretold) for foretold in self.foretold],
            "next": list(self.conclusion.next_steps),
            "warnings": list(self.conclusion.warnings),
            "report": str(self.out / "report.html"),
            "results": str(self.out / "results.csv"),
            "rows": str(self.out / "rows.parquet"),
        }


def _plain_standing(standing: Standing) -> dict[str, Any]:
    plain = {**asdict(standing), "tflops": standing.tflops}
    plain["by_task"] = dict(standing.by_task)
    plain["tasks"] = {name: list(values) for name, values in standing.tasks.items()}
    return plain


def _plain_difference(difference: Difference) -> dict[str, Any]:
    return {**asdict(difference), "p": difference.p, "is_sure": difference.is_sure}


def largest_source(sources: Sequence[str]) -> tuple[str, float]:
    """The most frequent of ``sources`` and its share; an empty name where there is none."""
    counts = {name: sources.count(name) for name in dict.fromkeys(sources)}
    top = max(counts, key=lambda name: counts[name], default="")
    return top, (counts[top] / len(sources) if sources else 0.0)
