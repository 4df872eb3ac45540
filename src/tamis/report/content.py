"""The report of a selection as plain dataclasses, computed from its results. No HTML and no figure here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from tamis.report import agreement, examples, measures, warnings
from tamis.report.columns import Columns, read_columns
from tamis.report.document import KeyNumber
from tamis.report.finding import Finding
from tamis.report.provenance import manifest_part, plain, provenance
from tamis.report.wording import count, joined, number, one_line, percent, seconds, visible
from tamis.types import Example, FloatArray, IntArray

__all__ = [
    "Cost",
    "Headline",
    "ReportContent",
    "ReportInputs",
    "SkippedRow",
    "build_content",
]

# The page stays readable and small: further targets keep their line in every table.
MAX_TARGETS_DRAWN = 6
MAX_SKIPPED_SHOWN = 20
MAX_NOTE_LINE = 600  # characters; a longer note takes several lines

METHOD_WORDS: Mapping[str, str] = {
    "uniform": "a blind random draw (uniform)",
    "length": "the length of the answer (length)",
    "bm25": "the words it shares with the target (BM25)",
    "loss-drop": "how much its loss drops after a little training on the target (loss-drop)",
    "mid-ppl": "being neither too easy nor too hard for the model (mid-ppl)",
    "rds+": "likeness to the target in the model's own representation (RDS+)",
    "tracin": "whether a training step on it also lowers the target's loss (TracIn)",
    "less": "whether an Adam step on it also lowers the target's loss (LESS)",
    "influence-distillation": "its estimated influence on the target's loss (influence distillation)",
    "adamw-influence": "what it did to the target's loss along one training run (AdamW-influence)",
    "influence-function": "its estimated influence on the target's loss (influence function)",
}

# What a higher score means. Any other method's score predicts the loss: see PREDICTS.
SCORE_WORDS: Mapping[str, str] = {
    "uniform": "A score is a random number; rows with a higher one are taken first.",
    "length": "A score is a number of supervised tokens; rows with a higher one are taken first.",
    "bm25": "A higher score means more words in common with the target; it promises nothing about the loss.",
    "mid-ppl": "A higher score means nearer the middle of all losses; the target plays no part in it.",
    "rds+": "A higher score means more likeness to the target; it promises nothing about the loss.",
}
PREDICTS = "A row's score says how much training on it should lower the loss on the target: higher is better."


class SkippedRow(Protocol):
    """A row that could not be used and was skipped on request."""

    @property
    def file(self) -> str:
        """As the user named it."""
        ...

    @property
    def row(self) -> int:
        """0-based within the file."""
        ...

    @property
    def field(self) -> str | None:
        """The field that is wrong, if it is one."""
        ...

    @property
    def problem(self) -> str:
        """What is wrong."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """Everything a report is computed from.

    ``table`` has one row per pool row with the columns of ``columns.read_columns``. Of ``manifest`` these keys are
    read, each of them optional: ``settings`` (``method``: a name, or a mapping with ``name``; ``budget``, ``model``,
    ``pool``, ``target``, ``shortlist``, ``aggregate``, ``seed``), ``command``, ``cost`` (``stages`` with ``name``,
    ``seconds``, ``tokens``, ``tflops``; ``total_seconds``). All else in it is listed as it is.
    """

    table: pa.Table
    baselines: Mapping[str, IntArray]
    baseline_scores: Mapping[str, FloatArray]
    manifest: Mapping[str, Any]
    read_example: Callable[[int], Example]
    read_target: Callable[[int], Example]
    target_names: Sequence[str]
    target_group: IntArray
    target_supervised_tokens: IntArray
    notes: Sequence[str] = ()
    warnings: Sequence[tuple[str, str]] = ()  # (title, sentence), shown among the findings
    skipped: Sequence[SkippedRow] = ()


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What was selected, by which method, from what, for what."""

    title: str
    sentence: str
    score_means: str
    verdict: str  # what the checks add up to
    numbers: tuple[KeyNumber, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the run spent."""

    stages: tuple[measures.CostStage, ...]
    total_seconds: float | None
    total_tflops: float  # of the model's passes; 0 where none ran


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """All that the page shows, in the order in which it shows it."""

    headline: Headline
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    scores: tuple[measures.ScoreDistribution, ...]
    sources: tuple[measures.SourceShare, ...]
    length_edges: tuple[float, ...]
    lengths: tuple[measures.LengthGroup, ...]
    agreements: tuple[agreement.Agreement, ...]
    tokens: tuple[measures.TokenUse, ...]
    targets: tuple[examples.TargetExamples, ...]
    targets_not_shown: int
    flagged: tuple[examples.ExampleCard, ...]
    leaked: tuple[examples.ExampleCard, ...]
    pairs: tuple[examples.Pair, ...]
    counts: tuple[measures.RowCount, ...]
    skipped: tuple[str, ...]
    num_skipped: int
    cost: Cost
    command: str
    provenance: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # (group, ((key, value), ...))
    max_drawn: int = field(default=MAX_TARGETS_DRAWN)


def build_content(inputs: ReportInputs) -> ReportContent:
    """Compute the report.

    Raises:
        InvalidInput: the table lacks a column or points outside the pool.
    """
    columns = read_columns(inputs.table, inputs.target_names)
    settings = manifest_part(inputs.manifest, "settings")
    method, shortlist = _method(settings), plain(settings.get("shortlist"))
    sources = measures.source_shares(columns)
    edges, lengths = measures.length_groups(columns, inputs.target_group, inputs.target_supervised_tokens)
    agreed = agreement.agreements(columns, inputs.baselines, inputs.baseline_scores)
    tokens = measures.token_use(columns, agreed)
    counts = measures.row_counts(columns)
    scores = _scores(columns)
    findings = warnings.find(
        warnings.Evidence(
            columns=columns,
            method=method,
            shortlist=shortlist,
            sources=sources,
            scores=scores,
            agreements=agreed,
            tokens=tokens,
            counts=counts,
            target_group=inputs.target_group,
            target_supervised_tokens=inputs.target_supervised_tokens,
            run_warnings=inputs.warnings,
        )
    )
    stages = manifest_part(inputs.manifest, "cost")
    spent = measures.cost_stages(stages)
    cost = Cost(
        stages=spent,
        total_seconds=_total_seconds(stages),
        total_tflops=sum(stage.tflops or 0.0 for stage in spent),
    )
    return ReportContent(
        headline=_headline(columns, inputs, settings, method, shortlist, findings, cost),
        findings=findings,
        notes=tuple(line for note in inputs.notes for line in _note_lines(note)),
        scores=scores,
        sources=sources,
        length_edges=edges,
        lengths=lengths,
        agreements=agreed,
        tokens=tokens,
        targets=examples.target_examples(
            columns, inputs.read_example, inputs.read_target, inputs.target_group, max_targets=MAX_TARGETS_DRAWN
        ),
        targets_not_shown=max(0, len(columns.target_names) - MAX_TARGETS_DRAWN),
        flagged=examples.flagged_examples(columns, inputs.read_example),
        leaked=examples.leaked_examples(columns, inputs.read_example),
        pairs=(
            *examples.copies(columns, inputs.read_example, kind="near", limit=4),
            *examples.copies(columns, inputs.read_example, kind="exact", limit=2),
        ),
        counts=counts,
        skipped=tuple(_skipped_line(row) for row in inputs.skipped[:MAX_SKIPPED_SHOWN]),
        num_skipped=len(inputs.skipped),
        cost=cost,
        command=one_line(plain(inputs.manifest.get("command")), 2000),
        provenance=provenance(inputs.manifest),
    )


def _note_lines(note: str) -> Iterator[str]:
    """A note, broken after commas and semicolons if it is long, as with many targets; nothing of it gets lost."""
    line = ""
    for part in re.split(r"(?<=[,;]) ", " ".join(visible(note).split())):
        if line and len(line) + 1 + len(part) > MAX_NOTE_LINE:
            yield one_line(line, MAX_NOTE_LINE)
            line = "…"
        line = f"{line} {part}" if line else part
    yield one_line(line, MAX_NOTE_LINE)


def _scores(columns: Columns) -> tuple[measures.ScoreDistribution, ...]:
    """One distribution per target with a score of its own; else a single one."""
    if not columns.target_scores:
        name = columns.target_names[0] if len(columns.target_names) == 1 else "all targets"
        return (measures.score_distribution(name, columns.score, columns.selected),)
    picked = (columns.picked_for[columns.selected] >= 0).any()
    return tuple(
        measures.score_distribution(
            name, score, columns.selected & (columns.picked_for == index) if picked else columns.selected
        )
        for index, (name, score) in enumerate(
            (name, columns.target_scores[name]) for name in columns.target_names if name in columns.target_scores
        )
    )


def _headline(
    columns: Columns,
    inputs: ReportInputs,
    settings: Mapping[str, Any],
    method: str,
    shortlist: str,
    findings: Sequence[Finding],
    cost: Cost,
) -> Headline:
    selected, rows = int(columns.selected.sum()), columns.num_rows
    tokens, all_tokens = int(columns.tokens[columns.selected].sum()), int(columns.tokens.sum())
    supervised = int(columns.supervised[columns.selected].sum())
    targets = joined([one_line(name, 40) for name in columns.target_names])
    how = METHOD_WORDS.get(method, f"the score of {one_line(method, 60)}" if method else "its score")
    model = one_line(plain(settings.get("model")), 80)
    sentence = f"Every row was judged by {how}."
    if shortlist.startswith("sources:"):
        sampled = one_line(shortlist, 40)
        sentence = f"Some random rows of every source ({sampled}) were judged by {how}; they speak for all its rows."
    elif shortlist:
        sentence = f"A shortlist ({one_line(shortlist, 40)}) came first; each row on it was judged by {how}."
    if model and method not in ("uniform", "length", "bm25"):
        sentence += f" The model: {model}."
    raised = sum(finding.severity == "warning" for finding in findings)
    warned = {0: "No check raises a warning", 1: "One check raises a warning"}.get(
        raised, f"{raised} checks raise a warning"
    )
    numbers = [
        KeyNumber(
            value=count(selected),
            label="rows selected",
            detail=f"{percent(selected / max(rows, 1))} of {count(rows)}; budget "
            f"{one_line(plain(settings.get('budget')) or 'not recorded', 30)}",
        ),
        KeyNumber(
            value=count(tokens),
            label="tokens selected",
            detail=f"{percent(tokens / max(all_tokens, 1))} of the pool; {count(supervised)} carry loss",
        ),
        KeyNumber(
            value=count(len(inputs.target_group)),
            label="target rows" if len(inputs.target_group) != 1 else "target row",
            detail=f"for {targets}",
        ),
        KeyNumber(
            value=seconds(cost.total_seconds),
            label="time spent",
            detail=f"{number(cost.total_tflops, 3)} TFLOPs of model work" if cost.total_tflops else "no model ran",
        ),
    ]
    return Headline(
        title=f"{count(selected)} of {count(rows)} rows selected for {targets}",
        sentence=sentence,
        score_means=SCORE_WORDS.get(method, PREDICTS),
        verdict=f"{warned}. What only training can tell is marked as not measured.",
        numbers=tuple(numbers),
    )


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("method", "")
    return str(method.get("name", "")) if isinstance(method, Mapping) else str(method)


def _total_seconds(cost: Mapping[str, Any]) -> float | None:
    if cost.get("total_seconds") is not None:
        return float(cost["total_seconds"])
    stages = cost.get("stages") or ()
    return float(sum(stage.get("seconds") or 0.0 for stage in stages)) if stages else None


def _skipped_line(row: SkippedRow) -> str:
    place = f"{one_line(row.file, 120)}, row {row.row}" + (f", field {one_line(row.field, 40)}" if row.field else "")
    return f"{place}: {one_line(row.problem, 240)}"
