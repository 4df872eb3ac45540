"""Choosing sources instead of rows: a few random rows of each are scored, and speak for all of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import kruskal

from tamis.errors import InvalidInput, InvalidSettings
from tamis.seeds import child_seed, random_permutation, random_subset
from tamis.selection.choose import Choice, choose, target_means
from tamis.types import IntArray, TargetScores

__all__ = ["SourceMeans", "carry_to_sources", "choose_at_random_among_equals", "sample_sources"]

Sources = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

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
    """What the scored rows say of their sources, for one target."""

    target: str
    source: Sources  # (G,) the sources with a scored row, ascending
    mean: Floats  # (G,) of the rows' scores, each the mean over the target's columns
    error: Floats  # (G,) standard error of the mean; NaN of one row
    explained: float  # share of the scores' variance that is between sources
    p: float  # Kruskal and Wallis: that sources differ so much by chance; 1 where there is nothing to tell them by

    @property
    def could_be_chance(self) -> bool:
        """True if the sources may well be alike."""
        return not self.p < _CHANCE


def carry_to_sources(
    scores: TargetScores, *, rows: IntArray, source: Sources, without: IntArray | None = None
) -> tuple[TargetScores, tuple[SourceMeans, ...]]:
    """Scores of all ``rows``: of every row the mean over the scored rows of its source, its own included.

    So a row's own score does not put it before other rows of its source. One column for each target: the mean over its
    rows. ``extra["is_landmark"]`` is True on rows that were scored. Rows of a source without a scored row are left out.

    Args:
        scores: of the sampled rows.
        rows: (n,) ascending: all rows that may be selected.
        source: (N,) index of each pool row's source.
        without: pool rows whose score means nothing (no gradient); they enter no mean.

    Raises:
        InvalidInput: no scored row is left.
        NonFinite: a score is NaN or infinite.
    """
    counted = np.ones(len(scores.rows), np.bool_) if without is None else ~np.isin(scores.rows, without)
    if not counted.any():
        raise InvalidInput(
            f"shortlist: none of the {len(scores.rows)} sampled rows has a gradient, so no source has a score; check "
            "the rows' answers, or sample more of each source"
        )
    values = target_means(scores)[counted].astype(np.float64)  # names a row whose score is no number
    found, place = np.unique(source[scores.rows[counted]], return_inverse=True)
    known = rows[np.isin(source[rows], found)]
    summaries = tuple(
        _summary(name, column, found, place) for name, column in zip(scores.target_names, values.T, strict=True)
    )
    means = np.stack([summary.mean for summary in summaries], axis=1)
    result = TargetScores(
        rows=known,
        values=means[np.searchsorted(found, source[known])].astype(np.float32),
        group=np.arange(len(scores.target_names)),
        target_names=scores.target_names,
        extra={"is_landmark": np.isin(known, scores.rows[counted])},
        notes=scores.notes,
        diagnosis=scores.diagnosis,
    )
    return result, summaries


def _summary(target: str, score: Floats, found: Sources, place: IntArray) -> SourceMeans:
    size = np.bincount(place)
    mean = np.bincount(place, weights=score) / size
    left = np.bincount(place, weights=(score - mean[place]) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(left / (size - 1) / size)
    whole = float(((score - score.mean()) ** 2).sum())
    testable = len(found) > 1 and size.max() > 1 and whole > 0
    return SourceMeans(
        target=target,
        source=found,
        mean=mean,
        error=error,
        explained=1 - float(left.sum()) / whole if whole > 0 else 0.0,
        p=float(kruskal(*(score[place == index] for index in range(len(found)))).pvalue) if testable else 1.0,
    )


def choose_at_random_among_equals(scores: TargetScores, *, seed: int, **choosing: Any) -> Choice:
    """``choose``, with equal scores taken in random order instead of that of the pool, which may be no fair draw."""
    order = random_permutation(child_seed(seed, "order within sources"), len(scores.rows))
    shuffled = replace(scores, rows=scores.rows[order], values=np.asarray(scores.values)[order], extra={})
    made, back = choose(shuffled, **choosing), np.argsort(order)
    per_row = ("rows", "score", "target_scores", "rank", "example_weights")
    return replace(made, **{name: getattr(made, name)[back] for name in per_row})
