"""What every method would cost on this pool, before it is run, and how a finished run compares with that.

The operations are those of ``flops.py``, which also counts what a run has spent; which passes a method makes is in
``passes.py``.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tamis.budget import parse_budget, times
from tamis.corpora import model_settings
from tamis.data.examples import warn_of
from tamis.data.render import Renderer
from tamis.data.rows import Rows
from tamis.errors import InvalidInput
from tamis.evaluate.calibrate import measured_rate
from tamis.evaluate.devices import Rate, assumed_rate
from tamis.evaluate.inputs import CorpusSize, read_sample
from tamis.evaluate.passes import MethodPlan, MethodQuestion, landmark_tflops, method_plan
from tamis.model.flops import ModelShape, stage_tflops
from tamis.model.limits import model_limits, skeleton
from tamis.model.load import load_tokenizer
from tamis.notation import GRADIENT_METHODS, parse_shortlist, target_parts
from tamis.progress import NoProgress
from tamis.protocols import Progress
from tamis.score import METHODS
from tamis.settings import PlanSettings
from tamis.values import method_from_dict, to_dict

__all__ = ["Comparison", "ModelShape", "PlanResult", "compare_with_run", "estimate_plan", "stage_tflops"]

_ASSUMED_TARGET_ROWS = 64  # of a plan without a target
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A planned quantity beside what a finished run reports."""

    quantity: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Planned over measured; None if nothing was measured."""
        return self.planned / self.measured if self.measured else None


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What ``tamis plan`` found."""

    model: str
    params: int
    dtype: str
    pool: CorpusSize
    target: CorpusSize
    targets: int
    sampled_rows: int
    budget_rows: int
    rate: Rate
    tokenize_seconds: float  # on one core, before any method starts
    methods: tuple[MethodPlan, ...]
    landmark_tflops: float  # for comparison: what 4,096 landmarks with embeddings of 4 blocks would cost
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


