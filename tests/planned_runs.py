"""A run's account beside the plan of the same job, stage by stage: for the tests that hold the two equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tamis
from tamis.evaluate.passes import MethodPlan
from tamis.evaluate.plan import estimate_plan
from tamis.settings import PlanSettings

SHARED = ("aggregate", "drop_flagged", "batch_invariant", "dtype", "projection", "projection_dim", "max_length")


def run_and_plan(
    out: Path, *, method: str, chosen: Mapping[str, Any], shortlist: str | None = None, **settings: Any
) -> tuple[Mapping[str, Any], MethodPlan]:
    """The manifest of a run, and the plan of its method that reads every row."""
    run = tamis.select(method=method, set=chosen, shortlist=shortlist, out=out, report=False, **settings)
    shared = {name: settings[name] for name in SHARED if name in settings}
    target = settings["target"]
    if isinstance(target, Mapping):
        target = [f"{name}={path}" for name, path in target.items()]
    plan = estimate_plan(
        PlanSettings(
            model=str(settings["model"]),
            pool=(str(settings["pool"]),),
            target=tuple(target) if isinstance(target, list) else (str(target),),
            budget=settings["budget"],
            shortlist=shortlist or "bm25:5x",
            set={f"{method}.{name}": value for name, value in chosen.items()},
            sample=0,
            compare=str(out),
            on_bad_row=settings.get("on_bad_row", "fail"),
            **shared,
        )
    )
    assert not any("different jobs" in note for note in plan.notes), plan.notes
    (planned,) = (m for m in plan.methods if (m.method, m.shortlist) == (method, shortlist))
    return run.manifest, planned


def spent_by_stage(manifest: Mapping[str, Any], quantity: str) -> dict[str, float]:
    """Rows, tokens or tflops of every kind of stage in which a model ran."""
    total: Counter[str] = Counter()
    for stage in manifest["cost"]["stages"]:
        if stage["work"] != "none":
            total[stage["name"]] += stage[quantity]
    return dict(total)


def planned_by_stage(plan: MethodPlan, quantity: str) -> dict[str, float]:
    """The same of the passes of a plan."""
    total: Counter[str] = Counter()
    for made in plan.passes:
        total[made.stage] += made.counted_tflops if quantity == "tflops" else getattr(made.size, quantity)
    return dict(total)
