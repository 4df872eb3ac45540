"""The verbs of the library, as the README shows them. They join the rooms below and compute nothing themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tamis.arguments import (
    as_module,
    as_progress,
    check_method_object,
    data_values,
    path_of,
    paths_of,
    plain_settings,
    refuse_out,
    targets_of,
    trace_values,
)
from tamis.data.rows import Rows, are_rows
from tamis.errors import InvalidSettings
from tamis.evaluate.doctor import DoctorResult, examine
from tamis.evaluate.plan import PlanResult, estimate_plan
from tamis.online.methods.by_name import online_settings
from tamis.online.methods.choice import Method as OnlineMethod
from tamis.protocols import Method, Progress
from tamis.runs.attribute import attribute_from_settings
from tamis.runs.attribution_result import Attribution
from tamis.runs.compare import CompareResult, PlantedResult, compare_from_settings
from tamis.runs.proxy import ProxyResult, proxy_from_settings
from tamis.runs.select import Selection, select_from_settings
from tamis.runs.train import TrainResult, train_from_settings
from tamis.runs.verify import Verification, verify_from_settings
from tamis.settings import (
    AttributeSettings,
    CompareSettings,
    DoctorSettings,
    PlanSettings,
    ProxySettings,
    SelectSettings,
    TrainRunSettings,
    VerifySettings,
)
from tamis.values import from_dict

__all__ = [
    "Attribution",
    "CompareResult",
    "DoctorResult",
    "PlanResult",
    "PlantedResult",
    "ProxyResult",
    "Selection",
    "TrainResult",
    "Verification",
    "attribute",
    "attribute_from_settings",
    "compare",
    "compare_from_settings",
    "doctor",
    "estimate_plan",
    "examine",
    "plan",
    "proxy",
    "proxy_from_settings",
    "select",
    "select_from_settings",
    "train",
    "train_from_settings",
    "verify",
    "verify_from_settings",
]


def select(
    *,
    model: str | Path,
    pool: str | Path | Sequence[str | Path] | Rows,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows],
    method: str | Method = "tracin",
    budget: str | int | float = "5%",
    out: str | Path = "tamis-out",
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Selection:
    """Choose the rows of ``pool`` that are worth training ``model`` on for the task that ``target`` shows.

    Args:
        model: hub id, local folder, PEFT adapter folder or GGUF file.
        pool: files, globs or hub ids of the rows to choose from; or the rows themselves, a list of dicts or a
            ``datasets.Dataset``. Rows in memory are known by their content: the same ones resume, others are refused,
            and ``run.yaml`` says that it cannot bring them back.
        target: files (or ``{name: file}``) with a few dozen rows of the task; several make several targets. Rows in
            memory as for ``pool``, also as ``{name: rows}``.
        method: a name from ``tamis.methods.METHODS``, or a method object such as ``tamis.methods.Less(lora_rank=16)``.
        budget: rows (500), a share of the pool ("5%" or 0.05) or tokens ("200k-tokens").
        out: folder for the result; an interrupted run with the same arguments resumes there.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.SelectSettings``.

    Returns:
        The selection. Scores are positive where training on the row lowers the target loss.

    Raises:
        InvalidInput: the data cannot be used (which file, row and field, and what to do).
        InvalidSettings: settings contradict each other, the data, or the folder's earlier run.
        Unsupported: the model has no layers that tamis can take gradients of.
    """
    held: dict[str, Rows] = {}
    check_method_object(method, "tamis.methods.Less()", does="score")
    name = method if isinstance(method, str) else method.name
    chosen: dict[str, Any] = {} if isinstance(method, str) else plain_settings(method)
    for name_of_setting in ("set", "projection", "projection_dim"):
        if not isinstance(method, str) and settings.get(name_of_setting) is not None:
            raise InvalidSettings(f"{name_of_setting}: the method object has settings of its own; give it there")
    values = {
        **data_values(model, pool, target, settings, held),
        "method": name,
        "budget": budget,
        "out": path_of(out, "out"),
        **({"set": chosen} if chosen else {}),
    }
    return select_from_settings(
        from_dict(SelectSettings, values, origin="tamis.select"),
        method=None if isinstance(method, str) else method,
        progress=as_progress(progress),
        held=held,
    )


def doctor(
    *,
    model: str | Path,
    pool: str | Path | Sequence[str | Path] | Rows,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows] = (),
    progress: Progress | bool | None = None,
    **settings: Any,
) -> DoctorResult:
    """Check what will be trained on and scored, and whether the numbers can be trusted, before anyone spends money.

    Args:
        model: hub id, local folder, PEFT adapter folder or GGUF file.
        pool: rows to choose from, in the forms that ``tamis.select`` takes.
        target: rows of the task, in the same forms; without any, the checks that need a target are left out.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.DoctorSettings`` but ``out``: nothing is written.

    Returns:
        What was found. ``passed`` says whether every check passed, and ``warnings`` what to know before going on.

    Raises:
        InvalidInput: data or model cannot be used at all.
        InvalidSettings: a setting is unknown, or of the wrong type, or contradicts another one.
        Unsupported: the model has no layers that tamis can take gradients of.
    """
    held: dict[str, Rows] = {}
    refuse_out("tamis.doctor", settings)
    values = data_values(model, pool, target, settings, held)
    return examine(from_dict(DoctorSettings, values, origin="tamis.doctor"), progress=as_progress(progress), held=held)


def plan(
    *,
    model: str | Path,
    pool: str | Path | Sequence[str | Path] | Rows,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows] = (),
    budget: str | int | float = "5%",
    progress: Progress | bool | None = None,
    **settings: Any,
) -> PlanResult:
    """Estimate what each method would cost on ``pool``: operations, seconds, memory and disk.

    Args:
        model: hub id, local folder, PEFT adapter folder or GGUF file; its weights are not loaded unless
            ``measure=True``.
        pool: rows to choose from, in the forms that ``tamis.select`` takes.
        target: rows of the task, in the same forms; without any, their number is assumed and a note says so.
        budget: as for ``tamis.select``; it decides how long a shortlist is.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.PlanSettings`` but ``out``: nothing is written.

    Returns:
        The cost of every method, and what it was worked out from.

    Raises:
        InvalidInput: data or model cannot be used, or the run to compare with cannot be read.
        InvalidSettings: a setting is unknown, or of the wrong type, or contradicts another one.
    """
    held: dict[str, Rows] = {}
    refuse_out("tamis.plan", settings)
    values = {**data_values(model, pool, target, settings, held), "budget": budget}
    return estimate_plan(
        from_dict(PlanSettings, values, origin="tamis.plan"), progress=as_progress(progress), held=held
    )


def train(
    *,
    model: str | Path,
    pool: str | Path | Sequence[str | Path] | Rows,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows],
    method: str | OnlineMethod = "filter-then-weight",
    steps: int | None = None,
    out: str | Path = "tamis-train",
    eval: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows] = (),
    progress: Progress | bool | None = None,
    **settings: Any,
) -> TrainResult:
    """Train ``model`` on ``pool``, choosing and weighting its rows at every update for the task that ``target`` shows.

    The loop is ``tamis.OnlineTrainer``, which takes any data set and arguments of Transformers' Trainer.

    Args:
        model: hub id, local folder, PEFT adapter folder (which is trained on) or GGUF file.
        pool: files, globs or hub ids of the rows to choose from, or the rows themselves; as for ``tamis.select``.
        target: rows of the task, in the same forms. A fifth of them only measures, unless ``eval`` or
            ``held_out`` says otherwise.
        method: a name from ``tamis.online.METHODS``, or a method object such as
            ``tamis.online.FilterThenWeight(keep=8, oversample=4)``.
        steps: updates; or give ``epochs``.
        out: folder for the result; an interrupted run with the same arguments resumes there.
        eval: rows of the task that only measure, in the same forms as ``target``.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.TrainRunSettings``.

    Returns:
        Where the model lies, the log, and what the run did.

    Raises:
        InvalidInput: the data cannot be used (which file, row and field, and what to do).
        InvalidSettings: settings contradict each other, the data, or the folder's earlier run.
        NonFinite: every candidate of a choice, or the target, has a loss or gradient that is not finite.
        Unsupported: the model has parameters whose gradients cannot be told apart by rows.
    """
    held: dict[str, Rows] = {}
    check_method_object(method, "tamis.online.FilterThenWeight()", does="choose")
    chosen: dict[str, Any] = {"method": method}
    if not isinstance(method, str):
        for name in ("set", "keep", "oversample"):
            if settings.get(name) is not None:
                raise InvalidSettings(f"{name}: the method object has settings of its own; give it there")
        chosen = {"method": method.name, "keep": method.keep, "oversample": method.oversample}
        chosen["set"] = online_settings(method)
    values = {
        **data_values(model, pool, target, settings, held),
        "eval": targets_of(eval, "eval", held),
        "steps": steps,
        "out": path_of(out, "out"),
        **chosen,
    }
    return train_from_settings(
        from_dict(TrainRunSettings, values, origin="tamis.train"),
        method=None if isinstance(method, str) else method,
        progress=as_progress(progress),
        held=held,
    )


def compare(
    *,
    model: str | Path,
    pool: str | Path | Sequence[str | Path] | Rows,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows],
    eval: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows] = (),
    methods: str | Sequence[str] = ("tracin",),
    budget: str | int | float = "5%",
    seeds: int = 5,
    out: str | Path = "tamis-compare",
    progress: Progress | bool | None = None,
    **settings: Any,
) -> CompareResult | PlantedResult:
    """Fine-tune ``model`` on what each method selects, and say which helped, whether by chance, and at what cost.

    Baselines always run: uniform draws, BM25, longest answers, random rows of the chosen sources, the whole pool at
    equal updates, and the whole pool at equal cost, which the verdict leads with.

    Args:
        model: hub id, local folder, PEFT adapter folder or GGUF file.
        pool: files, globs or hub ids of the rows to choose from, or the rows themselves; as for ``tamis.select``.
        target: rows of the task, in the same forms.
        eval: rows of the task that only measure, in the same forms.
        methods: ``[LABEL=][SHORTLIST+]METHOD`` with a method of ``tamis.select``, or ``online:METHOD`` with one of
            ``tamis.train``. Their settings go to ``set`` as ``{"LABEL.NAME": value}``.
        budget: rows (500), a share of the pool ("5%" or 0.05) or tokens ("200k-tokens").
        seeds: training runs of every contender.
        out: folder for the result; called again it goes on, and keeps every finished run.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.CompareSettings``; ``planted=True`` checks the methods on a pool whose
            answer is known, and trains nothing.

    Returns:
        The verdict, with what it was made from.

    Raises:
        InvalidInput: the data cannot be used (which file, row and field, and what to do).
        InvalidSettings: settings contradict each other, the data, or the folder's earlier comparison.
        NonFinite: a training run diverged.
        Unsupported: the model cannot be trained, or a row does not fit in memory.
    """
    held: dict[str, Rows] = {}
    if are_rows(relevant := settings.get("relevant", ())):
        settings["relevant"] = paths_of(relevant, "relevant", held)
    values = {
        **data_values(model, pool, target, settings, held),
        "eval": targets_of(eval, "eval", held),
        "methods": [methods] if isinstance(methods, str) else list(methods),
        "budget": budget,
        "seeds": seeds,
        "out": path_of(out, "out"),
    }
    return compare_from_settings(
        from_dict(CompareSettings, values, origin="tamis.compare"), progress=as_progress(progress), held=held
    )


def proxy(
    *,
    model: str | Path,
    pool: str | Path | Sequence[str | Path] | Rows,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows] = (),
    sparsity: float = 0.5,
    out: str | Path = "tamis-proxy",
    progress: Progress | bool | None = None,
    **settings: Any,
) -> ProxyResult:
    """Build a cheap copy of ``model`` that ranks the rows of ``pool`` as it does, and measure how far it does.

    The folder ``out`` loads wherever tamis takes a model: ``tamis.select(model=out, ...)`` with any method.

    Args:
        model: hub id, local folder, PEFT adapter folder (which is merged) or GGUF file.
        pool: rows to build it from and to measure it on, in the forms that ``tamis.select`` takes.
        target: rows of the task, in the same forms; without any, rows of the pool stand in.
        sparsity: share of the compressed layers' numbers that is removed.
        out: folder for the proxy; an interrupted build with the same arguments resumes there.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.ProxySettings``.

    Returns:
        Where the proxy lies and what it keeps.

    Raises:
        InvalidInput: the data cannot be used (which file, row and field, and what to do).
        InvalidSettings: settings contradict each other, the data, or the folder's earlier build.
        NonFinite: alignment diverged.
        Unsupported: no layer of the model can be compressed, or its proxy could not be loaded again.
    """
    held: dict[str, Rows] = {}
    values = {**data_values(model, pool, target, settings, held), "sparsity": sparsity, "out": path_of(out, "out")}
    return proxy_from_settings(
        from_dict(ProxySettings, values, origin="tamis.proxy"), progress=as_progress(progress), held=held
    )


def attribute(
    *,
    run: str | Path,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows],
    method: str = "adamw-influence",
    out: str | Path = "tamis-attribution",
    model: str | Path | nn.Module | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Attribution:
    """Score every sample of a recorded run by what removing it would do to the loss of ``target`` at the end.

    Args:
        run: folder that ``tamis.TrajectoryRecorder`` or ``tamis train --record`` wrote.
        target: rows of the task, as for ``tamis.select``; or rows of ``input_ids`` and ``labels``, taken as they are.
        method: ``adamw-influence``, ``sgd-influence`` or ``tracin``.
        out: folder for the result; an interrupted call with the same arguments resumes there.
        model: what training started from, by name or as an object; None: what the record names.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.AttributeSettings``.

    Returns:
        The scores. A positive score means that removing the sample raises the target loss, so training on it
        lowered it.

    Raises:
        InvalidInput: the run did not come to its end, or the target cannot be used.
        InvalidSettings: settings contradict each other or the run.
        StoreMismatch: the model is not the run's, or replaying does not reproduce what was recorded.
    """
    held: dict[str, Rows] = {}
    values = trace_values(run, target, out, model, settings, held)
    chosen = from_dict(AttributeSettings, {**values, "method": method}, origin="tamis.attribute")
    return attribute_from_settings(chosen, model=as_module(model), progress=as_progress(progress), held=held)


def verify(
    *,
    run: str | Path,
    target: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows],
    samples: int = 50,
    out: str | Path = "tamis-verification",
    model: str | Path | nn.Module | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Verification:
    """Retrain a recorded run without each of some random samples, and see which scores predicted the outcome.

    Args:
        run: folder that ``tamis.TrajectoryRecorder`` or ``tamis train --record`` wrote.
        target: as for ``tamis.attribute``.
        samples: how many are left out, one retraining each.
        out: folder for the result; an interrupted call with the same arguments resumes there.
        model: as for ``tamis.attribute``.
        progress: True for a bar on standard error; or where else to say how far it is; by default nowhere.
        settings: any other field of ``tamis.VerifySettings``.

    Returns:
        Spearman's correlation and its interval for every method.

    Raises:
        InvalidInput: the run did not come to its end, or the target cannot be used.
        InvalidSettings: settings contradict each other or the run.
        StoreMismatch: the model is not the run's, or replaying does not reproduce what was recorded.
    """
    held: dict[str, Rows] = {}
    values = trace_values(run, target, out, model, settings, held)
    chosen = from_dict(VerifySettings, {**values, "samples": samples}, origin="tamis.verify")
    return verify_from_settings(chosen, model=as_module(model), progress=as_progress(progress), held=held)
