"""Can the scores of this run be trusted? Retrain it without each of some samples, and compare.

Every retraining is a file of its own, so that a killed run goes on and several processes share the work.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from tamis.config import write_config
from tamis.data.rows import Rows
from tamis.disk import check_writable, make_folder, replace_atomically
from tamis.errors import InvalidSettings, NonFinite, StoreCorrupted, first_line
from tamis.progress import NoProgress
from tamis.protocols import Progress
from tamis.runs.outputs import claim_folder, refuse_strangers, write_json, write_scores
from tamis.runs.trace_inputs import (
    OpenedRun,
    TargetRows,
    announce_rows,
    open_inputs,
    read_target,
    refuse_several,
    run_identity,
)
from tamis.seeds import child_seed, random_permutation
from tamis.settings import VerifySettings
from tamis.trajectory.causal import RecordedRun
from tamis.trajectory.fidelity import fidelity
from tamis.trajectory.leave_out import leave_out_effect
from tamis.trajectory.replay import play_segment, segments
from tamis.trajectory.sweep import SweepSettings, run_sweep
from tamis.values import to_dict
from tamis.versions import versions

__all__ = ["Verification", "verify_from_settings"]

logger = logging.getLogger(__name__)

# What retrainings do not depend on: more samples, or another score, go on with those of the folder.
_FREE = ("batch_rows", "device", "tolerance", "processes", "methods", "secant", "curvature", "samples", "per_row")
Use = tuple[int, int]  # step and place in its batch


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How well each method's scores agree with retraining, also on disk under ``out``."""

    out: Path  # folder of the result
    # of each method: spearman, low, high (its interval), samples, relative_error, largest_miss
    methods: Mapping[str, Mapping[str, Any]]
    manifest: Mapping[str, Any]  # what determined the result, as manifest.json

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis verify --json`` prints it."""
        return {
            "samples": self.manifest["samples"],
            "target_rows": self.manifest["target_rows"],
            "methods": {name: dict(values) for name, values in self.methods.items()},
            "pairs": str(self.out / "pairs.parquet"),
            "seconds": self.manifest["cost"]["seconds"],
            "retrained": str(self.out / "truth"),
        }


def verify_from_settings(
    settings: VerifySettings,
    *,
    model: nn.Module | None = None,
    progress: Progress | None = None,
    held: Mapping[str, Rows] | None = None,
) -> Verification:
    """The comparison that ``settings`` ask for; see ``tamis.verify``.

    Raises:
        InvalidSettings: several processes and a model in memory, which they cannot share; or no method is one for this
            run.
        NonFinite: a run without a sample diverged.
        StoreCorrupted: what was computed is gone or damaged.
    """
    held, progress = held or {}, progress or NoProgress()
    if model is not None and settings.processes > 1:
        raise InvalidSettings("processes: a model object cannot be given to several; pass its name or folder instead")
    out = Path(settings.out)
    refuse_several("verify", " (--processes shares out the retrainings)")
    check_writable(out)
    refuse_strangers(out)
    target = read_target(settings, store=out / "store", held=held, progress=progress)
    identity = run_identity("verify", settings, target, free=_FREE)
    claim_folder(out, identity)
    write_config("verify", settings, out / "run.yaml", held=list(held))
    make_folder(out / "truth")
    started = time.perf_counter()
    opened = open_inputs(settings, target, model=model)
    wanted, left_out = _sweeps(settings, opened.trajectory.rule.kind)
    if left_out:
        logger.warning("the run was trained by SGD, of which %s says nothing; it is left out", " and ".join(left_out))
    announce_rows(settings, target)
    scores = _all_scores(wanted, settings, opened, out, progress)
    uses = choose_uses(opened.trajectory, settings.samples, settings.seed)
    _retrain_all(settings, opened, target, uses, out, progress)
    truth = np.stack([_retrained(out, use) for use in uses])
    if not settings.per_row:
        truth = truth.mean(axis=1, keepdims=True)
    methods, pairs = {}, _columns_of(uses, truth)
    for name, by_step in scores.items():
        own = np.stack([by_step[step][place].double().numpy() for step, place in uses])
        methods[name] = {
            **asdict(fidelity(own, truth, seed=settings.seed)),
            "largest_miss": _largest_miss(own, truth, uses),
        }
        pairs[name] = own.mean(axis=1)
    write_scores(out / "pairs.parquet", pa.table(pairs))
    manifest = {
        **identity,
        "versions": versions(),
        "settings": to_dict(settings),
        "samples": len(uses),
        "uses": [{"step": step + 1, "place": place} for step, place in uses],
        "target_rows": len(target.rows),
        "target_trained_on": list(opened.trained_on),
        "target_left_out": list(target.left_out),
        "methods": methods,
        "left_out": left_out,
        "cost": {"seconds": round(time.perf_counter() - started, 3)},  # of this call
    }
    write_json(out / "manifest.json", manifest)
    return Verification(out=out, methods=methods, manifest=manifest)


def choose_uses(run: RecordedRun, count: int, seed: int) -> list[Use]:
    """Random uses of samples, over all steps alike; more of them contain fewer, whose retrainings are kept."""
    sizes = [len(run.step(index).rows) for index in range(run.num_steps)]
    first = np.concatenate([[0], np.cumsum(sizes)])
    chosen = np.sort(random_permutation(child_seed(seed, "left out"), int(first[-1]))[:count])
    steps = np.searchsorted(first, chosen, side="right") - 1
    return [(int(step), int(use - first[step])) for step, use in zip(steps, chosen, strict=True)]


def _sweeps(settings: VerifySettings, kind: str) -> tuple[dict[str, SweepSettings], list[str]]:
    """What is compared, by name, and the names of what cannot be: methods of Adam have nothing to say of SGD.

    Raises:
        InvalidSettings: nothing is left to compare.
    """
    wanted = {name: SweepSettings(**_options(settings, name, 0)) for name in settings.methods}
    if settings.secant:
        name = f"adamw-influence, finite removal over {settings.secant} steps"
        wanted[name] = SweepSettings(**_options(settings, "adamw-influence", settings.secant))
    left_out = [name for name, one in wanted.items() if kind == "sgd" and one.method == "adamw-influence"]
    if len(left_out) == len(wanted):
        raise InvalidSettings(
            "the run was trained by SGD, which has no second moments; compare methods sgd-influence and tracin"
        )
    return {name: one for name, one in wanted.items() if name not in left_out}, left_out


def _all_scores(
    wanted: Mapping[str, SweepSettings], settings: VerifySettings, opened: OpenedRun, out: Path, progress: Progress
) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name, one in wanted.items():
        rows = "rows" if settings.per_row else "mean"
        folder = out / "store" / f"scores-{one.method}-{one.curvature}-{one.secant}-{rows}"
        with progress.stage(name, opened.trajectory.num_steps, "updates") as advance:
            swept = run_sweep(
                opened.trajectory, opened.micros, one, per_row=settings.per_row, folder=folder, advance=advance
            )
        found[name] = swept["scores"]
    return found


def _options(settings: VerifySettings, name: str, secant: int) -> dict[str, Any]:
    return {
        "method": name,
        "curvature": settings.curvature,
        "secant": secant,
        "renormalise": settings.removal == "renormalise",
        "tolerance": settings.tolerance,
    }


def _columns_of(uses: Sequence[Use], truth: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Of ``pairs.parquet``, in which scores of each method follow."""
    return {
        "step": [step + 1 for step, _ in uses],
        "place": [place for _, place in uses],
        "retrained": truth.mean(axis=1),
    }


