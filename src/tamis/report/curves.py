"""What became of the candidates of a training run: over its updates, by source, and row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tamis.report.wording import counted, one_line

__all__ = [
    "Curve",
    "Fate",
    "SourceFate",
    "effective_sizes",
    "fates",
    "shares_by_source",
    "steps_of",
    "thinned",
]

_MAX_POINTS = 60
_MAX_SOURCES = 5
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Numbers over updates."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SourceFate:
    """How the rows of one source fared."""

    name: str
    rows: int  # distinct candidates
    offered: int  # times
    chosen: int  # times
    never: int  # rows
    weight_share: float
    alignments: tuple[float, float]  # of its first and last candidate that had one; NaN if none had

    @property
    def chosen_share(self) -> float:
        """Of the times offered."""
        return self.chosen / max(self.offered, 1)


@dataclass(frozen=True, kw_only=True)
class Fate:
    """How every row fared; arrays are by distinct row, in the order of ``rows``."""

    rows: npt.NDArray[np.int64]
    offered: Doubles
    chosen: Doubles
    weight: Doubles
    alignment: Doubles  # mean of those measured; NaN where none was
    by_source: tuple[SourceFate, ...]
    most_weight: tuple[int, ...]  # rows, the largest sum of weights first
    never_chosen: tuple[int, ...]  # rows that a measured choice never took, the worst alignment first

    @property
    def rows_offered(self) -> int:
        """Distinct rows that were candidates."""
        return len(self.rows)

    @property
    def rows_chosen(self) -> int:
        """Distinct rows trained on."""
        return int((self.chosen > 0).sum())

    @property
    def times_chosen(self) -> tuple[tuple[str, int], ...]:
        """How many rows were chosen never, once, twice and so on."""
        labels = ["never", "once", "twice", "3 to 5 times", "more often"]
        edges = [0, 1, 2, 3, 6, np.inf]
        found, _ = np.histogram(self.chosen, bins=edges)
        return tuple(zip(labels, (int(number) for number in found), strict=True))

    def mean_alignment(self, row: int) -> float | None:
        """None where none was measured."""
        value = float(self.alignment[self._at(row)])
        return value if np.isfinite(value) else None

    def marks(self, row: int) -> tuple[str, ...]:
        """The row's fate in a few words."""
        at = self._at(row)
        chosen = int(self.chosen[at])
        said = f"chosen {counted(chosen, 'time')}, weight {self.weight[at]:.3g}" if chosen else "never chosen"
        return (f"offered {counted(int(self.offered[at]), 'time')}", said)

    def _at(self, row: int) -> int:
        return int(np.searchsorted(self.rows, row))


