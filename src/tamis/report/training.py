"""The report of a training run as plain dataclasses, from its log and its candidates. No HTML and no figure here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tamis.report.content import Headline, KeyNumber, manifest_part, provenance
from tamis.report.curves import Curve, Fate, SourceFate, effective_sizes, fates, shares_by_source, steps_of, thinned
from tamis.report.examples import ExampleCard, card
from tamis.report.finding import Finding
from tamis.report.training_findings import TrainingEvidence, find, forecast_pairs, held_out_losses, lost_at
from tamis.report.wording import count, joined, number, one_line, seconds
from tamis.types import Example

__all__ = ["Part", "TrainingContent", "TrainingInputs", "build_training_content"]

_ROWS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """Everything the report of a training run is computed from.

    Of ``manifest`` are read: ``settings`` (``method``, ``model``), ``method``, ``command``, ``warnings``, and once the
    run is finished ``training`` and ``cost``. All else in it is listed as it is.
    """

    log: Sequence[Mapping[str, Any]]
    candidates: pa.Table  # as ``tamis.online.fate.read_candidates`` returns it
    manifest: Mapping[str, Any]
    target_names: Sequence[str]
    read_example: Callable[[int], Example] | None  # by row of the candidates' log; None: the texts cannot be shown
    no_texts: str = ""  # why
    is_finished: bool = True


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one part of the run cost."""

    name: str
    tflops: float
    share: float


@dataclass(frozen=True, kw_only=True)
class TrainingContent:
    """All that the page shows, in the order in which it shows it."""

    headline: Headline
    findings: tuple[Finding, ...]
    forecasts: npt.NDArray[np.float64]  # (pairs, 2): predicted and realised drop
    held_out: tuple[Curve, ...]  # the mean first, then each of several targets
    best_step: int | None
    stopped_early: bool
    steps: int
    aligned: Curve
    effective: Curve
    offered: int  # candidates of a choice
    target_seen: Curve
    sources: tuple[Curve, ...]  # share of the update's weight, the largest sources first
    source_fates: tuple[SourceFate, ...]
    times_chosen: tuple[tuple[str, int], ...]  # label, rows
    most_weight: tuple[ExampleCard, ...]
    never_chosen: tuple[ExampleCard, ...]
    no_texts: str
    parts: tuple[Part, ...]
    total_tflops: float | None
    total_seconds: float | None
    tokens: int | None
    command: str
    provenance: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def build_training_content(inputs: TrainingInputs) -> TrainingContent:
    """Compute the report."""
    log, table = inputs.log, inputs.candidates
    fate = fates(table)
    held_out = held_out_losses(log)
    best = min(zip(held_out[0].values, held_out[0].steps, strict=True))[1] if held_out else None
    training = manifest_part(inputs.manifest, "training")
    stopped = bool(training.get("stopped_early", False))
    last = int(np.max(table["step"].to_numpy())) if table.num_rows else 0
    aligned, effective, offered = effective_sizes(table)
    seen = _logged(log, "selection/target_rows_seen")
    cost = manifest_part(inputs.manifest, "cost")
    parts = _parts(cost)
    return TrainingContent(
        headline=_headline(inputs, fate, held_out, last, cost),
        findings=find(
            TrainingEvidence(
                forecasts=forecast_pairs(log),
                held_out=held_out,
                lost_at=lost_at(log),
                target_seen=seen.values[-1] if seen.values else None,
                effective=effective,
                offered=offered,
                log=log,
                is_finished=inputs.is_finished,
                warnings=tuple(str(text) for text in inputs.manifest.get("warnings", ())),
                method=_method(inputs.manifest),
            )
        ),
        forecasts=forecast_pairs(log),
        held_out=held_out,
        best_step=best,
        stopped_early=stopped,
        steps=last,
        aligned=thinned(aligned),
        effective=thinned(effective),
        offered=offered,
        target_seen=seen,
        sources=shares_by_source(table),
        source_fates=fate.by_source,
        times_chosen=fate.times_chosen,
        most_weight=_cards(inputs, fate, fate.most_weight[:_ROWS_SHOWN]),
        never_chosen=_cards(inputs, fate, fate.never_chosen[:_ROWS_SHOWN]),
        no_texts=inputs.no_texts,
        parts=parts,
        total_tflops=sum(part.tflops for part in parts) if parts else None,
        total_seconds=cost.get("seconds"),
        tokens=cost["candidate_tokens"] + cost["target_tokens"] if "candidate_tokens" in cost else None,
        command=one_line(str(inputs.manifest.get("command", "")), 2000),
        provenance=provenance({key: value for key, value in inputs.manifest.items() if key != "training"}),
    )


def _headline(
    inputs: TrainingInputs, fate: Fate, held_out: Sequence[Curve], steps: int, cost: Mapping[str, Any]
) -> Headline:
    settings = manifest_part(inputs.manifest, "settings")
    targets = joined([one_line(name, 40) for name in inputs.target_names])
    model = one_line(str(settings.get("model", "")), 80)
    change = "no row measured"
    value = "–"
    lost = lost_at(inputs.log)
    if lost is not None:
        change = f"not finite after update {count(lost)}"
    elif held_out and len(held_out[0].values) > 1:
        first, last = held_out[0].values[0], held_out[0].values[-1]
        value, change = number(last), f"{number(first)} before the run, on rows that only measure"
    numbers = (
        KeyNumber(value=count(steps), label="updates", detail="finished" if inputs.is_finished else "not finished yet"),
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
    done = "Trained" if inputs.is_finished else "Training"
    return Headline(
        title=f"{done} for {targets} in {count(steps)} updates, data chosen by {_method(inputs.manifest)}",
        sentence=f"The model: {model}. Candidates of every update were weighed by what they do to the target.",
        score_means="An alignment above zero says that a candidate's part of the update lowers the target loss.",
        verdict="The forecasts below are the honest test: what a choice promised against what the update did.",
        numbers=numbers,
    )


def _method(manifest: Mapping[str, Any]) -> str:
    method = manifest.get("method") or manifest_part(manifest, "settings").get("method", "")
    return one_line(str(method.get("name", "") if isinstance(method, Mapping) else method), 40)


def _parts(cost: Mapping[str, Any]) -> tuple[Part, ...]:
    words = {"candidates": "scoring candidates", "target": "looking at the target", "update": "updates"}
    spent = cost.get("tflops", {})
    total = sum(spent.values()) or 1.0
    return tuple(Part(name=words.get(name, name), tflops=value, share=value / total) for name, value in spent.items())


def _cards(inputs: TrainingInputs, fate: Fate, rows: Sequence[int]) -> tuple[ExampleCard, ...]:
    if inputs.read_example is None:
        return ()
    return tuple(card(inputs.read_example(row), score=fate.mean_alignment(row), marks=fate.marks(row)) for row in rows)


def _logged(log: Sequence[Mapping[str, Any]], key: str) -> Curve:
    steps, values = steps_of(log, key)
    return Curve(name=key, steps=steps, values=values)
