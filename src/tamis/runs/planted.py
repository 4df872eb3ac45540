"""A comparison on a pool whose answer is known: plant, select with every method, count. Nothing is trained."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tamis.comparison.contenders import FEWEST_DRAWS
from tamis.comparison.planted import KINDS, PlantedPool, Score, score_selection
from tamis.config import write_config
from tamis.corpora import model_settings, read_sources
from tamis.data.examples import read_examples
from tamis.data.rows import Rows
from tamis.disk import check_writable, replace_atomically
from tamis.model.load import model_fingerprint, resolved_dtype, template_sha256
from tamis.model.processes import barrier, is_main
from tamis.protocols import Progress
from tamis.report.document import write_document
from tamis.report.planted import planted_document
from tamis.runs.compare_selections import Chosen, PoolTable, select_rows
from tamis.runs.manifest import base_identity
from tamis.runs.outputs import check_claim, claim_folder, write_json
from tamis.runs.planted_rows import planted_rows, write_planted
from tamis.settings import SelectSettings
from tamis.settings.compare import CompareSettings, MethodText, method_parts
from tamis.values import to_dict
from tamis.versions import versions

__all__ = ["PlantedResult", "PlantedStanding", "planted_from_settings"]


@dataclass(frozen=True, kw_only=True)
class PlantedStanding:
    """One method on the planted pool; of ``uniform``, one draw."""

    name: str
    is_baseline: bool
    score: Score
    seconds: float
    tflops: float
    folder: str  # its selection's; empty for a draw


@dataclass(frozen=True, kw_only=True)
class PlantedResult:
    """What every method found, also on disk under ``out``."""

    out: Path  # folder of the result
    standings: tuple[PlantedStanding, ...]  # every method, best first
    counts: Mapping[str, int]  # rows of the pool by kind
    relevant: int  # rows that a good method takes; copies count once
    title: str  # the finding in a line
    sentence: str  # and in some more words
    next_steps: tuple[str, ...]  # what to run now
    warnings: tuple[str, ...]  # what to know before believing it
    manifest: Mapping[str, Any]  # what determined the result and what it cost, as manifest.json

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis compare --planted --json`` prints it."""
        return {
            "verdict": self.title,
            "details": self.sentence,
            "relevant_rows": self.relevant,
            "pool": dict(self.counts),
            "standings": [{**asdict(standing), **standing.score.__dict__} for standing in self.standings],
            "next": list(self.next_steps),
            "warnings": list(self.warnings),
            "report": str(self.out / "report.html"),
            "results": str(self.out / "results.csv"),
        }


def planted_from_settings(settings: CompareSettings, *, progress: Progress, held: Mapping[str, Rows]) -> PlantedResult:
    """The check that ``settings`` describe; see ``tamis.compare``.

    Raises:
        InvalidInput: too few rows can be planted.
        InvalidSettings: the folder holds another comparison.
    """
    out = Path(settings.out)
    if is_main():
        check_writable(out)
    plain = settings.select_settings(method_parts("uniform"), budget=settings.budget, out=settings.out)
    resolved_dtype(model_settings(plain))
    model = model_fingerprint(model_settings(plain))
    sources = read_sources(plain, held)
    given = None
    if settings.relevant:
        given = read_examples(settings.relevant, on_bad_row=settings.on_bad_row, held=held)
    choices = {
        name: getattr(settings, name) for name in ("planted_rows", "background_rows", "relevant_sources", "seed")
    }
    data = {
        "pool": sources.pool.identity,
        "target": sources.target.identity,
        "relevant": None if given is None else given.identity,
    }
    identity = {
        "check": "planted",  # so that a folder of a comparison is told apart by this field
        **base_identity(model=model, data=data, chat_template=template_sha256(settings.chat_template)),
        "planted": {**choices, "relevant_sources": list(settings.relevant_sources)},
    }
    if is_main():
        claim_folder(out, identity)
        write_config("compare", settings, out / "run.yaml", held=list(held))
    barrier()
    pool, targets, warnings = planted_rows(settings, sources, given)
    unread = [f"--{name.replace('_', '-')}" for name in settings.of_runs]
    if unread:
        warnings.append(f"Nothing is trained or measured in this check, so it did not use {', '.join(unread)}.")
    files = write_planted(out / "planted", pool, targets, sources.target_names)
    standings = _standings(settings, pool, files, progress)
    title, sentence, steps = _conclusion(standings, pool)
    result = PlantedResult(
        out=out,
        standings=tuple(standings),
        counts=pool.counts(),
        relevant=pool.relevant,
        title=title,
        sentence=sentence,
        next_steps=tuple(steps),
        warnings=tuple(warnings),
        manifest={
            **identity,
            "command": f"tamis compare --config {out / 'run.yaml'}",
            "versions": versions(),
            "settings": to_dict(settings),
        },
    )
    if is_main():
        check_claim(out, identity)
        _write_counts(out / "results.csv", standings)
        write_json(out / "verdict.json", result.summary())
        write_document(planted_document(result), out / "report.html")
        write_json(out / "manifest.json", result.manifest)  # last: its presence says that the check is complete
    barrier()
    return result