def fates(table: pa.Table) -> Fate:
    """Of the candidates' log."""
    row, kept = table["row"].to_numpy(), table["kept"].to_numpy()
    weight, alignment = np.abs(table["weight"].to_numpy()), _numbers(table["alignment"])
    rows, at = np.unique(row, return_inverse=True)
    columns = (np.ones(len(row)), kept.astype(np.float64), weight)
    offered, chosen, weights = (_sums(at, column, len(rows)) for column in columns)
    known = np.isfinite(alignment)
    measured = np.bincount(at, known, minlength=len(rows))
    sums = np.bincount(at, np.where(known, alignment, 0.0), minlength=len(rows))
    mean = np.divide(sums, measured, out=np.full(len(rows), np.nan), where=measured > 0)
    best = [int(i) for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
    never = np.flatnonzero((chosen == 0) & np.isfinite(mean))
    worst = never[np.argsort(mean[never], kind="stable")]
    return Fate(
        rows=rows,
        offered=offered,
        chosen=chosen,
        weight=weights,
        alignment=mean,
        by_source=_by_source(table, rows, at, offered, chosen, weights),
        most_weight=tuple(int(rows[i]) for i in best),
        never_chosen=tuple(int(rows[i]) for i in worst),
    )


def effective_sizes(table: pa.Table) -> tuple[Curve, Curve, int]:
    """Over updates: the share of candidates with a positive alignment, ``exp`` of the weights' entropy; and the number
    of candidates of a choice."""
    step, choice = table["step"].to_numpy(), table["choice"].to_numpy()
    weight, alignment = np.abs(table["weight"].to_numpy()), _numbers(table["alignment"])
    choices, first, at = np.unique(choice, return_index=True, return_inverse=True)
    total = np.bincount(at, weight, minlength=len(choices))
    share = np.divide(weight, total[at], out=np.zeros(len(weight)), where=total[at] > 0)
    surprise = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    sizes = np.exp(np.bincount(at, surprise, minlength=len(choices)))
    known = np.bincount(at, np.isfinite(alignment), minlength=len(choices))
    positive = np.bincount(at, np.nan_to_num(alignment, nan=-1.0) > 0, minlength=len(choices))
    aligned = np.divide(positive, known, out=np.full(len(choices), np.nan), where=known > 0)
    offered = int(np.bincount(at, minlength=len(choices)).max()) if len(choices) else 0
    measured = known > 0
    return (
        _curve("aligned", step[first][measured], aligned[measured]),
        _curve("effective size", step[first][total > 0], sizes[total > 0]),
        offered,
    )


def shares_by_source(table: pa.Table) -> tuple[Curve, ...]:
    """Share of the updates' weight by source, over stretches of updates; small sources together."""
    names, index = _sources(table)
    weight, step = np.abs(table["weight"].to_numpy()), table["step"].to_numpy()
    if not weight.sum() or len(names) < 2:
        return ()
    order = np.argsort(-np.bincount(index, weight, minlength=len(names)), kind="stable")
    shown = order[: _MAX_SOURCES - 1] if len(order) > _MAX_SOURCES else order
    group_of = np.full(len(names), len(shown))
    group_of[shown] = np.arange(len(shown))
    labels = [names[i] for i in shown] + (["all others"] if len(shown) < len(names) else [])
    last = int(step.max())
    edges = np.unique(np.linspace(0, last, min(_MAX_POINTS // 2, last) + 1).astype(int))
    stretch = np.searchsorted(edges, step, side="left") - 1
    table_of = np.zeros((len(labels), len(edges) - 1))
    np.add.at(table_of, (group_of[index], stretch), weight)
    total = table_of.sum(axis=0)
    kept = total > 0
    return tuple(
        _curve(label, edges[1:][kept], row[kept] / total[kept]) for label, row in zip(labels, table_of, strict=True)
    )


def steps_of(log: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The updates at which ``key`` was logged and its values."""
    found = [(int(entry["step"]), float(entry[key])) for entry in log if entry.get(key) is not None]
    return tuple(step for step, _ in found), tuple(value for _, value in found)


def thinned(curve: Curve) -> Curve:
    """Means over stretches of updates, so that a long run can be seen."""
    if len(curve.steps) <= _MAX_POINTS:
        return curve
    parts = np.array_split(np.arange(len(curve.steps)), _MAX_POINTS)
    values = np.array(curve.values)
    return _curve(curve.name, [curve.steps[part[-1]] for part in parts], [values[part].mean() for part in parts])


def _sums(at: npt.NDArray[Any], values: Doubles, count: int) -> Doubles:
    found: Doubles = np.bincount(at, values, minlength=count).astype(np.float64)
    return found


def _by_source(
    table: pa.Table, rows: npt.NDArray[Any], at: npt.NDArray[Any], offered: Doubles, chosen: Doubles, weight: Doubles
) -> tuple[SourceFate, ...]:
    names, index = _sources(table)
    source = np.zeros(len(rows), dtype=np.int64)
    source[at] = index
    total = float(weight.sum()) or 1.0
    alignment, ends = _numbers(table["alignment"]), np.full((2, len(names)), np.nan)
    known = np.flatnonzero(np.isfinite(alignment))
    for end, order in zip(ends, (known, known[::-1]), strict=True):
        present, first = np.unique(index[order], return_index=True)
        end[present] = alignment[order[first]]
    found = [
        SourceFate(
            name=name,
            rows=int(own.sum()),
            offered=int(offered[own].sum()),
            chosen=int(chosen[own].sum()),
            never=int((chosen[own] == 0).sum()),
            weight_share=float(weight[own].sum()) / total,
            alignments=(float(ends[0, i]), float(ends[1, i])),
        )
        for i, name, own in ((i, name, source == i) for i, name in enumerate(names))
    ]
    return tuple(sorted(found, key=lambda each: -each.weight_share))


def _sources(table: pa.Table) -> tuple[list[str], npt.NDArray[np.int64]]:
    coded = table["source"].combine_chunks().fill_null("no source").dictionary_encode()
    names = [one_line(name, 60) for name in coded.dictionary.to_pylist()]
    return names, coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _numbers(column: Any) -> Doubles:
    """NaN for what is missing."""
    found: Doubles = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return found


def _curve(name: str, steps: Any, values: Any) -> Curve:
    return Curve(name=name, steps=tuple(int(step) for step in steps), values=tuple(float(value) for value in values))
