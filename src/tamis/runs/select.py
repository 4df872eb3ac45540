"""The selection run from top to bottom: read, shortlist, score, choose, compare with cheap baselines, write.

Every step that takes long lives in the store, so this function is simply called again after an interruption.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tamis.budget import parse_budget, rows_for, tokens_for
from tamis.collect import Collecting, Task
from tamis.config import write_config
from tamis.corpora import Corpora, model_settings, read_corpora, read_sources, write_skipped
from tamis.data.rows import Rows
from tamis.disk import check_writable
from tamis.errors import InvalidSettings
from tamis.identity import file_sha256
from tamis.model.load import model_fingerprint, resolved_dtype, template_sha256
from tamis.model.processes import barrier, is_main
from tamis.notation import Shortlist, parse_shortlist
from tamis.progress import NoProgress
from tamis.protocols import Method, Progress, ReadsFiles
from tamis.report.content import ReportInputs, build_content
from tamis.report.selection import write_page
from tamis.runs.manifest import base_identity, costs, describe_data, identity_settings, repeat_command
from tamis.runs.outputs import (
    MESSAGES,
    check_claim,
    claim_folder,
    score_table,
    write_json,
    write_messages,
    write_scores,
    write_selected,
)
from tamis.runs.row_shapes import count_shapes, training_warnings
from tamis.runs.select_rows import Chooser, carried_scores, shortlisted_rows
from tamis.score import METHODS
from tamis.score.losses import row_losses
from tamis.seeds import child_seed
from tamis.selection.choose import Choice
from tamis.selection.flags import flag_high_losses
from tamis.settings import SelectSettings
from tamis.types import Budget, FloatArray, IntArray, TargetScores
from tamis.values import method_from_dict, to_dict
from tamis.versions import versions

__all__ = ["Selection", "make_method", "select_from_settings"]

# Draws of the uniform baseline: their spread is what a difference to it has to exceed.
_UNIFORM_DRAWS = 4
# Settings that cannot change a selection; all others make a folder the folder of one run.
_FREE_SETTINGS = ("out", "store", "report", "write_messages", "shard_rows", "on_bad_row", "batch_tokens")
# Settings that name a place; what is there is in the identity instead, so that a folder may move but not change.
_KNOWN_BY_CONTENT = ("model", "revision", "chat_template")

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was selected, also on disk under ``out``."""

    out: Path  # folder of the result
    table: pa.Table  # as scores.parquet: one row per pool row, in pool order
    order: IntArray  # selected pool rows, best first
    warnings: tuple[str, ...]  # what to know before training on them
    manifest: Mapping[str, Any]  # what determined the result and what it cost, as manifest.json

    def __len__(self) -> int:
        return len(self.order)

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis select --json`` prints it."""
        manifest, pool = self.manifest, self.manifest["data_files"]["pool"]
        chats = self.out / MESSAGES  # absent where no row has a form as a chat
        has_chats = manifest["settings"]["write_messages"] and chats.exists()
        return {
            "method": manifest["method"]["name"],
            "model": _what_ran(manifest["models"]),
            "pool": {key: pool[key] for key in ("rows", "usable", "scored", "exact_copies", "leaked")},
            "selected_rows": len(self.order),
            "selected_tokens": manifest["selected"]["tokens"],
            "seconds": manifest["cost"]["elapsed_s"],
            "tflops": manifest["cost"]["total_tflops"],
            **manifest["diagnosis"],
            "warnings": list(self.warnings),
            "selected": str(self.out / "selected.jsonl"),
            **({"selected_messages": str(chats)} if has_chats else {}),
            "scores": str(self.out / "scores.parquet"),
            "report": str(self.out / "report.html") if manifest["settings"]["report"] else None,
        }


def select_from_settings(
    settings: SelectSettings,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
    held: Mapping[str, Rows] | None = None,
) -> Selection:
    """The run that ``settings`` describe; see ``tamis.select``.

    ``method`` stands in for the one they name, and ``held`` has the rows in memory that they name.
    """
    held = held or {}
    started = time.perf_counter()
    progress = progress or NoProgress()
    method = method or make_method(settings)
    budget = parse_budget(settings.budget)
    out = Path(settings.out)
    store = Path(settings.store) if settings.store else out / "store"
    if is_main():  # what takes no time is tried before files are read and weights are hashed
        check_writable(out)
        check_writable(store)
    resolved_dtype(model_settings(settings))  # refuses a device that is not there
    fingerprint = model_fingerprint(model_settings(settings))
    sources = read_sources(settings, held)
    data = {"pool": sources.pool.identity, "target": sources.target.identity}
    identity = {
        **base_identity(model=fingerprint, data=data),
        **_settings_identity(settings, method),
    }
    if is_main():
        claim_folder(out, identity)
        write_config("select", settings, out / "run.yaml", held=list(held))
    barrier()

    corpora = read_corpora(sources, settings, store=store, progress=progress)
    if is_main():
        write_skipped(out / "skipped.jsonl", corpora.skipped)
    _check_choice(budget, corpora, settings)
    every_row = np.flatnonzero(corpora.pool.usable).astype(np.int64)
    task = Task(
        pool=corpora.pool,
        target=corpora.target,
        target_names=corpora.target_names,
        target_rows=corpora.target_rows,
        target_group=corpora.target_group,
        rows=every_row,
        model_settings=model_settings(settings),
        collecting=Collecting(
            batch_tokens=settings.batch_tokens, batch_invariant=settings.batch_invariant, shard_rows=settings.shard_rows
        ),
        store=store,
        seed=settings.seed,
        aggregate=settings.aggregate,
        progress=progress,
        notes=list(corpora.notes),
        warnings=list(corpora.warnings),
        stages=[corpora.pool.stage, corpora.target.stage],
    )
    chooser = Chooser(settings=settings, corpora=corpora, budget=budget)
    shortlist = parse_shortlist(settings.shortlist) if settings.shortlist else None
    if shortlist is not None:
        task.rows = shortlisted_rows(task, shortlist, chooser)
    scoring_started = time.perf_counter()
    scores = method.score(task)
    scoring_s, scored = time.perf_counter() - scoring_started, len(scores.rows)
    losses, flagged = _losses_and_flags(task, scores, corpora, needed=settings.drop_flagged)
    if shortlist is not None and shortlist.per_source:
        flagged[:] = False  # a few rows of a source say too little of which of them are unusual
    excluded = scores.rows[scores.extra["zero_gradient"]] if "zero_gradient" in scores.extra else scores.rows[:0]
    chooser = replace(chooser, flagged=flagged if settings.drop_flagged else None, excluded=excluded)
    if shortlist is not None and shortlist.per_source:
        scores = carried_scores(task, scores, chooser.unleaked(every_row), excluded)
        chooser = replace(chooser, tie_seed=settings.seed)
    choice = chooser(scores)
    chooser = replace(chooser, tie_seed=None)
    baselines, baseline_scores = _baselines(replace(task, rows=every_row, notes=[], warnings=[]), settings, chooser)

    shapes = count_shapes(choice.order.tolist(), corpora.pool.examples.__getitem__)
    landmarks = scores.rows[scores.extra["is_landmark"]] if "is_landmark" in scores.extra else None
    table = score_table(corpora, choice, losses=losses, flagged=flagged, landmarks=landmarks)
    manifest: dict[str, Any] = {
        **identity,
        "command": repeat_command("select", out, held),
        "versions": versions(),
        "method": {"name": method.name, **dataclasses.asdict(method)},  # type: ignore[call-overload]  # a dataclass
        "settings": to_dict(settings),
        "models": task.model_descriptions(),
        "data_files": describe_data(corpora, scored=scored),
        "selected": {"rows": len(choice.order), "tokens": choice.tokens},
        "diagnosis": dict(scores.diagnosis),
        "notes": [*task.notes, *scores.notes, *choice.notes, *_landmark_share(scores, choice, shortlist)],
        "cost": costs(task, method.name, scoring_s=scoring_s, elapsed_s=time.perf_counter() - started),
    }
    content = build_content(
        ReportInputs(
            table=table,
            baselines=baselines,
            baseline_scores=baseline_scores,
            manifest=manifest,
            read_example=corpora.pool.examples.__getitem__,
            read_target=lambda column: corpora.target.examples[int(corpora.target_rows[column])],
            target_names=corpora.target_names,
            target_group=corpora.target_group,
            target_supervised_tokens=corpora.target.supervised[corpora.target_rows],
            notes=manifest["notes"],
            warnings=[
                *(("About the run", sentence) for sentence in task.warnings),
                *(("The budget was not spent", sentence) for sentence in choice.warnings),
                *(("Training", sentence) for sentence in training_warnings(shapes, as_chats=settings.write_messages)),
            ],
            skipped=corpora.skipped,
        )
    )
    manifest["warnings"] = [f.line for f in content.findings if f.severity == "warning"]
    if is_main():
        check_claim(out, identity)
        write_selected(out / "selected.jsonl", corpora, choice)
        if settings.write_messages:
            write_messages(out / MESSAGES, corpora, choice)
        write_scores(out / "scores.parquet", table)
        if settings.report:
            write_page(content, out / "report.html")
        written = [name for name in ("selected.jsonl", MESSAGES, "scores.parquet") if (out / name).exists()]
        manifest["files"] = {name: file_sha256(out / name) for name in written}
        write_json(out / "manifest.json", manifest)  # last: its presence says that the run is complete
    barrier()
    return Selection(out=out, table=table, order=choice.order, warnings=tuple(manifest["warnings"]), manifest=manifest)


def _settings_identity(settings: SelectSettings, method: Method) -> dict[str, Any]:
    """``settings`` as far as they can change the result, and ``inputs``: what the files hold that they name."""
    inputs = method.by_content(model_settings(settings)) if isinstance(method, ReadsFiles) else {}
    plain = identity_settings(settings, (*_FREE_SETTINGS, *_KNOWN_BY_CONTENT))
    plain["set"] = {name: value for name, value in settings.set.items() if name not in inputs}
    if settings.chat_template is not None:
        inputs["chat_template"] = template_sha256(settings.chat_template)
    return {"settings": plain, "inputs": inputs}


def _landmark_share(scores: TargetScores, choice: Choice, shortlist: Shortlist | None) -> tuple[str, ...]:
    """Transferred scores shrink towards their mean, so landmarks may fill more of a selection than of the pool."""
    marks = scores.extra.get("is_landmark")
    by_source = shortlist is not None and shortlist.per_source > 0  # all rows of a source have the same score
    if marks is None or marks.all() or by_source:
        return ()
    taken = int(np.isin(choice.order, scores.rows[marks]).sum())
    return (
        f"{taken} of {len(choice.order)} selected rows ({taken / len(choice.order):.0%}) are landmarks, which have a "
        f"gradient of their own; of all scored rows {marks.mean():.0%} are",
    )


def _what_ran(models: Sequence[Mapping[str, Any]]) -> str | None:
    """Which weights were used, in which dtype and where; None where no model ran."""
    if not models:
        return None
    model = models[0]
    dtype = f"dequantised to {model['dtype']}" if model["kind"] == "gguf" else model["dtype"]
    return f"{model['name']} ({dtype} on {model['device']}, {model['attention']} attention)"


def make_method(settings: SelectSettings) -> Method:
    """The method that ``settings`` name, with its own settings and the projection filled in.

    Raises:
        InvalidSettings: the method has no such setting, or refuses its value.
    """
    kind = METHODS[settings.method]
    values = dict(settings.set)
    known = {field.name for field in dataclasses.fields(kind)}
    for name, value in (("projection", settings.projection), ("projection_dim", settings.projection_dim)):
        if value is None:
            continue
        if name not in known:
            raise InvalidSettings(
                f"{name}: method {settings.method!r} projects nothing: it compares no gradients, or exact ones; leave "
                "it out"
            )
        values[name] = value
    return method_from_dict(kind, values, origin=f"settings of method {settings.method!r}")


def _check_choice(budget: Budget, corpora: Corpora, settings: SelectSettings) -> None:
    """Refuse a choice that cannot be made, a budget above the pool or no row left, before anything is computed."""
    usable = corpora.pool.usable
    if settings.drop_leaks and not (usable & ~corpora.leaked).any():
        raise InvalidSettings(
            f"--drop-leaks leaves no row to select from: all {int(usable.sum())} usable rows of the pool, or their "
            "prompts, are target rows too; give target rows that are not in the pool, or select with --keep-leaks"
        )
    if budget.kind == "tokens":
        tokens_for(budget, int(corpora.pool.lengths.sum()))
    else:
        rows_for(budget, len(corpora.pool))


def _losses_and_flags(
    task: Task, scores: TargetScores, corpora: Corpora, *, needed: bool
) -> tuple[FloatArray | None, BoolArray]:
    """Each pool row's own loss where it is known (NaN elsewhere), and whether it is unusually high for its kind."""
    n = len(corpora.pool)
    flagged = np.zeros(n, dtype=np.bool_)
    known = scores.extra.get("loss")
    if known is None and needed:
        known = row_losses(task, task.pool, scores.rows)
    if known is None:
        return None, flagged
    losses = np.full(n, np.nan, dtype=np.float32)
    losses[scores.rows] = known
    found = flag_high_losses(
        np.asarray(known), corpora.pool.examples.source_index[scores.rows], corpora.pool.supervised[scores.rows]
    )
    flagged[scores.rows] = found.flagged
    return losses, flagged


def _baselines(
    task: Task, settings: SelectSettings, chooser: Chooser
) -> tuple[dict[str, IntArray], dict[str, FloatArray]]:
    """What the cheap methods would have taken at the same budget, and their scores of every row."""
    chosen: dict[str, IntArray] = {}
    scores: dict[str, FloatArray] = {}
    for draw in range(_UNIFORM_DRAWS):
        seeded = replace(task, seed=child_seed(settings.seed, "uniform baseline", draw) % 2**63)
        chosen[f"uniform:{draw}"] = chooser(METHODS["uniform"]().score(seeded)).order
    for name in ("length", "bm25"):
        if name == settings.method:
            continue
        choice = chooser(METHODS[name]().score(task))
        chosen[name] = choice.order
        full = np.full(len(task.pool), np.nan, dtype=np.float32)
        full[choice.rows] = choice.score
        scores[name] = full
    return chosen, scores
