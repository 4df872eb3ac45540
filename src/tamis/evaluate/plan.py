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

import numpy as np

from tamis.budget import parse_budget, times, tokens_for
from tamis.corpora import model_settings
from tamis.data.render import Renderer
from tamis.data.row_warnings import bad_row_warnings, row_warnings
from tamis.data.rows import Rows
from tamis.errors import InvalidInput
from tamis.evaluate.calibrate import measured_rate
from tamis.evaluate.devices import Rate, assumed_rate
from tamis.evaluate.inputs import CorpusSize, read_sample
from tamis.evaluate.passes import MethodPlan, landmark_tflops, method_plan, passes_of
from tamis.evaluate.question import MethodQuestion, total_size
from tamis.model.flops import ModelShape
from tamis.model.limits import model_limits, skeleton
from tamis.model.load import load_tokenizer, resolved_device
from tamis.notation import GRADIENT_METHODS, parse_shortlist, target_parts
from tamis.progress import NoProgress
from tamis.protocols import Progress
from tamis.score import METHODS
from tamis.settings import PlanSettings
from tamis.values import method_from_dict, to_dict

__all__ = ["PlanCheck", "PlanResult", "compare_with_run", "estimate_plan"]

_ASSUMED_TARGET_ROWS = 64  # of a plan without a target
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class PlanCheck:
    """A planned quantity beside what a finished run reports."""

    quantity: str
    planned: float | None  # None: the plan has no such number for the device of the run
    measured: float

    @property
    def ratio(self) -> float | None:
        """Planned over measured; None if nothing was planned or measured."""
        return self.planned / self.measured if self.measured and self.planned is not None else None


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What ``tamis plan`` found."""

    model: str  # name of the model
    params: int  # numbers in its weights
    dtype: str  # type in which it would compute
    pool: CorpusSize  # rows and tokens
    target: CorpusSize  # rows and tokens, of all targets
    targets: int  # how many targets
    sampled_rows: int  # rows that were tokenized to estimate the sizes
    budget_rows: int  # rows that the budget selects
    device: str  # on which this machine would run the model: not that of ``rate``, if it is assumed
    rate: Rate  # operations per second, and whether they are assumed or measured
    tokenize_seconds: float  # on one core, before any method starts
    methods: tuple[MethodPlan, ...]  # cost of each method
    landmark_tflops: float  # for comparison: what 4,096 landmarks with embeddings of 4 blocks would cost
    comparisons: tuple[PlanCheck, ...] = ()  # the plan beside a finished run, where one was named
    notes: tuple[str, ...] = ()  # what the plan had to assume


def compare_with_run(plan: PlanResult, manifest: Mapping[str, Any]) -> tuple[PlanCheck, ...]:
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
            ("TFLOP", sum(p.counted_tflops for p in passes), "tflops"),
        )
        for quantity, value, key in pairs:
            spent = float(sum(stage.get(key, 0) for stage in stages))
            comparisons.append(PlanCheck(quantity=f"{work} {quantity}", planned=float(value), measured=spent))
    seconds = float(sum(s.get("seconds", 0) for s in cost["stages"] if s.get("work") in ("forward", "gradient")))
    return (*comparisons, _compared_seconds(plan.rate, planned, manifest, seconds))


def _compared_seconds(rate: Rate, planned: MethodPlan, manifest: Mapping[str, Any], seconds: float) -> PlanCheck:
    """Seconds of an assumed accelerator are named as such, and are not put beside those of a run on a CPU."""
    quantity, value = "seconds of model work", None
    if not rate.is_assumed or not planned.passes:
        value = planned.seconds
    elif not _device_of(manifest).startswith("cpu"):
        quantity, value = f"{quantity} (planned for an assumed {rate.device})", planned.seconds
    return PlanCheck(quantity=quantity, planned=value, measured=seconds)


def _device_of(manifest: Mapping[str, Any]) -> str:
    models = manifest.get("models") or [{}]
    return str(models[0].get("device", "unknown"))


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
    values = {
        name: _values(name, settings.set, projection=settings.projection, projection_dim=settings.projection_dim)
        for name in METHODS
    }
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
    notes = [*renderer.notes]
    if settings.target:
        asked = read([target_parts(text)[1] for text in settings.target], kind="target")
        group = np.array(asked.examples.named_by, dtype=np.int64)[asked.examples.file_index]
        targets = asked.sizes(group, len(settings.target))
    else:
        targets = (pool.times(min(1.0, _ASSUMED_TARGET_ROWS / pool.rows)),)
        asked = None
        notes.append(f"No --target given: {targets[0].rows} target rows like the pool's are assumed.")
    for corpus in filter(None, (sampled, asked)):
        notes += bad_row_warnings(corpus.problems, corpus.kind)
        notes += row_warnings(corpus.examples, renderer, corpus.kind)
        notes += corpus.check_usable_rows(limits, tokenizer)
    if settings.measure:
        measured = measured_rate(
            loading,
            shape,
            sampled,
            batch_tokens=settings.batch_tokens,
            batch_invariant=settings.batch_invariant,
            progress=progress,
        )
        rate, dtype = measured.rate, measured.dtype
    else:
        rate, dtype = assumed, assumed_dtype
        if settings.batch_invariant:
            notes.append(
                f"--batch-invariant passes one row at a time, which reaches less of {rate.device} than is assumed: "
                "--measure times it on this machine, --utilisation says another share."
            )

    num_tokens = int(pool.tokens)
    num_rows = len(sampled.examples)  # a share is of all rows that were read, as in a run
    asked_budget = parse_budget(settings.budget)
    if asked_budget.kind == "tokens" and len(sampled.rows) == num_rows:  # of a sample the total is an estimate
        tokens_for(asked_budget, round(pool.tokens))
    budget = times(asked_budget, 1, num_rows=num_rows, num_tokens=num_tokens)
    shortlist = parse_shortlist(settings.shortlist)
    if shortlist.per_source:
        of_sources = Counter(sampled.examples.source_index.tolist()).values()
        share = sum(min(shortlist.per_source, count) for count in of_sources) / num_rows
    else:
        shortlisted = times(budget, shortlist.multiple, num_rows=num_rows, num_tokens=num_tokens)
        share = min(1.0, shortlisted.value / (pool.rows if shortlisted.kind == "rows" else num_tokens))
    batch_tokens = settings.batch_tokens or (2048 if rate.is_cpu else 16384)

    question = functools.partial(
        MethodQuestion,
        shape=shape,
        pool=pool,
        targets=targets,
        # A shape is needed only if a method trains an adapter, and once per rank.
        with_lora=functools.cache(lambda rank: ModelShape.from_model(skeleton(loading, lora_rank=rank))),
        aggregate=settings.aggregate,
        drop_flagged=settings.drop_flagged,
    )
    plan_of = functools.partial(
        method_plan,
        rate=rate,
        bytes_per_param=_BYTES[dtype],
        batch_tokens=sampled.longest if settings.batch_invariant else batch_tokens,
    )
    # The method in front has its own defaults, whatever is chosen for it alone; a sample of sources has none.
    cheap = shortlist.method
    first = passes_of(cheap, question(scored=pool, values=_values(cheap, {}))) if cheap is not None else ()
    behind = _behind_a_shortlist(settings, run, share)
    methods = []
    for name in METHODS:
        methods.append(plan_of(name, question(scored=pool, values=values[name])))
        if name in behind:
            few = question(scored=pool.times(share), values=values[name])
            methods.append(plan_of(name, few, shortlist=settings.shortlist, before=first))
    result = PlanResult(
        model=settings.model,
        params=shape.params,
        dtype=dtype,
        pool=pool,
        target=total_size(targets),
        targets=len(targets),
        sampled_rows=len(sampled.rows),
        budget_rows=round(budget.value if budget.kind == "rows" else budget.value / num_tokens * pool.rows),
        device=resolved_device(loading) if settings.device == "auto" else settings.device,
        rate=rate,
        tokenize_seconds=sampled.seconds_per_row * pool.rows,
        methods=tuple(methods),
        landmark_tflops=landmark_tflops(shape, pool),
        notes=tuple(notes),
    )
    if run is None:
        return result
    comparisons = compare_with_run(result, run)
    return replace(result, comparisons=comparisons, notes=(*notes, *_unlike(settings, values, rate, run)))


def _behind_a_shortlist(settings: PlanSettings, run: Mapping[str, Any] | None, share: float) -> set[str]:
    """Methods that are shown with the shortlist in front: the dear ones, where it saves, and that of a run with it."""
    shown = set(GRADIENT_METHODS) if share < 1 else set()
    if run is not None and isinstance(done := run.get("settings"), Mapping) and done.get("shortlist"):
        shown.add(str(done.get("method")))
    return shown - {parse_shortlist(settings.shortlist).method}


def _values(
    method: str, chosen: Mapping[str, Any], *, projection: str | None = None, projection_dim: int | None = None
) -> dict[str, Any]:
    """The settings of a method: its defaults, over them those given as ``METHOD.NAME``, over them the projection.

    The method checks them.
    """
    own = {key.rpartition(".")[2]: value for key, value in chosen.items() if key.rpartition(".")[0] == method}
    kind: type[Any] = METHODS[method]
    known = [entry.name for entry in fields(kind)]
    given = {"projection": projection, "projection_dim": projection_dim}
    own |= {name: value for name, value in given.items() if name in known and value is not None}  # others project none
    made = method_from_dict(kind, own, origin=f"settings of method {method!r}")
    return {name: getattr(made, name) for name in known}


def _unlike(
    settings: PlanSettings, values: Mapping[str, Mapping[str, Any]], rate: Rate, manifest: Mapping[str, Any]
) -> list[str]:
    """Where the run and the plan are not of the same job: what was read, how it was scored, on which device."""
    planned, spent = to_dict(settings), manifest["settings"]
    names = ["model", "pool", "target", "max_length", "aggregate", "drop_flagged", "batch_invariant"]
    if spent.get("shortlist"):
        names.append("budget")  # which decides how long it is
    pairs = [(name, spent.get(name), planned[name]) for name in names]
    method = str(spent.get("method"))
    used = manifest.get("method")
    if isinstance(used, Mapping):
        own = json.loads(json.dumps(values[method]))  # lists for tuples, as the manifest has them
        pairs += [(f"{method}.{name}", used[name], own[name]) for name in sorted(own) if name in used]
    found = [
        f"compare: the run had {name} {was!r}, this plan has {is_!r}; the ratios compare different jobs unless both "
        "are the same under two names"
        for name, was, is_ in pairs
        if was != is_
    ]
    device = _device_of(manifest)
    if rate.is_assumed and device.startswith("cpu"):
        found.append(
            f"compare: the run was on a CPU, and without --measure the plan's seconds are those of an assumed "
            f"{rate.device}; none stand beside the run's. --measure times this machine"
        )
    elif manifest.get("models") and not rate.is_assumed and rate.is_cpu != device.startswith("cpu"):
        found.append(f"compare: the run was on {device}, the plan was measured on {rate.device}")
    return found


def _read_manifest(path: str) -> Mapping[str, Any]:
    file = Path(path) / "manifest.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"compare: {file} cannot be read ({error}); pass the folder of a finished run") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"compare: {file} is not a manifest; pass the folder of a finished run")
    return found
