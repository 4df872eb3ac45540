"""From finished runs to what may be said of them: how each contender stands, and which differences are no accident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from tamis.comparison.contenders import Contender, Kind
from tamis.comparison.records import Run
from tamis.comparison.statistics import PairedTest, holm, paired_test

__all__ = ["LEVEL", "Difference", "Standing", "compare_pairs", "standings_of"]

LEVEL = 0.05  # of an adjusted p-value
Against = Literal["full at equal cost", "full", "uniform", "bm25", "same sources"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One contender at one budget."""

    name: str
    kind: Kind
    is_baseline: bool
    budget: str
    mean: float
    std: float | None  # over its runs; None for a single one
    values: tuple[float, ...]  # of its runs, by seed
    loss: float  # mean over runs and held-out rows
    by_task: Mapping[str, float]  # mean loss
    steps: float
    rows: float
    tokens: float  # that went through training
    supervised_a_row: float
    select_tflops: float  # before the run, or during it
    train_tflops: float
    select_seconds: float
    train_seconds: float
    keys: tuple[str, ...]  # its records
    tasks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of lm-evaluation-harness, of each run

    @property
    def tflops(self) -> float:
        """Selection and training."""
        return self.select_tflops + self.train_tflops


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A contender against an opponent at one budget; a positive ``gain`` is in the contender's favour."""

    contender: str
    opponent: str
    against: Against
    budget: str
    gain: float  # mean over the common seeds
    relative: float | None  # of the opponent's mean; None if that is zero
    over_seeds: PairedTest  # would other draws, starts and orders say the same?
    over_rows: PairedTest  # would other held-out rows say the same?
    seeds_p: float | None  # adjusted for all differences of the budget
    rows_p: float | None
    keys: tuple[str, ...]  # the records of both

    @property
    def p(self) -> float | None:
        """The larger of the two adjusted values: both questions must be answered. None where one cannot be."""
        return None if self.seeds_p is None or self.rows_p is None else max(self.seeds_p, self.rows_p)

    @property
    def is_sure(self) -> bool:
        """Whether chance is an unlikely explanation by either test."""
        return self.p is not None and self.p < LEVEL


def standings_of(
    runs: Mapping[tuple[str, str], Sequence[Run]],
    contenders: Mapping[str, Contender],
    spent: Mapping[tuple[str, str], tuple[float, float]],
    *,
    metric: str,
    task_of: Sequence[str],
) -> list[Standing]:
    """How every (contender, budget) stands, best first within a budget.

    Args:
        runs: by contender and budget.
        contenders: by name.
        spent: TFLOPs and seconds of its selection, where it made one.
        metric: ``loss`` (lower is better) or ``exact-match`` (higher is).
        task_of: of every held-out row, the task that it belongs to. A record does not know: the same rows may be
            called otherwise in a later call.
    """
    found = []
    tasks = {task: np.array([own == task for own in task_of]) for task in dict.fromkeys(task_of)}
    for (name, budget), own in runs.items():
        values = [run.value(metric) for run in own]
        tflops, seconds = spent.get((name, budget), (0.0, 0.0))
        found.append(
            Standing(
                name=name,
                kind=contenders[name].kind,
                is_baseline=contenders[name].is_baseline,
                budget=budget,
                mean=float(np.mean(values)),
                std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                values=tuple(values),
                loss=float(np.mean([run.loss for run in own])),
                by_task={
                    task: float(np.mean([run.row_values("loss")[rows].mean() for run in own]))
                    for task, rows in tasks.items()
                },
                steps=float(np.mean([run.steps for run in own])),
                rows=float(np.mean([run.rows for run in own])),
                tokens=float(np.mean([run.tokens for run in own])),
                supervised_a_row=float(np.mean([run.supervised_tokens / max(1, run.seen_rows) for run in own])),
                select_tflops=tflops + float(np.mean([run.choosing_tflops for run in own])),
                train_tflops=float(np.mean([run.tflops - run.choosing_tflops for run in own])),
                select_seconds=seconds,
                train_seconds=float(np.mean([run.train_seconds for run in own])),
                keys=tuple(run.key for run in own),
                tasks={task: tuple(run.tasks[task] for run in own) for task in own[0].tasks},
            )
        )
    sign = 1 if metric == "loss" else -1
    budgets = list(dict.fromkeys(standing.budget for standing in found))
    return sorted(found, key=lambda standing: (budgets.index(standing.budget), sign * standing.mean))


