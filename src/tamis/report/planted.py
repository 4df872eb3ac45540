"""The page of a known-answer pool: what every method found, and what it took that it should have left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import plotly.graph_objects as go

from tamis.comparison.planted import KINDS, Score
from tamis.report.document import Document, KeyNumber, Section, Table
from tamis.report.drawing import FRAME, ROW_HEIGHT, Figure, bare_figure, bars, categories, plain_spec
from tamis.report.finding import Finding
from tamis.report.provenance import provenance
from tamis.report.wording import count, number, one_line, percent, seconds

__all__ = ["planted_document"]


class Standing(Protocol):
    """One method on the planted pool."""

    @property
    def name(self) -> str:
        """As the user named it."""
        ...

    @property
    def is_baseline(self) -> bool:
        """Whether it always runs."""
        ...

    @property
    def score(self) -> Score:
        """What it found."""
        ...

    @property
    def seconds(self) -> float:
        """Of its selection."""
        ...

    @property
    def folder(self) -> str:
        """Of its selection."""
        ...


class Result(Protocol):
    """What the page is made from; ``tamis.runs.planted.PlantedResult`` is one."""

    @property
    def standings(self) -> Sequence[Standing]:
        """Best first."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows of the pool by kind."""
        ...

    @property
    def relevant(self) -> int:
        """Relevant rows."""
        ...

    @property
    def title(self) -> str:
        """The verdict."""
        ...

    @property
    def sentence(self) -> str:
        """The verdict's numbers."""
        ...

    @property
    def next_steps(self) -> Sequence[str]:
        """What to run next."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What to mind."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Settings and versions."""
        ...


def planted_document(result: Result) -> Document:
    """All that the page shows."""
    best = next((s for s in result.standings if not s.is_baseline), result.standings[0])
    return Document(
        eyebrow="tamis: do the methods find what is known to be relevant?",
        title=one_line(result.title, 200),
        lede=one_line(result.sentence, 600),
        numbers=(
            KeyNumber(value=percent(best.score.precision), label="precision", detail=f"of {one_line(best.name, 40)}"),
            KeyNumber(value=percent(best.score.recall), label="recall", detail=f"of {result.relevant} relevant rows"),
            KeyNumber(
                value=number(best.score.wrong_auc, 2), label="AUC of wrong answers", detail="0.5 is blind, 1 sees all"
            ),
            KeyNumber(value=seconds(best.seconds), label="time to select", detail=one_line(best.name, 40)),
        ),
        sections=(
            Section(
                key="found",
                title="What was taken",
                short_title="Taken",
                paragraphs=(f"Each method took {result.relevant} rows, as many as are relevant.",),
                figures=(_taken_figure(result),),
                tables=(_found_table(result.standings), _taken_table(result.standings)),
                remarks=(
                    "AUC: how often a score puts the better of two rows first; 0.5 is blind. Wrong: a right answer "
                    "against a wrong one, among relevant rows and within each source of the pool. Relevant: a relevant "
                    "row against a row of the pool.",
                ),
            ),
            Section(
                key="mind",
                title="What to mind",
                short_title="Mind",
                paragraphs=(
                    "A planted pool shows whether a method finds a task among other rows, not what training gains.",
                ),
                findings=tuple(
                    Finding(key=f"mind-{i}", severity="note", title="Mind this", sentence=one_line(sentence, 600))
                    for i, sentence in enumerate(result.warnings)
                ),
                next_steps=tuple(one_line(step, 400) for step in result.next_steps),
            ),
            Section(
                key="pool",
                title="What was planted",
                short_title="Pool",
                tables=(
                    Table(
                        label="Rows of the pool",
                        heads=("kind", "rows", "what it is"),
                        words=("what it is",),
                        rows=tuple((kind, count(result.counts[kind]), said) for kind, said in KINDS.items()),
                    ),
                ),
            ),
        ),
        repeat="Selections that are there are kept: more methods behind the command add to them.",
        command=one_line(str(result.manifest.get("command", "")), 2000),
        provenance=provenance(result.manifest),
        footer="Made by tamis from files beside this page: planted/ has the pool, the target and the truth of every "
        "row, selections/ each method's own report, results.csv these counts. This page fetches nothing.",
    )


def _taken_figure(result: Result) -> Figure:
    labels = [standing.name for standing in result.standings]
    scores = [standing.score for standing in result.standings]
    spoilt = [s.taken["wrong answer"] + s.taken["truncated"] for s in scores]
    others = [s.selected - s.found - bad for s, bad in zip(scores, spoilt, strict=True)]
    traces: list[go.Bar] = []
    for role, values, what in (
        ("selected", [s.found for s in scores], "relevant"),
        ("target", spoilt, "wrong or broken answers"),
        ("pool", others, "all else"),
    ):
        traces.append(bars(labels, values, role, [count(value) for value in values], what).update(text=None))
    figure = bare_figure(traces, barmode="stack")
    categories(figure, labels)
    figure.update_xaxes(title={"text": "selected rows"}, rangemode="tozero", nticks=6)
    return Figure(
        key="taken",
        title="Rows that each method took",
        alt="Relevant rows found: "
        + ", ".join(f"{one_line(s.name, 40)} {s.score.found}" for s in result.standings)
        + ".",
        legend=(("selected", "relevant"), ("target", "relevant, but wrong or broken answers"), ("pool", "all else")),
        height=FRAME + 20 + ROW_HEIGHT * len(labels),
        spec=plain_spec(figure),
    )


def _found_table(standings: Sequence[Standing]) -> Table:
    return Table(
        label="What was found",
        heads=(
            "method",
            "relevant found",
            "precision",
            "recall",
            "of the task, spoilt or not",
            "AUC, wrong",
            "AUC, wrong in your sources",
            "AUC, relevant",
            "time",
        ),
        rows=tuple(
            (
                one_line(s.name, 80),
                count(s.score.found),
                percent(s.score.precision),
                percent(s.score.recall),
                percent(s.score.of_the_task),
                number(s.score.wrong_auc, 2),
                number(s.score.source_auc, 2),
                number(s.score.background_auc, 2),
                seconds(s.seconds),
            )
            for s in standings
        ),
    )


def _taken_table(standings: Sequence[Standing]) -> Table:
    return Table(
        label="Selected rows by kind",
        heads=("method", *KINDS, "both copies"),
        rows=tuple(
            (one_line(s.name, 80), *(count(s.score.taken[kind]) for kind in KINDS), count(s.score.both_copies))
            for s in standings
        ),
    )
