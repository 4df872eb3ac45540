"""The numbers behind the report: shares, lengths, distributions, counts. Arrays in, small dataclasses out.

No sentence and no HTML here. Everything is binned or counted, so the page of a million rows is as small as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tamis.report.agreement import Agreement
from tamis.report.columns import BoolArray, Columns, DoubleArray
from tamis.types import IntArray

__all__ = [
    "CostStage",
    "LengthGroup",
    "RowCount",
    "ScoreDistribution",
    "SourceShare",
    "TokenUse",
    "cost_stages",
    "length_groups",
    "row_counts",
    "score_distribution",
    "source_shares",
    "token_use",
]

_SCORE_BINS = 60


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """One source before and after the selection."""

    name: str
    pool_rows: int
    pool_share: float
    selected_rows: int
    selected_share: float
    selected_tokens: int
    is_rest: bool = False  # the sum of all sources too small for a line of their own

    @property
    def ratio(self) -> float:
        """How many times more frequent in the selection than in the pool."""
        return self.selected_share / self.pool_share if self.pool_share else float("nan")


@dataclass(frozen=True, kw_only=True)
class LengthGroup:
    """Supervised tokens a row in the pool, in the selection, or in one target."""

    name: str
    role: str  # "pool", "selected" or "target": decides the colour
    shares: tuple[float, ...]  # of the rows, per bin of the common edges
    rows: int
    mean: float
    p10: float
    median: float
    p90: float
    longest: int

    @property
    def label(self) -> str:
        """What the group is called in a table or a legend."""
        return {"pool": "the pool", "selected": "the selection"}.get(
            self.role, "the target" if self.name == "target" else f"target {self.name}"
        )


@dataclass(frozen=True, kw_only=True)
class ScoreDistribution:
    """Where the scores of one target lie, and where the selected rows lie among them."""

    name: str  # the target, or "all targets"
    edges: tuple[float, ...]
    pool_shares: tuple[float, ...]  # of the scored rows
    selected_shares: tuple[float, ...]  # of the selected rows
    scored: int
    selected: int  # selected rows that were picked for this target
    pool_median: float
    selected_median: float
    selected_lowest: float
    highest: float
    outside: int  # rows beyond the drawn range, counted in its end bins
    is_constant: bool


@dataclass(frozen=True, kw_only=True)
class TokenUse:
    """What a choice of rows costs to train on, once through."""

    name: str
    role: str
    rows: int
    tokens: float
    supervised: float


@dataclass(frozen=True, kw_only=True)
class RowCount:
    """One property of rows, counted in the pool and in the selection."""

    key: str
    label: str
    meaning: str
    pool: int
    selected: int


@dataclass(frozen=True, kw_only=True)
class CostStage:
    """One stage of the run."""

    name: str
    seconds: float
    tokens: float | None
    tflops: float | None


def source_shares(columns: Columns, limit: int = 24) -> tuple[SourceShare, ...]:
    """Composition by source, most selected first; sources past ``limit`` are summed in a last entry."""
    names = [*columns.source_names, "(no source)"]
    codes = np.where(columns.source < 0, len(names) - 1, columns.source)
    pool = np.bincount(codes, minlength=len(names))
    selected = np.bincount(codes[columns.selected], minlength=len(names))
    tokens = np.bincount(codes[columns.selected], weights=columns.tokens[columns.selected], minlength=len(names))
    order = [int(code) for code in np.lexsort((-pool, -selected)) if pool[code]]

    def share(name: str, members: Sequence[int], is_rest: bool = False) -> SourceShare:
        in_pool, in_selection = int(pool[members].sum()), int(selected[members].sum())
        return SourceShare(
            name=name,
            pool_rows=in_pool,
            pool_share=in_pool / max(columns.num_rows, 1),
            selected_rows=in_selection,
            selected_share=in_selection / max(int(selected.sum()), 1),
            selected_tokens=int(tokens[members].sum()),
            is_rest=is_rest,
        )

    shown = [share(names[code], [code]) for code in order[:limit]]
    if rest := order[limit:]:
        shown.append(share(f"{len(rest)} other sources", rest, is_rest=True))
    return tuple(shown)


def length_groups(
    columns: Columns, target_group: IntArray, target_supervised_tokens: IntArray, max_targets: int = 6
) -> tuple[tuple[float, ...], tuple[LengthGroup, ...]]:
    """Bin edges (supervised tokens, spaced by factors) and the pool's, the selection's and each target's lengths.

    Targets past ``max_targets`` keep their summary but no bins.
    """
    every = np.concatenate([columns.supervised, target_supervised_tokens, [1] * (columns.num_rows == 0)])
    shortest, longest = max(1, int(every.min())), max(1, int(every.max()))
    if longest < 2 * shortest:  # nearly equal lengths: leave room on either side
        shortest, longest = max(1, shortest // 2), 2 * longest
    edges = np.unique(np.round(np.geomspace(shortest, longest + 1, 33)))
    groups = [("pool", "pool", columns.supervised), ("selected", "selected", columns.supervised[columns.selected])]
    groups += [
        (name, "target", target_supervised_tokens[target_group == index])
        for index, name in enumerate(columns.target_names)
    ]
    return tuple(edges.tolist()), tuple(
        _length_group(name, role, values, edges, binned=index < 2 + max_targets)
        for index, (name, role, values) in enumerate(groups)
    )


def _length_group(name: str, role: str, values: IntArray, edges: DoubleArray, *, binned: bool) -> LengthGroup:
    none = len(values) == 0
    p10, median, p90 = (float("nan"),) * 3 if none else np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    histogram = np.histogram(np.maximum(values, 1), bins=edges)[0] / max(len(values), 1)
    return LengthGroup(
        name=name,
        role=role,
        shares=tuple(histogram.tolist()) if binned and not none else (),
        rows=len(values),
        mean=float("nan") if none else float(values.mean()),
        p10=p10,
        median=median,
        p90=p90,
        longest=0 if none else int(values.max()),
    )


def score_distribution(
    name: str, score: DoubleArray, selected: BoolArray, *, bins: int = _SCORE_BINS
) -> ScoreDistribution:
    """Histogram of the finite scores and of the selected ones, each as shares of its own rows."""
    finite = score[np.isfinite(score)]
    chosen = score[selected]
    chosen = chosen[np.isfinite(chosen)]
    if len(finite) == 0:
        nan = float("nan")
        return ScoreDistribution(
            name=name,
            edges=(),
            pool_shares=(),
            selected_shares=(),
            scored=0,
            selected=int(selected.sum()),
            pool_median=nan,
            selected_median=nan,
            selected_lowest=nan,
            highest=nan,
            outside=0,
            is_constant=False,
        )
    low, high = _drawn_range(finite)
    edges = np.linspace(low, high, bins + 1)

    def shares(values: DoubleArray) -> tuple[float, ...]:
        binned = np.histogram(np.clip(values, low, high), bins=edges)[0]
        return tuple((binned / max(len(values), 1)).tolist())

    return ScoreDistribution(
        name=name,
        edges=tuple(edges.tolist()),
        pool_shares=shares(finite),
        selected_shares=shares(chosen),
        scored=len(finite),
        selected=int(selected.sum()),
        pool_median=float(np.median(finite)),
        selected_median=float(np.median(chosen)) if len(chosen) else float("nan"),
        selected_lowest=float(chosen.min()) if len(chosen) else float("nan"),
        highest=float(finite.max()),
        outside=int(((finite < low) | (finite > high)).sum()),
        is_constant=bool(len(finite) > 1 and finite.min() == finite.max()),
    )


def _drawn_range(values: DoubleArray) -> tuple[float, float]:
    """From lowest to highest, unless a few far values would squeeze all others into one bar."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        margin = abs(low) * 0.5 or 0.5
        return low - margin, high + margin
    inner_low, inner_high = np.quantile(values, [0.002, 0.998]).tolist()
    width = inner_high - inner_low
    if width > 0:
        low, high = max(low, inner_low - width), min(high, inner_high + width)
    return low, high