def compare_with_run(plan: PlanResult, manifest: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """Planned against spent, for the method of a finished run: rows, tokens and operations by kind of work, and time.

    Args:
        plan: a plan of the same model, pool and target.
        manifest: the run's ``manifest.json``; of its ``cost`` block, every stage with work is compared.

    Raises:
        InvalidInput: the manifest holds no costs, or its method is not in the plan.
    """
    settings, cost = manifest.get("settings"), manifest.get("cost")
    if not isinstance(settings, Mapping) or not isinstance(cost, Mapping) or "stages" not in cost:
        raise InvalidInput("compare: this manifest holds no settings and costs; pass manifest.json of a finished run")
    method, shortlist = settings.get("method"), settings.get("shortlist")
    found = [m for m in plan.methods if m.method == method and m.shortlist == shortlist]
    if not found:
        cascade = f" after {shortlist}" if shortlist else ""
        raise InvalidInput(
            f"compare: the run used {method}{cascade}, which this plan does not hold; plan with the run's --shortlist"
        )
    planned = found[0]
    comparisons = []
    for work in ("forward", "gradient"):
        stages = [stage for stage in cost["stages"] if stage.get("work") == work]
        passes = [p for p in planned.passes if p.work == work]
        if not stages and not passes:
            continue
        pairs = (
            ("rows", sum(p.size.rows for p in passes), "rows"),
            ("tokens", sum(p.size.tokens for p in passes), "tokens"),
            ("TFLOP", sum(p.tflops for p in passes), "tflops"),
        )
        for quantity, value, key in pairs:
            spent = float(sum(stage.get(key, 0) for stage in stages))
            comparisons.append(Comparison(quantity=f"{work} {quantity}", planned=float(value), measured=spent))
    seconds = float(sum(s.get("seconds", 0) for s in cost["stages"] if s.get("work") in ("forward", "gradient")))
    comparisons.append(Comparison(quantity="seconds of model work", planned=planned.seconds, measured=seconds))
    return tuple(comparisons)


def estimate_plan(
    settings: PlanSettings, *, progress: Progress | None = None, held: Mapping[str, Rows] | None = None
) -> PlanResult:
    """Read the pool and target, count, and estimate every method; no weights are loaded unless ``measure`` is on.

    ``held`` has the rows in memory that ``settings`` name.

    Raises:
        InvalidInput: data or model cannot be used, or the manifest to compare with cannot be read.
        InvalidSettings: an unknown device or method setting.
    """
    progress = progress or NoProgress()
    values = {name: _values(name, settings.set) for name in METHODS}
    run = _read_manifest(settings.compare) if settings.compare else None
    loading = model_settings(settings)
    assumed_dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    assumed = assumed_rate(settings.assume_device, assumed_dtype, utilisation=settings.utilisation)
    shape = ModelShape.from_model(skeleton(loading))
    limits, tokenizer = model_limits(loading), load_tokenizer(loading)
    renderer = Renderer(tokenizer, max_length=settings.max_length)
    read = functools.partial(
        read_sample,
        renderer=renderer,
        row_format=settings.row_format,
        on_bad_row=settings.on_bad_row,
        sample=settings.sample,
        progress=progress,
        held=held,
    )
    sampled = read(settings.pool, kind="pool")
    pool = sampled.size()
    notes = [*renderer.notes, *sampled.check_usable_rows(limits, tokenizer)]
    warn_of(sampled.examples, "pool")
    if settings.target:
        asked = read([target_parts(text)[1] for text in settings.target], kind="target")
        notes += asked.check_usable_rows(limits, tokenizer)
        warn_of(asked.examples, "target")
        target = asked.size()
    else:
        target = pool.times(min(1.0, _ASSUMED_TARGET_ROWS / pool.rows))
        notes.append(f"No --target given: {target.rows} target rows like the pool's are assumed.")
    if settings.measure:
        measured = measured_rate(loading, shape, sampled, batch_tokens=settings.batch_tokens, progress=progress)
        rate, dtype = measured.rate, measured.dtype
    else:
        rate, dtype = assumed, assumed_dtype

    num_tokens = int(pool.tokens)
    num_rows = len(sampled.examples)  # a share is of all rows that were read, as in a run
    budget = times(parse_budget(settings.budget), 1, num_rows=num_rows, num_tokens=num_tokens)
    shortlist = parse_shortlist(settings.shortlist)
    if shortlist.per_source:
        of_sources = Counter(sampled.examples.source_index.tolist()).values()
        share = sum(min(shortlist.per_source, count) for count in of_sources) / num_rows
    else:
        shortlisted = times(budget, shortlist.multiple, num_rows=num_rows, num_tokens=num_tokens)
        share = min(1.0, shortlisted.value / (pool.rows if shortlisted.kind == "rows" else num_tokens))
    # A shape is needed only if a method trains an adapter, and once per rank.
    with_lora = functools.cache(lambda rank: ModelShape.from_model(skeleton(loading, lora_rank=rank)))
    plan_of = functools.partial(
        method_plan,
        rate=rate,
        bytes_per_param=_BYTES[dtype],
        batch_tokens=settings.batch_tokens or (2048 if rate.is_cpu else 16384),
    )
    methods = []
    for name in METHODS:
        question = MethodQuestion(
            shape=shape,
            scored=pool,
            pool=pool,
            target=target,
            targets=max(1, len(settings.target)),
            values=values[name],
            with_lora=with_lora,
            projection=settings.projection,
            projection_dim=settings.projection_dim,
        )
        methods.append(plan_of(name, question))
        if name in GRADIENT_METHODS and share < 1:
            methods.append(plan_of(name, replace(question, scored=pool.times(share)), shortlist=settings.shortlist))
    result = PlanResult(
        model=settings.model,
        params=shape.params,
        dtype=dtype,
        pool=pool,
        target=target,
        targets=max(1, len(settings.target)),
        sampled_rows=len(sampled.rows),
        budget_rows=round(budget.value if budget.kind == "rows" else budget.value / num_tokens * pool.rows),
        rate=rate,
        tokenize_seconds=sampled.seconds_per_row * pool.rows,
        methods=tuple(methods),
        landmark_tflops=landmark_tflops(shape, pool),
        notes=tuple(notes),
    )
    if run is None:
        return result
    return replace(result, comparisons=compare_with_run(result, run), notes=(*notes, *_unlike(settings, run)))


def _values(method: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method: its defaults, over them those given as ``METHOD.NAME``; the method checks them."""
    own = {key.rpartition(".")[2]: value for key, value in chosen.items() if key.rpartition(".")[0] == method}
    kind: type[Any] = METHODS[method]
    made = method_from_dict(kind, own, origin=f"settings of method {method!r}")
    return {entry.name: getattr(made, entry.name) for entry in fields(made)}


def _unlike(settings: PlanSettings, manifest: Mapping[str, Any]) -> list[str]:
    """What the run read that the plan does not: its ratios then compare two different jobs."""
    planned, spent = to_dict(settings), manifest["settings"]
    names = [name for name in ("model", "pool", "target", "max_length") if spent.get(name) != planned[name]]
    return [
        f"compare: the run had {name} {spent.get(name)!r}, this plan has {planned[name]!r}; the ratios compare "
        "different jobs unless both are the same under two names"
        for name in names
    ]


def _read_manifest(path: str) -> Mapping[str, Any]:
    file = Path(path) / "manifest.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"compare: {file} cannot be read ({error}); pass the folder of a finished run") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"compare: {file} is not a manifest; pass the folder of a finished run")
    return found
