"""Would a cheap baseline have chosen the same rows? Overlap of the choices first, rank correlation beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tamis.maths.ranks import correlation_of_ranks, mean_ranks
from tamis.report.columns import Columns, DoubleArray
from tamis.types import FloatArray, IntArray

__all__ = ["Agreement", "agreements"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How much of the selection a cheap baseline would have chosen too, and what it agrees with over all rows."""

    name: str
    draws: int
    rows: int  # chosen by the baseline (mean over draws)
    overlap: float  # share of the selected rows, exact copies counted as the same row
    lowest: float  # over draws
    highest: float
    chance: float  # overlap that a blind draw of as many rows is expected to have
    spearman: float | None  # over the rows that both have scored; None without baseline scores
    tokens: float  # of the chosen rows (mean over draws)
    supervised: float


def agreements(
    columns: Columns, baselines: Mapping[str, IntArray], baseline_scores: Mapping[str, FloatArray]
) -> tuple[Agreement, ...]:
    """One entry per baseline; draws of the same name (``uniform:0``, ``uniform:1``) are averaged."""
    draws: dict[str, list[IntArray]] = {}
    for name, rows in baselines.items():
        stem, _, suffix = name.rpartition(":")
        draws.setdefault(stem if stem and suffix.isdigit() else name, []).append(np.asarray(rows, dtype=np.int64))
    first = columns.first_copy()
    chosen = np.unique(first[columns.selected])
    ranks = _Ranks(columns.score)
    result = []
    for name, choices in draws.items():
        hits = [float(np.isin(chosen, first[rows]).mean()) if len(chosen) else 0.0 for rows in choices]
        size = float(np.mean([len(rows) for rows in choices]))
        other = baseline_scores.get(name)
        result.append(
            Agreement(
                name=name,
                draws=len(choices),
                rows=round(size),
                overlap=float(np.mean(hits)),
                lowest=min(hits),
                highest=max(hits),
                chance=min(1.0, size / max(columns.num_rows, 1)),
                spearman=None if other is None else ranks.spearman(np.asarray(other, dtype=np.float64)),
                tokens=float(np.mean([columns.tokens[rows].sum() for rows in choices])),
                supervised=float(np.mean([columns.supervised[rows].sum() for rows in choices])),
            )
        )
    return tuple(result)


class _Ranks:
    """Ranks of one score vector, kept because every baseline is compared with the same one."""

    def __init__(self, score: DoubleArray) -> None:
        self.score = score
        self.finite = np.isfinite(score)
        self.ranks = mean_ranks(score[self.finite])

    def spearman(self, other: DoubleArray) -> float | None:
        if len(other) != len(self.score):
            raise ValueError(f"baseline has {len(other)} scores for {len(self.score)} pool rows")
        both = self.finite & np.isfinite(other)
        if both.sum() < 3:
            return None
        own = self.ranks if both.sum() == self.finite.sum() else mean_ranks(self.score[both])
        return correlation_of_ranks(own, mean_ranks(other[both]))