def _standings(
    settings: CompareSettings, pool: PlantedPool, files: tuple[Path, tuple[str, ...]], progress: Progress
) -> list[PlantedStanding]:
    """Every method's selection of as many rows as are relevant, best first."""
    budget = str(pool.relevant)

    def changed(own: SelectSettings) -> SelectSettings:
        return replace(own, pool=(str(files[0]),), target=files[1], row_format="messages")

    found = []
    table: PoolTable | None = None
    named: list[tuple[MethodText, bool]] = [(text, False) for text in settings.contenders]
    for text, is_baseline in [*named, (method_parts("bm25"), True), (method_parts("length"), True)]:
        chosen = select_rows(settings, text, budget, progress=progress, held={}, changed=changed)
        table = PoolTable.of(chosen.table, settings)
        found.append(_standing(text.label, pool, chosen, is_baseline=is_baseline))
    assert table is not None
    for draw in range(FEWEST_DRAWS):
        rows = table.uniform(budget, seed=settings.seed + draw)
        blind = np.full(len(pool.rows), 0.0)
        score = score_selection(pool, rows, blind)
        found.append(
            PlantedStanding(
                name=f"uniform, draw {draw + 1}", is_baseline=True, score=score, seconds=0.0, tflops=0.0, folder=""
            )
        )
    return sorted(found, key=lambda standing: (-standing.score.precision, standing.is_baseline))


def _standing(name: str, pool: PlantedPool, chosen: Chosen, *, is_baseline: bool) -> PlantedStanding:
    score = np.asarray(chosen.table["score"].to_numpy(zero_copy_only=False), dtype=np.float64)
    return PlantedStanding(
        name=name,
        is_baseline=is_baseline,
        score=score_selection(pool, chosen.rows, score),
        seconds=chosen.seconds,
        tflops=chosen.tflops,
        folder=str(chosen.folder),
    )


def _conclusion(standings: Sequence[PlantedStanding], pool: PlantedPool) -> tuple[str, str, list[str]]:
    named = [standing for standing in standings if not standing.is_baseline]
    best = named[0] if named else standings[0]
    draws = [s.score.found for s in standings if s.name.startswith("uniform")]
    lexical = next(s for s in standings if s.name == "bm25")
    title = f"{best.name} finds {best.score.found} of {pool.relevant} relevant rows"
    sentence = (
        f"Every method selects {pool.relevant} of {len(pool.rows)} rows, as many as are relevant. {best.name} takes "
        f"{best.score.found} of them and {best.score.taken['wrong answer']} with a wrong answer; bm25 takes "
        f"{lexical.score.found} and {lexical.score.taken['wrong answer']}; {len(draws)} blind draws find "
        f"{max(draws) if min(draws) == max(draws) else f'{min(draws)} to {max(draws)}'}."
    )
    steps = []
    if best.score.found <= max(draws):
        steps.append(
            "No better than a blind draw: look at the loss mask and the chat template first (tamis doctor), and "
            "whether the target shows one task."
        )
    elif best.score.found < lexical.score.found:
        steps.append("bm25 finds more, at no cost: compare it, or a shortlist by it (--methods bm25:5x+METHOD).")
    else:
        steps.append(
            "The method sees what is relevant here. Whether training gains by it: tamis compare without --planted."
        )
    auc = best.score.wrong_auc
    if auc is not None and auc < 0.4:
        steps.append(
            f"{best.name} prefers wrong answers to right ones (AUC {auc:.2f}), as scores by difficulty may: do not "
            "trust it on a pool with wrong answers; clean the pool of them by other means."
        )
    elif auc is not None and auc < 0.6:
        steps.append(
            f"{best.name} hardly tells wrong answers from right ones (AUC {auc:.2f}): clean the pool of them by other "
            "means, or leave out rows of high loss (--drop-flagged in tamis select)."
        )
    return title, sentence, steps


def _write_counts(path: Path, standings: Sequence[PlantedStanding]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    areas = ("wrong_auc", "source_auc", "background_auc")
    counts = ("selected", "found", "precision", "recall", "of_the_task", "both_copies")
    writer.writerow(("method", *counts, *areas, *(f"taken: {kind}" for kind in KINDS), "tflops", "seconds"))
    for standing in standings:
        score = standing.score
        written = [getattr(score, name) for name in (*counts, *areas)]
        writer.writerow(
            [standing.name, *("" if value is None else value for value in written)]
            + [score.taken[kind] for kind in KINDS]
            + [standing.tflops, standing.seconds]
        )
    replace_atomically(path, (text.getvalue().encode("utf-8"),))
