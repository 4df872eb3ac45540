"""Which rows of a selection run are scored, and which are chosen: shortlists, sources, what may not be taken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tamis.budget import times
from tamis.collect import Task
from tamis.corpora import Corpora
from tamis.notation import Shortlist
from tamis.score import METHODS
from tamis.selection.choose import Choice, choose
from tamis.selection.sources import carry_to_sources, choose_at_random_among_equals, sample_sources
from tamis.settings import SelectSettings
from tamis.types import Budget, IntArray, TargetScores

__all__ = ["Chooser", "carried_scores", "shortlisted_rows"]

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """The same choice for the method and for every baseline, so that only the scores differ."""

    settings: SelectSettings
    corpora: Corpora
    budget: Budget
    flagged: BoolArray | None = None  # rows to leave out for their loss
    excluded: IntArray | None = None  # rows that a method can say nothing of
    tie_seed: int | None = None  # of the order of equal scores; None: that of the pool

    def unleaked(self, rows: IntArray) -> IntArray:
        """``rows`` without those that leaks rule out."""
        return rows[~self.corpora.leaked[rows]] if self.settings.drop_leaks else rows

    def __call__(self, scores: TargetScores, *, budget: Budget | None = None) -> Choice:
        """The rows that ``scores`` take within the budget of the run, or within ``budget``."""
        pool, settings = self.corpora.pool, self.settings
        eligible = pool.usable.copy()
        if settings.drop_leaks:
            eligible &= ~self.corpora.leaked
        if self.flagged is not None:
            eligible &= ~self.flagged
        if self.excluded is not None:
            eligible[self.excluded] = False
        copies = {"keep": None, "one": self.corpora.first_copy, "near": self.corpora.first_near_copy}
        made = choose if self.tie_seed is None else partial(choose_at_random_among_equals, seed=self.tie_seed)
        return made(
            scores,
            budget=budget or self.budget,
            tokens=pool.lengths,
            aggregate=settings.aggregate,
            shares=settings.share or None,
            first_of=copies[settings.duplicates],
            eligible=eligible,
        )


def shortlisted_rows(task: Task, asked: Shortlist, chooser: Chooser) -> IntArray:
    """The rows that the chosen method scores: what a cheap one keeps, or a sample of every source."""
    pool, scored_by = task.pool, chooser.settings.method
    if asked.method is None:
        examples = pool.examples
        sampled = sample_sources(
            chooser.unleaked(task.rows),
            examples.source_index,
            per_source=asked.per_source,
            seed=task.seed,
            names=examples.source_names,
        )
        task.note(
            f"{len(sampled)} of {len(task.rows)} rows were scored by {scored_by}, at most {asked.per_source} random "
            "ones of every source. Every row has the mean score of its source, so sources were chosen, and their "
            "rows at random."
        )
        return sampled
    budget = times(chooser.budget, asked.multiple, num_rows=len(pool), num_tokens=int(pool.lengths.sum()))
    kept = np.sort(chooser(METHODS[asked.method]().score(task), budget=budget).order)
    task.note(
        f"{asked.method} kept {len(kept)} of {len(task.rows)} rows ({asked.multiple:g} times the budget); only those "
        f"were scored by {scored_by}, the others have no score."
    )
    return kept


def carried_scores(task: Task, scores: TargetScores, rows: IntArray, excluded: IntArray) -> TargetScores:
    """The scores of a sample of every source, for all rows, with what they say of the sources."""
    examples = task.pool.examples
    carried, targets = carry_to_sources(scores, rows=rows, source=examples.source_index, without=excluded)
    for means in targets:
        best = ", ".join(
            f"{examples.source_names[means.source[i]]} {means.mean[i]:.3g}"
            + (f" ± {means.error[i]:.2g}" if np.isfinite(means.error[i]) else " (one row)")
            for i in np.argsort(-means.mean)[:5]
        )
        task.note(
            f"{means.target}: sources explain {means.explained:.0%} of the variance of {len(scores.rows)} scores. The "
            f"best, with the standard error of their mean: {best}."
        )
        if means.could_be_chance:
            task.warn(
                f"{means.target}: the sources' scores do not differ beyond chance (p = {means.p:.2g}), so which "
                "sources were taken may be chance, too; score more rows of each, or rows themselves (no shortlist, or "
                "bm25:5x)"
            )
    if len(carried.rows) < len(rows):
        task.warn(
            f"{len(rows) - len(carried.rows)} rows are of sources none of whose scored rows has a gradient; they have "
            "no score and were not selected"
        )
    return carried