def _largest_miss(
    scores: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], uses: Sequence[Use]
) -> dict[str, float]:
    """The use whose score is furthest from what retraining without it did."""
    score, effect = scores.mean(axis=1), truth.mean(axis=1)
    worst = int(np.argmax(np.abs(score - effect)))
    step, place = uses[worst]
    return {"step": step + 1, "place": place, "score": float(score[worst]), "retrained": float(effect[worst])}


def _retrain_all(
    settings: VerifySettings, opened: OpenedRun, target: TargetRows, uses: Sequence[Use], out: Path, progress: Progress
) -> None:
    left = [use for use in uses if _read(out, use) is None]
    with progress.stage("retrain", len(uses), "runs") as advance:
        advance(len(uses) - len(left))
        _check_replay(opened.trajectory, settings.tolerance, needed=bool(left))
        if settings.processes == 1 or not left:
            _retrain(opened, left, settings, out, advance, {})
            return
        context = multiprocessing.get_context("spawn")  # a forked PyTorch may hang
        shares = _shares(left, opened.trajectory.boundaries, settings.processes)
        workers = min(settings.processes, len(shares))
        with ProcessPoolExecutor(workers, context, initializer=_open_worker, initargs=(settings, target)) as pool:
            jobs = {pool.submit(_work, share, out): len(share) for share in shares}
            try:
                for job in as_completed(jobs):
                    job.result()
                    advance(jobs[job])
            except BrokenProcessPool as error:
                raise InvalidSettings(
                    f"one of {workers} processes was killed, perhaps for memory: run the same command again with fewer "
                    "processes; what was retrained is kept"
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error nothing more is begun


def _shares(uses: Sequence[Use], boundaries: Sequence[int], processes: int) -> list[list[Use]]:
    """By the recorded state that they start from, whose undisturbed end is replayed once for all of them.

    Four for each process at least, where there are as many samples, so that they end at about the same time.
    """
    most = -(-len(uses) // (4 * processes))
    found = []
    for _, own in groupby(uses, key=lambda use: max(start for start in boundaries if start <= use[0])):
        same = list(own)
        found += [same[first : first + most] for first in range(0, len(same), most)]
    return found


_worker: dict[str, Any] = {}  # what a process of the pool opens once: its inputs, and the ends that it replayed


def _open_worker(settings: VerifySettings, target: TargetRows) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker.update(opened=open_inputs(settings, target), settings=settings, undisturbed={})


def _end_with_parent() -> None:
    """A parent that is killed cannot tell; its processes would wait for it, and hold their memory, for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(uses: Sequence[Use], out: Path) -> None:
    """One share, in a process of the pool."""
    _retrain(_worker["opened"], uses, _worker["settings"], out, lambda done: None, _worker["undisturbed"])


def _retrain(
    opened: OpenedRun,
    uses: Sequence[Use],
    settings: VerifySettings,
    out: Path,
    advance: Callable[[int], None],
    undisturbed: dict[int, torch.Tensor],
) -> None:
    for step, place in uses:
        effect = leave_out_effect(
            opened.trajectory,
            step,
            place,
            opened.micros,
            renormalise=settings.removal == "renormalise",
            undisturbed=undisturbed,
        )
        if not bool(torch.isfinite(effect).all()):
            raise NonFinite(
                f"without the sample at place {place} of update {step + 1} the run diverges: the target's loss is NaN "
                "or infinite at its end; scores of so unstable a run mean nothing: record one at a lower rate"
            )
        text = json.dumps({"step": step + 1, "place": place, "effect": effect.double().tolist()})
        replace_atomically(_path(out, (step, place)), (text.encode(),))
        advance(1)


def _check_replay(run: RecordedRun, tolerance: float | None, *, needed: bool) -> None:
    """Refuse a run whose first segment does not replay, before anything is retrained."""
    if needed:
        start, stop = segments(run)[0]
        play_segment(run, start, stop, tolerance=tolerance)


def _path(out: Path, use: Use) -> Path:
    return out / "truth" / f"update-{use[0] + 1:08d}-place-{use[1]:05d}.json"


def _retrained(out: Path, use: Use) -> npt.NDArray[np.float64]:
    found = _read(out, use)
    if found is None:
        raise StoreCorrupted(f"{_path(out, use)} was written and is gone or damaged; run the same command again")
    return found


def _read(out: Path, use: Use) -> npt.NDArray[np.float64] | None:
    """None if it was not retrained yet, or if its file is damaged, which is said."""
    path = _path(out, use)
    if not path.is_file():
        return None
    try:
        return np.array(json.loads(path.read_text(encoding="utf-8"))["effect"], dtype=np.float64)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); that sample is retrained again", path, first_line(error))
        return None