def token_use(columns: Columns, agreed: Sequence[Agreement]) -> tuple[TokenUse, ...]:
    """Tokens of the selection, of an average draw of as many rows, and of each baseline's choice."""
    rows = int(columns.selected.sum())
    entries = [
        TokenUse(
            name="this selection",
            role="selected",
            rows=rows,
            tokens=float(columns.tokens[columns.selected].sum()),
            supervised=float(columns.supervised[columns.selected].sum()),
        )
    ]
    if not any(entry.name == "uniform" for entry in agreed) and columns.num_rows:
        tokens, supervised = float(columns.tokens.mean()), float(columns.supervised.mean())
        entries.append(
            TokenUse(
                name="uniform (expected)", role="pool", rows=rows, tokens=rows * tokens, supervised=rows * supervised
            )
        )
    entries += [
        TokenUse(name=entry.name, role="pool", rows=entry.rows, tokens=entry.tokens, supervised=entry.supervised)
        for entry in agreed
    ]
    return tuple(entries)


def row_counts(columns: Columns) -> tuple[RowCount, ...]:
    """What is wrong or special about rows, in the pool and in the selection."""
    first = columns.first_copy()
    in_pair = np.zeros(columns.num_rows, dtype=bool)
    rows = np.flatnonzero(columns.selected)
    copies = (
        np.bincount(first[rows], minlength=columns.num_rows) if len(rows) else np.zeros(columns.num_rows, dtype=int)
    )
    in_pair[rows] = copies[first[rows]] > 1
    unscored = ~np.isfinite(columns.score)
    unsupervised = columns.supervised == 0
    near = columns.near_duplicate_of >= 0

    def entry(key: str, label: str, meaning: str, mask: BoolArray, selected: int | None = None) -> RowCount:
        chosen = int((mask & columns.selected).sum()) if selected is None else selected
        return RowCount(key=key, label=label, meaning=meaning, pool=int(mask.sum()), selected=chosen)

    return (
        entry(
            "exact",
            "Exact copies",
            "same text as an earlier row; in the selection: rows whose copy was selected too",
            columns.duplicate_of >= 0,
            int(in_pair.sum()),
        ),
        entry("near", "Near copies", "almost the same text as an earlier row", near, _near_pairs(columns)),
        entry(
            "flagged",
            "Suspicious answers",
            "own loss unusually high among its like: perhaps a wrong answer",
            columns.flagged,
        ),
        entry("leaked", "Leaks", "equal to a row of the target", columns.leaked),
        entry(
            "truncated", "Truncated rows", "longer than the length limit, so the end was cut off", columns.truncated > 0
        ),
        entry(
            "unsupervised", "Nothing to learn", "no token of the row carries loss, so it cannot be scored", unsupervised
        ),
        entry("unscored", "Not scored", "outside the shortlist, or nothing to learn", unscored),
    )


def _near_pairs(columns: Columns) -> int:
    """Selected rows whose near copy (the earlier row they resemble) was selected too."""
    near = columns.near_duplicate_of
    rows = np.flatnonzero(columns.selected & (near >= 0))
    return int(columns.selected[near[rows]].sum())


def cost_stages(cost: Mapping[str, Any]) -> tuple[CostStage, ...]:
    """The stages of ``manifest["cost"]``; tokens and FLOPs where the run counted them."""

    def maybe(value: Any) -> float | None:
        return None if value is None else float(value)

    return tuple(
        CostStage(
            name=str(stage["name"]),
            seconds=float(stage.get("seconds") or 0.0),
            tokens=maybe(stage.get("tokens")),
            tflops=maybe(stage.get("tflops")),
        )
        for stage in cost.get("stages", ())
    )
