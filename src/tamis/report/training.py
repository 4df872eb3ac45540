"""The page of a training run, from its log and its candidates: whether choosing worked, and what became of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tamis.notation import candidates_parts
from tamis.online.account import forecast_pairs
from tamis.report.curves import Curve, Fate, effective_sizes, fates, shares_by_source, steps_of, thinned
from tamis.report.document import Cards, Document, KeyNumber, Section, Table
from tamis.report.examples import ExampleCard, card
from tamis.report.provenance import manifest_part, provenance
from tamis.report.training_figures import (
    choice_figure,
    cost_figure,
    forecast_figure,
    loss_figure,
    source_figure,
    times_figure,
)
from tamis.report.training_findings import find, held_out_losses, lost_at
from tamis.report.wording import count, counted, joined, number, one_line, percent, seconds
from tamis.types import Example

__all__ = ["TrainingInputs", "training_document"]

_ROWS_SHOWN = 5
_PARTS = {"candidates": "scoring candidates", "target": "looking at the target", "update": "updates"}
_SUMMARY = ("first", "lowest", "highest", "last")


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """Everything the page of a training run is computed from.

    Of ``manifest`` are read: ``settings`` (``method``, ``model``, ``candidates``), ``method``, ``command``,
    ``warnings``, and once the run is finished ``training`` and ``cost``. All else in it is listed as it is.
    """

    log: Sequence[Mapping[str, Any]]
    candidates: pa.Table  # as ``tamis.online.fate.read_candidates`` returns it
    manifest: Mapping[str, Any]
    target_names: Sequence[str]
    read_example: Callable[[int], Example] | None  # by row of the candidates' log; None: the texts cannot be shown
    no_texts: str = ""  # why
    is_finished: bool = True

    @property
    def method(self) -> str:
        """As the user named it."""
        method = self.manifest.get("method") or manifest_part(self.manifest, "settings").get("method", "")
        return one_line(str(method.get("name", "") if isinstance(method, Mapping) else method), 40)

    @property
    def scores_sources(self) -> bool:
        """Whether all candidates of a source had the same alignment."""
        return (
            candidates_parts(str(manifest_part(self.manifest, "settings").get("candidates", "exact")))[0] == "sources"
        )

    @property
    def updates(self) -> int:
        """Done so far."""
        return int(np.max(self.candidates["step"].to_numpy())) if self.candidates.num_rows else 0


def training_document(inputs: TrainingInputs) -> Document:
    """All that the page shows."""
    held_out, fate = held_out_losses(inputs.log), fates(inputs.candidates)
    cost = manifest_part(inputs.manifest, "cost")
    warnings = [str(text) for text in inputs.manifest.get("warnings", ())]
    sections = [
        Section(
            key="believe",
            title="Did choosing work?",
            short_title="Did it work?",
            findings=find(inputs.log, method=inputs.method, is_finished=inputs.is_finished, warnings=warnings),
        )
    ]
    if len(pairs := forecast_pairs(inputs.log)):
        sections.append(_forecasts(pairs))
    if held_out:
        sections.append(_held_out(inputs, held_out))
    if inputs.candidates.num_rows:
        sections += [_choices(inputs), _sources(inputs, fate), _times(fate)]
    sections.append(_rows(inputs, fate))
    if cost:
        sections.append(_cost(cost))
    model = one_line(str(manifest_part(inputs.manifest, "settings").get("model", "")), 80)
    targets = joined([one_line(name, 40) for name in inputs.target_names])
    return Document(
        eyebrow="tamis: what was trained on, and whether choosing worked",
        title=f"{'Trained' if inputs.is_finished else 'Training'} for {targets} in "
        f"{counted(inputs.updates, 'update')}, data chosen by {inputs.method}",
        lede=f"The model: {model}. {_lede(inputs)}",
        numbers=_numbers(inputs, fate, held_out, cost),
        sections=tuple(sections),
        repeat="Another --out keeps this result.",
        command=one_line(str(inputs.manifest.get("command") or "tamis train --config run.yaml"), 2000),
        provenance=provenance(inputs.manifest, without=("training", "warnings")),
        footer="Made by tamis from files beside this page: log.jsonl and candidates/*.parquet have every number, "
        "manifest.json what determines the result. This page fetches nothing and sends nothing.",
    )


def _lede(inputs: TrainingInputs) -> str:
    if inputs.method in ("uniform", "full"):
        return "Its candidates were not weighed: a run with another method shows what choosing adds."
    if inputs.scores_sources:
        return (
            "Candidates were drawn by their sources: a source's alignment is the mean of a few scored rows, and above "
            "zero its rows lower the target loss on average. Its rows were not told apart."
        )
    return (
        "Candidates of every update were weighed by what they do to the target: an alignment above zero says that a "
        "candidate's part of the update lowers the target loss."
    )


def _numbers(
    inputs: TrainingInputs, fate: Fate, held_out: Sequence[Curve], cost: Mapping[str, Any]
) -> tuple[KeyNumber, ...]:
    value, change = "–", "no row measured"
    lost = lost_at(inputs.log)
    if lost is not None:
        change = f"not finite after update {count(lost)}"
    elif held_out and len(held_out[0].values) > 1:
        first, last = held_out[0].values[0], held_out[0].values[-1]
        value, change = number(last), f"{number(first)} before the run, on rows that only measure"
    return (
        KeyNumber(
            value=count(inputs.updates),
            label="updates",
            detail="finished" if inputs.is_finished else "not finished yet",
        ),
        KeyNumber(
            value=count(fate.rows_chosen),
            label="rows trained on",
            detail=f"of {count(fate.rows_offered)} that were candidates",
        ),
        KeyNumber(value=value, label="held-out target loss", detail=change),
        KeyNumber(
            value=seconds(cost.get("seconds")),
            label="time spent",
            detail=f"{number(cost['total_tflops'], 3)} TFLOPs of model work" if cost else "counted at the end",
        ),
    )


def _forecasts(pairs: npt.NDArray[np.float64]) -> Section:
    named = zip(("predicted", "realised"), pairs.T.tolist(), strict=True)
    return Section(
        key="forecasts",
        title="What was promised, and what was done",
        short_title="Forecasts",
        paragraphs=(
            "The honest test of choosing: one mark for each log entry with a forecast, the mean where an entry stands "
            "for several. On the line, updates did what was promised. Both drops are of the target rows that the "
            "update was made for.",
        ),
        figures=(forecast_figure(pairs),),
        tables=(
            Table(
                label="Forecasts and outcomes",
                heads=("drop of the target loss", *_SUMMARY),
                rows=tuple((name, *_summary(drops)) for name, drops in named),
            ),
        ),
    )


def _held_out(inputs: TrainingInputs, held_out: Sequence[Curve]) -> Section:
    best = count(min(zip(held_out[0].values, held_out[0].steps, strict=True))[1])
    said = f"The lowest loss was measured after update {best}."
    if manifest_part(inputs.manifest, "training").get("stopped_early"):
        done = counted(inputs.updates, "update")
        said = f"The run stopped early after {done}, and keeps the weights of update {best}."
    return Section(
        key="loss",
        title="Target loss on rows that only measure",
        short_title="Target loss",
        paragraphs=(said,),
        figures=(loss_figure(held_out),),
        tables=(
            Table(
                label="Held-out loss",
                heads=("target", *_SUMMARY, "measurements"),
                rows=tuple((c.name, *_summary(c.values), count(len(c.values))) for c in held_out),
            ),
        ),
    )


def _choices(inputs: TrainingInputs) -> Section:
    aligned, effective, offered = effective_sizes(inputs.candidates)
    steps, seen = steps_of(inputs.log, "selection/target_rows_seen")
    measures = [
        ("aligned", "Candidates that point towards the target", percent, thinned(aligned)),
        ("effective", "Effective number of candidates", lambda value: number(value, 3), thinned(effective)),
        ("target-seen", "Distinct target rows looked at", count, Curve(name="seen", steps=steps, values=seen)),
    ]
    if inputs.scores_sources:  # all of a source point one way, and all drawn weigh the same
        measures = measures[2:]
    measures = [measure for measure in measures if measure[-1].values]
    said = (
        f"A choice looked at {counted(offered, 'candidate')}. Their effective number, exp of the weights' entropy, is "
        "what the weights amount to in candidates of equal weight."
    )
    if inputs.scores_sources:
        said = (
            f"A choice drew from {counted(offered, 'candidate')}. Only those drawn were run, and now and then a few of "
            "every source, to score it."
        )
    return Section(
        key="choices",
        title="Choices over the run",
        short_title="Choices",
        paragraphs=(said,),
        figures=tuple(choice_figure(*measure) for measure in measures),
        tables=(
            Table(
                label="Choices over updates",
                heads=("of a choice", *_SUMMARY),
                rows=tuple((title, *_summary(curve.values, written)) for _, title, written, curve in measures),
            ),
        ),
    )


def _sources(inputs: TrainingInputs, fate: Fate) -> Section:
    shares = shares_by_source(inputs.candidates)
    return Section(
        key="sources",
        title="Where updates come from",
        short_title="Sources",
        figures=(source_figure(shares),) if shares else (),
        tables=(
            Table(
                label="Candidates by source",
                heads=(
                    "source",
                    "rows",
                    "times offered",
                    "times chosen",
                    "of the offers",
                    "rows never chosen",
                    "of the updates' weight",
                    *(("mean alignment, first", "last") if inputs.scores_sources else ()),
                ),
                rows=tuple(
                    (
                        source.name,
                        count(source.rows),
                        count(source.offered),
                        count(source.chosen),
                        percent(source.chosen_share),
                        count(source.never),
                        percent(source.weight_share),
                        *((number(at, 3) for at in source.alignments) if inputs.scores_sources else ()),
                    )
                    for source in fate.by_source
                ),
            ),
        ),
    )


def _times(fate: Fate) -> Section:
    return Section(
        key="fate",
        title="Fate of the rows",
        short_title="Fate of rows",
        figures=(times_figure(fate.times_chosen),),
        tables=(
            Table(
                label="Rows by the times they were chosen",
                heads=("chosen", "rows"),
                rows=tuple((label, count(rows)) for label, rows in fate.times_chosen),
            ),
        ),
    )


def _rows(inputs: TrainingInputs, fate: Fate) -> Section:
    whose = "the mean alignment of its source" if inputs.scores_sources else "its mean alignment"
    said = f"No number replaces reading. Open a row to see its text; on its right stands {whose}."
    if inputs.no_texts:
        said = f"Texts are not shown: {one_line(inputs.no_texts, 600)}"
    return Section(
        key="rows",
        title="Rows to read",
        paragraphs=(said,),
        cards=(
            Cards(title="Most weight in updates", rows=_cards(inputs, fate, fate.most_weight)),
            Cards(title="Never chosen, the least aligned first", rows=_cards(inputs, fate, fate.never_chosen)),
        ),
    )


def _cards(inputs: TrainingInputs, fate: Fate, rows: Sequence[int]) -> tuple[ExampleCard, ...]:
    read = inputs.read_example
    if read is None:
        return ()
    return tuple(card(read(row), score=fate.mean_alignment(row), marks=fate.marks(row)) for row in rows[:_ROWS_SHOWN])


def _cost(cost: Mapping[str, Any]) -> Section:
    parts = [(_PARTS.get(name, name), float(tflops)) for name, tflops in cost["tflops"].items()]
    total = sum(tflops for _, tflops in parts)
    shares = [(name, tflops, percent(tflops / (total or 1.0))) for name, tflops in parts]
    whole = f"all, in {seconds(cost['seconds'])} and {count(cost['candidate_tokens'] + cost['target_tokens'])} tokens"
    return Section(
        key="cost",
        title="Cost",
        paragraphs=("Operations of the model's passes, measurements and forecasts left out.",),
        figures=(cost_figure(shares),),
        tables=(
            Table(
                label="Cost by part",
                heads=("part", "TFLOPs", "share"),
                rows=(
                    *((name, number(tflops, 3), share) for name, tflops, share in shares),
                    (whole, number(total, 3), ""),
                ),
            ),
        ),
    )


def _summary(values: Sequence[float], written: Callable[[float], str] = number) -> tuple[str, ...]:
    """Under the heads of ``_SUMMARY``."""
    return tuple(written(value) for value in (values[0], min(values), max(values), values[-1]))
