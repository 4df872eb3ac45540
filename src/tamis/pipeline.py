"""The selection run from top to bottom: read, shortlist, score, choose, compare with cheap baselines, write.

Every step that takes long lives in the store, so this function is simply called again after an interruption.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tamis.collect import Collecting, Task
from tamis.config import write_config
from tamis.corpora import Corpora, model_settings, read_corpora, read_sources, write_skipped
from tamis.errors import InvalidSettings
from tamis.evaluate.inputs import skeleton
from tamis.model.flops import ModelShape, stage_tflops
from tamis.model.load import model_fingerprint
from tamis.model.processes import barrier, is_main
from tamis.outputs import claim_folder, file_digest, score_table, write_json, write_scores, write_selected
from tamis.progress import NoProgress
from tamis.protocols import Method, Progress
from tamis.report.content import ReportInputs, build_content
from tamis.report.page import write_page
from tamis.score import METHODS
from tamis.score.losses import row_losses
from tamis.seeds import child_seed
from tamis.selection.budget import parse_budget, rows_for, times, tokens_for
from tamis.selection.choose import Choice, choose
from tamis.selection.flags import flag_high_losses
from tamis.settings import SelectSettings, from_dict, shortlist_parts, to_dict
from tamis.types import Budget, FloatArray, IntArray, TargetScores

__all__ = ["Selection", "make_method", "select_from_settings"]

# Draws of the uniform baseline: their spread is what a difference to it has to exceed.
_UNIFORM_DRAWS = 4
# Settings that cannot change a selection; all others make a folder the folder of one run.
_FREE_SETTINGS = ("out", "store", "report", "shard_rows", "on_bad_row", "batch_tokens")

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was selected, also on disk under ``out``."""

    out: Path
    table: pa.Table  # as scores.parquet: one row per pool row, in pool order
    order: IntArray  # selected pool rows, best first
    warnings: tuple[str, ...]  # what to know before training on them
    manifest: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.order)

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis select --json`` prints it."""
        manifest, pool = self.manifest, self.manifest["data_files"]["pool"]
        return {
            "method": manifest["method"]["name"],
            "pool": {key: pool[key] for key in ("rows", "usable", "scored", "exact_copies", "leaked")},
            "selected_rows": len(self.order),
            "selected_tokens": manifest["selected"]["tokens"],
            "seconds": manifest["cost"]["elapsed_s"],
            "tflops": manifest["cost"]["total_tflops"],
            "warnings": list(self.warnings),
            "selected": str(self.out / "selected.jsonl"),
            "scores": str(self.out / "scores.parquet"),
            "report": str(self.out / "report.html") if manifest["settings"]["report"] else None,
        }


def select_from_settings(
    settings: SelectSettings, *, method: Method | None = None, progress: Progress | None = None
) -> Selection:
    """The run that ``settings`` describe; see ``tamis.select``. ``method`` stands in for the one they name."""
    started = time.perf_counter()
    progress = progress or NoProgress()
    method = method or make_method(settings)
    budget = parse_budget(settings.budget)
    out = Path(settings.out)
    store = Path(settings.store) if settings.store else out / "store"
    fingerprint = model_fingerprint(model_settings(settings))
    sources = read_sources(settings)
    identity = {
        "tamis": metadata.version("tamis"),
        "model": fingerprint,
        "data": {"pool": sources.pool.content_hash, "target": sources.target.content_hash},
        "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
        "settings": {k: v for k, v in to_dict(settings).items() if k not in _FREE_SETTINGS},
    }
    if is_main():
        claim_folder(out, identity)
        write_config("select", settings, out / "run.yaml")
    barrier()

    corpora = read_corpora(sources, settings, store=store, progress=progress)
    if is_main():
        write_skipped(out / "skipped.jsonl", corpora.skipped)
    _check_budget(budget, corpora)
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
        stages=[corpora.pool.stage, corpora.target.stage],
    )
    chooser = _Chooser(settings=settings, corpora=corpora, budget=budget)
    if settings.shortlist:
        task.rows = _shortlist(task, settings.shortlist, chooser)
    scoring_started = time.perf_counter()
    scores = method.score(task)
    scoring_s = time.perf_counter() - scoring_started
    losses, flagged = _losses_and_flags(task, scores, corpora, needed=settings.drop_flagged)
    excluded = scores.rows[scores.extra["zero_gradient"]] if "zero_gradient" in scores.extra else scores.rows[:0]
    chooser = replace(chooser, flagged=flagged if settings.drop_flagged else None, excluded=excluded)
    choice = chooser(scores)
    baselines, baseline_scores = _baselines(replace(task, rows=every_row, notes=[]), settings, chooser)

    table = score_table(corpora, choice, losses=losses, flagged=flagged)
    manifest: dict[str, Any] = {
        **identity,
        "command": f"tamis select --config {out / 'run.yaml'}",
        "versions": _versions(),
        "method": {"name": method.name, **dataclasses.asdict(method)},  # type: ignore[call-overload]  # a dataclass
        "settings": to_dict(settings),
        "models": task.model_descriptions(),
        "data_files": _describe_data(corpora, scored=len(scores.rows)),
        "selected": {"rows": len(choice.order), "tokens": choice.tokens},
        "notes": [*task.notes, *scores.notes, *choice.notes],
        "cost": _costs(task, method.name, scoring_s=scoring_s, elapsed_s=time.perf_counter() - started),
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
            skipped=corpora.skipped,
        )
    )
    manifest["warnings"] = [f.sentence for f in content.findings if f.severity == "warning"]
    if is_main():
        write_selected(out / "selected.jsonl", corpora, choice)
        write_scores(out / "scores.parquet", table)
        if settings.report:
            write_page(content, out / "report.html")
        manifest["files"] = {name: file_digest(out / name) for name in ("selected.jsonl", "scores.parquet")}
        write_json(out / "manifest.json", manifest)  # last: its presence says that the run is complete
    barrier()
    return Selection(out=out, table=table, order=choice.order, warnings=tuple(manifest["warnings"]), manifest=manifest)


def make_method(settings: SelectSettings) -> Method:
    """The method that ``settings`` name, with its own settings and the projection filled in.

    Raises:
        InvalidSettings: the method has no such setting, or refuses its value.
    """
    kind = METHODS[settings.method]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.set.items()}
    known = {field.name for field in dataclasses.fields(kind)}
    for name, value in (("projection", settings.projection), ("projection_dim", settings.projection_dim)):
        if value is None:
            continue
        if name not in known:
            raise InvalidSettings(
                f"{name}: method {settings.method!r} takes no gradients, so there is nothing to project"
            )
        values[name] = value
    return from_dict(kind, values, origin=f"settings of method {settings.method!r}")


def _check_budget(budget: Budget, corpora: Corpora) -> None:
    """Refuse a budget above the pool before anything is computed, not after."""
    if budget.kind == "tokens":
        tokens_for(budget, int(corpora.pool.lengths.sum()))
    else:
        rows_for(budget, len(corpora.pool))


@dataclass(frozen=True, kw_only=True)
class _Chooser:
    """The same choice for the method and for every baseline, so that only the scores differ."""

    settings: SelectSettings
    corpora: Corpora
    budget: Budget
    flagged: BoolArray | None = None  # rows to leave out for their loss
    excluded: IntArray | None = None  # rows that a method can say nothing of

    def __call__(self, scores: TargetScores, *, budget: Budget | None = None) -> Choice:
        pool, settings = self.corpora.pool, self.settings
        eligible = pool.usable.copy()
        if settings.drop_leaks:
            eligible &= ~self.corpora.leaked
        if self.flagged is not None:
            eligible &= ~self.flagged
        if self.excluded is not None:
            eligible[self.excluded] = False
        copies = {"keep": None, "one": self.corpora.first_copy, "near": self.corpora.first_near_copy}
        return choose(
            scores,
            budget=budget or self.budget,
            tokens=pool.lengths,
            aggregate=settings.aggregate,
            shares=settings.shares or None,
            first_of=copies[settings.duplicates],
            eligible=eligible,
        )


def _shortlist(task: Task, text: str, chooser: _Chooser) -> IntArray:
    """The rows that a cheap method keeps for the chosen one: a multiple of the budget."""
    name, factor = shortlist_parts(text)
    pool = task.pool
    budget = times(chooser.budget, factor, num_rows=len(pool), num_tokens=int(pool.lengths.sum()))
    kept = np.sort(chooser(METHODS[name]().score(task), budget=budget).order)
    task.note(
        f"{name} kept {len(kept)} of {len(task.rows)} rows ({factor:g} times the budget); only those were scored by "
        f"{chooser.settings.method}, the others have no score."
    )
    return kept


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
    task: Task, settings: SelectSettings, chooser: _Chooser
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


def _describe_data(corpora: Corpora, *, scored: int) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for corpus in (corpora.pool, corpora.target):
        described[corpus.name] = {
            "files": list(corpus.examples.files),
            "content_hash": corpus.examples.content_hash,
            "rows": len(corpus),
            "usable": int(corpus.usable.sum()),
            "skipped": sum(row.corpus == corpus.name for row in corpora.skipped),
            "truncated_rows": int((corpus.truncated > 0).sum()),
            "truncated_tokens": int(corpus.truncated.sum()),
            "tokens": int(corpus.lengths.sum()),
            "supervised_tokens": int(corpus.supervised.sum()),
        }
    own = np.arange(len(corpora.pool))
    described["pool"] |= {
        "scored": scored,
        "exact_copies": int((corpora.first_copy != own).sum()),
        "near_copies": int((corpora.first_near_copy != own).sum()),
        "leaked": int(corpora.leaked.sum()),
        "duplicate_ids": len(corpora.pool.examples.duplicate_ids),
    }
    return described


def _costs(task: Task, method: str, *, scoring_s: float, elapsed_s: float) -> dict[str, Any]:
    """What was spent, stage by stage. Stages reused from an earlier run count with what they cost then.

    A method that keeps nothing in the store (BM25, say) is one line with the time it took now.
    """
    shape: ModelShape | None = None
    stages: list[dict[str, Any]] = []
    total_seconds = total_tflops = 0.0
    for cost in task.costs():
        if cost.work != "none" and shape is None:
            shape = ModelShape.from_model(skeleton(task.model_settings))
        tflops = stage_tflops(shape, cost) if shape else 0.0
        if cost.operations is not None:
            tflops = cost.operations / 1e12
        counts = {"rows": cost.rows, "tokens": cost.tokens, "supervised_tokens": cost.supervised_tokens}
        seconds = round(cost.elapsed_s, 3)
        stages.append({"name": cost.name, "work": cost.work, **counts, "seconds": seconds, "tflops": tflops})
        total_seconds += seconds
        total_tflops += tflops
    if all(stage["work"] == "none" for stage in stages):
        rows = {"rows": len(task.rows), "tokens": 0, "supervised_tokens": 0}
        stages.append({"name": method, "work": "none", **rows, "seconds": round(scoring_s, 3), "tflops": 0.0})
        total_seconds += scoring_s
    return {
        "elapsed_s": round(elapsed_s, 3),
        "stages": stages,
        "total_seconds": round(total_seconds, 3),
        "total_tflops": total_tflops,
    }


def _versions() -> dict[str, str]:
    names = ("tamis", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "safetensors")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), **found}
