"""Parts of a run's ``manifest.json``: the data as counted, what was spent, what repeats the run and what decides it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tamis import __version__
from tamis.collect import Task
from tamis.corpora import Corpora
from tamis.model.flops import ModelShape, stage_tflops
from tamis.model.limits import skeleton
from tamis.values import to_dict
from tamis.versions import releases

__all__ = ["COMPUTING", "TRAINER", "base_identity", "costs", "describe_data", "identity_settings", "repeat_command"]

COMPUTING = ("torch", "transformers", "peft", "tokenizers")
TRAINER = (*COMPUTING, "accelerate")  # of verbs that train with the Trainer


def repeat_command(verb: str, out: Path, held: Collection[str]) -> str:
    """What repeats the run in folder ``out``; ``held`` names rows that were given in memory."""
    if held:
        return f"tamis.{verb}(...) in Python with the same rows: run.yaml cannot bring back {' and '.join(held)}"
    return f"tamis {verb} --config {out / 'run.yaml'}"


def base_identity(*, libraries: Sequence[str] = COMPUTING, **inputs: Any) -> dict[str, Any]:
    """What every verb's identity begins with: another release of a library or of our own may give other numbers.

    Args:
        libraries: those that the verb computes with.
        inputs: what its model and files hold.
    """
    return {"tamis": __version__, **inputs, "libraries": releases(*libraries)}


def identity_settings(settings: Any, leave_out: Collection[str]) -> dict[str, Any]:
    """A verb's settings without those that cannot change the result or are known by what they name."""
    return {name: value for name, value in to_dict(settings).items() if name not in leave_out}


def describe_data(corpora: Corpora, *, scored: int) -> dict[str, Any]:
    """Files, rows and tokens of pool and target, and how the pool's rows relate."""
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


def costs(task: Task, method: str, *, scoring_s: float, elapsed_s: float) -> dict[str, Any]:
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
