"""The tables of a comparison: standings, tasks, tests and costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tamis.comparison.datamodel import Foretold
from tamis.comparison.result import CompareResult
from tamis.comparison.verdict import Difference, Standing
from tamis.report.conclude import mean_text, p_text
from tamis.report.document import Table
from tamis.report.wording import count, number, one_line, percent, seconds

__all__ = ["cost_table", "foretold_table", "standings_table", "task_tables", "tests_table"]


def standings_table(standings: Sequence[Standing], result: CompareResult, *, folded: bool = False) -> Table:
    """Where every contender ended, and on what."""
    budget = standings[0].budget if standings else ""
    return Table(
        label=f"Contenders at {budget}",
        heads=(
            "contender",
            "runs",
            f"{result.metric}, mean ± std",
            *(("loss",) if result.metric != "loss" else ()),
            "updates",
            "rows",
            "tokens",
            "answer tokens a row",
        ),
        rows=tuple(
            (
                one_line(s.name, 80),
                count(len(s.values)),
                mean_text(s),
                *((number(s.loss),) if result.metric != "loss" else ()),
                count(s.steps),
                count(s.rows),
                count(s.tokens),
                number(s.supervised_a_row, 3),
            )
            for s in standings
        ),
        folded=folded,
    )


def task_tables(standings: Sequence[Standing], result: CompareResult) -> tuple[Table, ...]:
    """The mean loss of every task, unless there is only one; and every metric of lm-evaluation-harness, if asked."""
    found = []
    if len(result.tasks) > 1:
        found.append(
            Table(
                label="Loss by task",
                heads=("contender", *(one_line(task, 40) for task in result.tasks)),
                rows=tuple(
                    (one_line(s.name, 80), *(number(s.by_task[task]) for task in result.tasks)) for s in standings
                ),
            )
        )
    metrics = list(standings[0].tasks) if standings else []
    if metrics:
        found.append(
            Table(
                label="Tasks of lm-evaluation-harness, mean ± std over runs",
                heads=("contender", *(one_line(metric, 60) for metric in metrics)),
                rows=tuple(
                    (one_line(s.name, 80), *(_mean_and_spread(s.tasks[metric]) for metric in metrics))
                    for s in standings
                ),
            )
        )
    return tuple(found)


def _mean_and_spread(values: Sequence[float]) -> str:
    shown = number(float(np.mean(values)), 3)
    return shown if len(values) < 2 else f"{shown} ± {number(float(np.std(values, ddof=1)), 2)}"


def tests_table(differences: Sequence[Difference]) -> Table:
    """Every difference with its tests."""

    def interval(d: Difference) -> str:
        if d.over_seeds.low is None or d.over_seeds.high is None:
            return "–"
        return f"{number(d.over_seeds.low, 3)} to {number(d.over_seeds.high, 3)}"

    return Table(
        label="Tests of every difference",
        heads=(
            "method",
            "against",
            "gain",
            "in %",
            "95% interval, seeds",
            "seeds",
            "p, seeds",
            "p, rows",
            "more than chance",
        ),
        words=("against", "more than chance"),
        rows=tuple(
            (
                one_line(d.contender, 60),
                d.against if d.against == d.opponent else f"{d.against}: {one_line(d.opponent, 60)}",
                number(d.gain, 3),
                percent(d.relative),
                interval(d),
                count(d.over_seeds.n),
                p_text(d.seeds_p),
                p_text(d.rows_p),
                ("yes, better" if d.gain > 0 else "yes, worse") if d.is_sure else "not shown",
            )
            for d in differences
        ),
    )


def cost_table(standings: Sequence[Standing]) -> Table:
    """What one run of every contender costs."""
    return Table(
        label="Cost of one run",
        heads=("contender", "selecting, TFLOPs", "training, TFLOPs", "all, TFLOPs", "selecting", "training"),
        rows=tuple(
            (
                one_line(s.name, 80),
                number(s.select_tflops, 3),
                number(s.train_tflops, 3),
                number(s.tflops, 3),
                seconds(s.select_seconds),
                seconds(s.train_seconds),
            )
            for s in standings
        ),
    )


def foretold_table(foretold: Sequence[Foretold]) -> Table:
    """The linear datamodelling score of every method."""

    def interval(entry: Foretold) -> str:
        return "–" if entry.low is None else f"{number(entry.low, 2)} to {number(entry.high, 2)}"

    return Table(
        label="Linear datamodelling score",
        heads=("method", "correlation", "95% interval", "parts"),
        rows=tuple(
            (one_line(entry.name, 60), number(entry.correlation, 2), interval(entry), count(entry.parts))
            for entry in foretold
        ),
    )
