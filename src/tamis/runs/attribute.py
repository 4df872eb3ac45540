"""Attribution of a recorded run from top to bottom: read, open, sweep backwards, write scores of uses and samples."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from tamis.config import write_config
from tamis.data.rows import Rows
from tamis.disk import check_writable
from tamis.errors import InvalidSettings
from tamis.identity import file_sha256, fingerprint
from tamis.maths.ranks import rank_correlation
from tamis.model.memory import free_memory
from tamis.progress import NoProgress
from tamis.protocols import Progress
from tamis.runs.attribution_doubts import doubts
from tamis.runs.attribution_result import Attribution, read_attribution
from tamis.runs.outputs import claim_folder, refuse_strangers, write_json, write_scores
from tamis.runs.trace_inputs import (
    OpenedRun,
    announce_rows,
    open_inputs,
    read_target,
    recorded_rows,
    refuse_several,
    run_identity,
)
from tamis.seeds import child_seed, random_subset
from tamis.settings import AttributeSettings
from tamis.trajectory.adjoint import final_values, refuse_lone_sample, renormalised
from tamis.trajectory.embeddings import run_embeddings, scores_from_embeddings
from tamis.trajectory.segment_store import SegmentStore
from tamis.trajectory.summary_matrix import draw_masks
from tamis.trajectory.sweep import SweepSettings, run_sweep, target_gradients
from tamis.trajectory.update_error import exact_errors
from tamis.values import to_dict
from tamis.versions import versions

__all__ = ["attribute_from_settings", "sweep_settings"]

_FREE = ("batch_rows", "device", "tolerance")
ENOUGH = 0.99  # agreement of scores without curvature with those of the empirical Fisher


def attribute_from_settings(
    settings: AttributeSettings,
    *,
    model: nn.Module | None = None,
    progress: Progress | None = None,
    held: Mapping[str, Rows] | None = None,
) -> Attribution:
    """The scores that ``settings`` ask for; see ``tamis.attribute``."""
    held, progress = held or {}, progress or NoProgress()
    out = Path(settings.out)
    refuse_several("attribute")
    check_writable(out)
    refuse_strangers(out)
    target = read_target(settings, store=out / "store", held=held, progress=progress)
    identity = run_identity("attribute", settings, target, free=_FREE)
    claim_folder(out, identity)
    write_config("attribute", settings, out / "run.yaml", held=list(held))
    if (out / "manifest.json").is_file():
        return read_attribution(out)
    opened = open_inputs(settings, target, model=model)
    started = time.perf_counter()
    found = _scores(settings, opened, identity, out, progress)
    if settings.error == "exact":
        found["error_exact"] = _exact(settings, opened, progress)
    uses, samples = _tables(opened, found, settings, Path(settings.run))
    for name, table in (("uses", uses), ("samples", samples)):
        write_scores(out / f"{name}.parquet", table)
    theta = opened.trajectory.state(opened.trajectory.num_steps).theta
    manifest = {
        **identity,
        "versions": versions(),
        "method": _named(settings),
        "settings": to_dict(settings),
        "updates": opened.trajectory.num_steps,
        "uses": len(uses),
        "rows": len(samples),
        "target_rows": [{"target": of, "id": name} for of, name in zip(target.names, target.ids, strict=True)],
        "target_left_out": list(target.left_out),
        "target_trained_on": list(opened.trained_on),
        "target_loss": float(final_values(opened.trajectory.measured, theta, opened.micros).mean()),
        **_diagnosis(found),
        **doubts(uses, settings, moved=float(torch.linalg.vector_norm(theta - opened.trajectory.state(0).theta))),
        "cost": {"seconds": round(time.perf_counter() - started, 3)},
        "files": {name: file_sha256(out / name) for name in ("uses.parquet", "samples.parquet")},
    }
    write_json(out / "manifest.json", manifest)  # last: its presence says that the result is complete
    return read_attribution(out)


def sweep_settings(settings: AttributeSettings) -> SweepSettings:
    """The part of the settings that the sweep takes."""
    return SweepSettings(
        method=settings.method,  # type: ignore[arg-type]  # one of them, checked with the settings
        curvature=settings.curvature,
        secant=settings.secant,
        renormalise=settings.removal == "renormalise",
        error=settings.error != "none",
        diagnose=settings.diagnoses,
        tolerance=settings.tolerance,
    )


def _scores(
    settings: AttributeSettings, opened: OpenedRun, identity: Mapping[str, Any], out: Path, progress: Progress
) -> dict[str, Any]:
    trajectory = opened.trajectory
    with progress.stage("sweep", trajectory.num_steps, "updates") as advance:
        if settings.form == "adjoint":
            announce_rows(settings, opened.target)
            return dict(
                run_sweep(
                    trajectory,
                    opened.micros,
                    sweep_settings(settings),
                    per_row=settings.per_row,
                    folder=out / "store" / "sweep",
                    advance=advance,
                )
            )
        theta = trajectory.state(trajectory.num_steps).theta
        masks = draw_masks(len(theta), count=settings.masks, share=settings.mask_share, seed=settings.seed)
        known = {
            **{name: identity[name] for name in ("run", "libraries")},
            **{name: getattr(settings, name) for name in ("masks", "mask_share", "rescale", "seed")},
            "form": "embeddings-v2",
        }
        store = Path(settings.store) if settings.store is not None else out / "store"
        folder = store / f"embeddings-{fingerprint(known)[:12]}"
        if SegmentStore(folder).reached != 0:
            _check_memory(theta, settings)
        embeddings = run_embeddings(
            trajectory,
            masks,
            rescale=settings.rescale,
            folder=folder,
            tolerance=settings.tolerance,
            advance=advance,
        )
    goal = target_gradients(trajectory.problem, theta, opened.micros, per_row=settings.per_row)
    scores = scores_from_embeddings(embeddings, masks, goal, disjoint=settings.mask_share is None)
    if settings.removal == "renormalise":
        steps = [trajectory.step(index) for index in range(trajectory.num_steps)]
        for step in steps:
            refuse_lone_sample(step)
        scores = [renormalised(own, step.weights.cpu()) for own, step in zip(scores, steps, strict=True)]
    return {"scores": scores}


def _check_memory(theta: Tensor, settings: AttributeSettings) -> None:
    """Refuse summary matrices that cannot fit, before the replay.

    Raises:
        InvalidSettings: saying what they need, and how many masks are enough.
    """
    free = free_memory(theta.device)
    share = 1 / settings.masks if settings.mask_share is None else settings.mask_share
    one = 3 * (share * len(theta)) ** 2 * theta.element_size()  # three matrices for each mask
    needed = one * settings.masks
    if free is None or needed <= free:
        return
    enough = math.ceil(3 * len(theta) ** 2 * theta.element_size() / free)
    advice = f"pass --masks {enough} or more" if settings.mask_share is None else "pass a smaller --mask-share"
    raise InvalidSettings(
        f"masks: the summary matrices of {len(theta)} trained numbers need {needed / 1e9:.3g} GB and "
        f"{free / 1e9:.3g} GB are free; {advice}, or use the adjoint form"
    )


def _exact(settings: AttributeSettings, opened: OpenedRun, progress: Progress) -> npt.NDArray[np.float64]:
    """Norm of the exact second order for some uses; NaN for the others."""
    run = opened.trajectory
    sizes = [len(run.step(index).rows) for index in range(run.num_steps)]
    total, first = sum(sizes), np.concatenate([[0], np.cumsum(sizes)])
    chosen = random_subset(child_seed(settings.seed, "exact errors"), total, min(settings.error_samples, total))
    uses = [(step := int(np.searchsorted(first, use, side="right")) - 1, int(use - first[step])) for use in chosen]
    with progress.stage("exact second order", run.num_steps, "updates") as advance:
        norms = exact_errors(run, uses, tolerance=settings.tolerance, advance=advance)
    found = np.full(total, np.nan)
    found[chosen] = norms
    return found


def _tables(
    opened: OpenedRun, found: Mapping[str, Any], settings: AttributeSettings, folder: Path
) -> tuple[pa.Table, pa.Table]:
    run = opened.trajectory
    steps = [run.step(index) for index in range(run.num_steps)]
    rows = np.concatenate([step.rows for step in steps]).astype(np.int64)
    scores = _joined(found["scores"])
    columns: dict[str, Any] = {
        "step": np.repeat([step.index + 1 for step in steps], [len(step.rows) for step in steps]),
        "row": rows,
        "place": np.concatenate([np.arange(len(step.rows)) for step in steps]),
        "weight": np.concatenate([step.weights.cpu().numpy() for step in steps]),
        "score": scores.mean(axis=1),
    }
    if settings.per_row:
        columns["scores"] = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), scores.shape[1])
    if "error" in found:
        columns["error_proxy"] = _joined(found["error"])
    if "error_exact" in found:
        columns["error_exact"] = pa.array(found["error_exact"], from_pandas=True)
    count = len(run.rows)
    known = recorded_rows(folder)
    samples: dict[str, Any] = {name: known[name] for name in known.column_names}
    samples["uses"] = np.bincount(rows, minlength=count)
    samples["score"] = np.bincount(rows, weights=columns["score"], minlength=count)
    if settings.per_row:
        total = np.zeros((count, scores.shape[1]))
        np.add.at(total, rows, scores)
        samples["scores"] = pa.FixedSizeListArray.from_arrays(pa.array(total.ravel()), scores.shape[1])
    if "error" in found:  # by the triangle inequality; what uses of a row do to each other is left out
        samples["error_proxy"] = np.bincount(rows, weights=columns["error_proxy"], minlength=count)
    return pa.table(columns), pa.table(samples)


def _diagnosis(found: Mapping[str, Any]) -> dict[str, Any]:
    """Which curvature these scores need."""
    if "curvature:none" not in found:
        return {"curvature_agreement": None, "curvature_advice": None}
    agreement = rank_correlation(_joined(found["curvature:none"])[:, 0], _joined(found["curvature:fisher"])[:, 0])
    if agreement is None:
        advice = "the scores are constant, and nothing can be said of curvature"
    elif agreement >= ENOUGH:
        advice = "the Fisher changes nothing in this run: --curvature none gives the same order"
    else:
        advice = "curvature matters in this run, and the Fisher need not have all of it: use --curvature exact"
    return {"curvature_agreement": agreement, "curvature_advice": advice}


def _named(settings: AttributeSettings) -> dict[str, Any]:
    names = ("curvature", "secant", "removal", "form") if settings.method != "tracin" else ("removal",)
    return {"name": settings.method, **{name: getattr(settings, name) for name in names}}


def _joined(parts: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    joined: npt.NDArray[np.float64] = torch.cat(list(parts)).double().numpy()
    return joined