def compare_pairs(
    runs: Mapping[tuple[str, str], Sequence[Run]],
    contenders: Sequence[Contender],
    *,
    budget: str,
    metric: str,
    content_of: npt.NDArray[np.int64],
) -> list[Difference]:
    """Every method named against its opponents at ``budget``; p-values are adjusted for all of them together.

    Args:
        runs: by contender and budget.
        contenders: all of them.
        budget: the one to look at.
        metric: ``loss`` or ``exact-match``.
        content_of: a number for every held-out row, the same for rows that are copies of each other: they are one
            observation of the test over rows.
    """
    found: list[Difference] = []
    for contender in contenders:
        own = runs.get((contender.name, budget))
        if contender.is_baseline or not own:
            continue
        for against, opponent in _opponents(contender, contenders, runs, budget):
            words = (contender.name, opponent, against, budget, metric)
            found.append(_difference(own, runs[opponent, budget], *words, content_of=content_of))
    over_seeds = holm([difference.over_seeds.p for difference in found])
    over_rows = holm([difference.over_rows.p for difference in found])
    return [
        replace(difference, seeds_p=seeds, rows_p=rows)
        for difference, seeds, rows in zip(found, over_seeds, over_rows, strict=True)
    ]


def _opponents(
    contender: Contender, contenders: Sequence[Contender], runs: Mapping[tuple[str, str], Sequence[Run]], budget: str
) -> list[tuple[Against, str]]:
    """What the contender has to beat, the hardest first. Without its own ``full``, plain ``full`` costs as much."""
    matched = next((c.name for c in contenders if c.kind == "equal-cost" and c.of == contender.name), None)
    pairs: list[tuple[Against, str]] = []
    if matched is not None and runs.get((matched, budget)):
        pairs += [("full at equal cost", matched), ("full", "full")]
    else:
        pairs.append(("full at equal cost", "full"))
    pairs += [("uniform", "uniform"), ("bm25", "bm25")]
    pairs += [("same sources", c.name) for c in contenders if c.kind == "same-sources" and c.of == contender.name]
    return [(against, name) for against, name in pairs if runs.get((name, budget))]


def _by_content(runs: Sequence[Run], metric: str, content_of: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The mean of every distinct held-out row over its copies and ``runs``."""
    values = np.mean([run.row_values(metric) for run in runs], axis=0)
    sums: npt.NDArray[np.float64] = np.bincount(content_of, weights=values) / np.bincount(content_of)
    return sums


def _difference(
    own: Sequence[Run],
    others: Sequence[Run],
    contender: str,
    opponent: str,
    against: Against,
    budget: str,
    metric: str,
    *,
    content_of: npt.NDArray[np.int64],
) -> Difference:
    by_seed = {run.seed: run for run in others}
    pairs = [(run, by_seed[run.seed]) for run in own if run.seed in by_seed]
    mine, theirs = [run for run, _ in pairs], [run for _, run in pairs]
    if metric == "loss":  # lower is better
        mine, theirs = theirs, mine
    over_seeds = paired_test([r.value(metric) for r in mine], [r.value(metric) for r in theirs])
    over_rows = paired_test(*(_by_content(runs, metric, content_of) for runs in (mine, theirs)))
    base = float(np.mean([run.value(metric) for _, run in pairs]))
    return Difference(
        contender=contender,
        opponent=opponent,
        against=against,
        budget=budget,
        gain=over_seeds.difference,
        relative=over_seeds.difference / base if base else None,
        over_seeds=over_seeds,
        over_rows=over_rows,
        seeds_p=over_seeds.p,
        rows_p=over_rows.p,
        keys=tuple(run.key for pair in pairs for run in pair),
    )
