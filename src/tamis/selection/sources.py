"""Choosing sources instead of rows: a few random rows of each are scored, and speak for all of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import kruskal

from tamis.errors import InvalidSettings
from tamis.seeds import child_seed, random_subset, random_uniform
from tamis.types import IntArray, TargetScores

__all__ = ["SourceMeans", "carry_to_sources", "sample_sources"]

Sources = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

# Of the spread between sources: how far the order within a source is drawn at random.
_SHUFFLE = 1e-3
# Above this the sources' scores differ no more than those of any other groups of rows might.
_CHANCE = 0.05


def sample_sources(
    rows: IntArray, source: Sources, *, per_source: int, seed: int, names: list[str] | None = None
) -> IntArray:
    """``per_source`` random ones of ``rows`` of every source, or all that it has; ascending.

    Args:
        rows: (n,) the pool rows that may be scored.
        source: (N,) index of each pool row's source.
        per_source: rows to draw of each.
        seed: of the draw; sources are drawn from independently.
        names: (G,) of the sources, for the error.

    Raises:
        InvalidSettings: all rows are of one source.
    """
    own = source[rows]
    found = np.unique(own)
    if len(found) < 2:
        which = f" ({names[int(found[0])]!r})" if names is not None and len(found) else ""
        raise InvalidSettings(
            f"shortlist: all {len(rows)} usable rows of the pool are of one source{which}, so there is nothing to "
            "choose between; give rows a field 'source', or every source a file of its own"
        )
    drawn = []
    for index in found:
        places = np.flatnonzero(own == index)
        count = min(per_source, len(places))
        drawn.append(
            rows[places[random_subset(child_seed(seed, "sample of a source", int(index)), len(places), count)]]
        )
    return np.sort(np.concatenate(drawn))


@dataclass(frozen=True, kw_only=True)
class SourceMeans:
    """What the scored rows say of their sources."""

    source: Sources  # (G,) the sources with a scored row, ascending
    mean: Floats  # (G,) of the rows' scores, each the mean over its target columns
    error: Floats  # (G,) standard error of the mean; NaN of one row
    rows: IntArray  # (G,) scored rows
    explained: float  # share of the scores' variance that is between sources
    p: float  # Kruskal and Wallis: that sources differ so much by chance; 1 if no source has two rows

    @property
    def could_be_chance(self) -> bool:
        """True if the sources may well be alike."""
        return not self.p < _CHANCE


def carry_to_sources(
    scores: TargetScores, *, rows: IntArray, source: Sources, seed: int, without: IntArray | None = None
) -> tuple[TargetScores, SourceMeans]:
    """Scores of all ``rows``: of every row the mean over the scored rows of its source, its own included.

    A row's own score does not put it before other rows of its source; their order is random. ``extra["is_landmark"]``
    is True on rows that were scored. Rows of a source without a scored row are left out.

    Args:
        scores: of the sampled rows.
        rows: (n,) ascending: all rows that may be selected.
        source: (N,) index of each pool row's source.
        seed: of the order within sources.
        without: pool rows whose score means nothing (no gradient); they enter no mean.
    """
    counted = np.ones(len(scores.rows), np.bool_) if without is None else ~np.isin(scores.rows, without)
    values = np.asarray(scores.values, dtype=np.float64)[counted]
    values = np.stack([values[:, scores.group == index].mean(axis=1) for index in range(len(scores.target_names))], 1)
    found, place = np.unique(source[scores.rows[counted]], return_inverse=True)
    size = np.bincount(place)
    means = np.stack([np.bincount(place, weights=column) / size for column in values.T], axis=1)
    known = rows[np.isin(source[rows], found)]
    # Equal scores would go to the first rows of a source, which may be no fair draw of it.
    order = random_uniform(child_seed(seed, "order within sources"), len(source))[known] - 0.5
    carried = means[np.searchsorted(found, source[known])] + _SHUFFLE * means.std(axis=0) * order[:, None]
    result = TargetScores(
        rows=known,
        values=carried.astype(np.float32),
        group=np.arange(len(scores.target_names)),
        target_names=scores.target_names,
        extra={"is_landmark": np.isin(known, scores.rows[counted])},
        notes=scores.notes,
        diagnosis=scores.diagnosis,
    )
    return result, _summary(values.mean(axis=1), found, place, size)


def _summary(score: Floats, found: Sources, place: IntArray, size: IntArray) -> SourceMeans:
    mean = np.bincount(place, weights=score) / size
    left = np.bincount(place, weights=(score - mean[place]) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(left / (size - 1) / size)
    whole = float(((score - score.mean()) ** 2).sum())
    groups = [score[place == index] for index in range(len(found))]
    testable = len(found) > 1 and size.max() > 1 and whole > 0
    return SourceMeans(
        source=found,
        mean=mean,
        error=error,
        rows=size,
        explained=1 - float(left.sum()) / whole if whole > 0 else 0.0,
        p=float(kruskal(*groups).pvalue) if testable else 1.0,
    )
