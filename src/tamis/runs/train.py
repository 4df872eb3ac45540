"""A training run that chooses its data, from top to bottom: claim, read, load, train, measure, write.

The loop itself is ``OnlineTrainer``, a Transformers Trainer. What is here makes a run of it that owns a folder: called
again after an interruption it goes on from the last whole checkpoint, and called again when finished it says so.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback

from tamis.config import write_config
from tamis.corpora import Rendered, model_settings, read_sources, render_corpora, write_skipped
from tamis.data.rows import Rows
from tamis.disk import check_writable, disk_errors
from tamis.errors import InvalidSettings
from tamis.identity import file_sha256
from tamis.identity import fingerprint as fingerprint_of
from tamis.model.load import LoadedModel, ModelSettings, model_fingerprint, no_progress_bars, template_sha256
from tamis.model.memory import is_out_of_memory
from tamis.model.processes import barrier, is_main, world_size
from tamis.model.proxy_folder import layout_of, write_layout
from tamis.notation import candidates_parts
from tamis.online.methods.choice import Method, cold_updates
from tamis.online.resume import WholeCheckpoint, append_log, cut_log, read_log, remove_after, whole_checkpoints
from tamis.online.rows import PaddingCollator, TokenRows
from tamis.online.run_trainer import HeldOut, RunCallback, RunTrainer, is_stopped
from tamis.online.settings import StepSettings
from tamis.online.source_means import said_of_many_sources
from tamis.progress import NoProgress
from tamis.protocols import Progress
from tamis.runs.manifest import TRAINER, base_identity, identity_settings, repeat_command
from tamis.runs.outputs import check_claim, check_files, claim_folder, read_written, write_json
from tamis.runs.train_account import describe_cost, describe_training
from tamis.runs.train_record import check_record, finish_record, recorder_of, require_begun_record, require_record
from tamis.runs.train_rows import RunRows, check_candidates, measuring_targets, num_updates, split_rows
from tamis.runs.train_setup import (
    check_device,
    check_proxy_vocabulary,
    check_reports,
    check_tuning,
    compute_dtype,
    method_and_step,
    open_model,
    training_arguments,
)
from tamis.settings import TrainRunSettings
from tamis.values import to_dict
from tamis.versions import versions

__all__ = ["TrainResult", "train_from_settings"]

logger = logging.getLogger(__name__)

# Settings that cannot change the weights; all others make a folder the folder of one run.
_FREE_SETTINGS = (
    *("out", "save_steps", "log_steps", "forecast_every", "report_to", "on_bad_row"),
    *("record", "record_every"),
)
_KNOWN_BY_CONTENT = ("model", "revision", "chat_template")
_LAST = "the last checkpoint of checkpoints/, if it is there"
_SOURCES_NAMED = 8  # in a run's summary


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What was trained, also on disk under ``out``."""

    out: Path  # folder of the result
    model: Path  # folder of the trained model, or of its adapter
    log: tuple[Mapping[str, Any], ...]  # every entry of log.jsonl
    warnings: tuple[str, ...]  # what to know before using the model
    manifest: Mapping[str, Any]  # what determined the result, what the run did and what it cost, as manifest.json
    was_finished: bool  # the folder had a finished run: this call trained nothing

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis train --json`` prints it (and what to type next to a record)."""
        done, cost = self.manifest["training"], self.manifest["cost"]
        return {
            "method": self.manifest["method"]["name"],
            "was_finished": self.was_finished,
            **{key: done[key] for key in ("steps", "stopped_early", "candidates", "distinct_rows", "fallback_share")},
            "held_out_loss": done["held_out_loss"],
            "predicted_vs_realised_drop": done["predicted_vs_realised_drop"],
            "share_by_source": _largest(done["share_by_source"]),
            "seconds": cost["seconds"],
            "tokens": cost["candidate_tokens"] + cost["target_tokens"],
            "tflops": {"total": cost["total_tflops"], **cost["tflops"]},
            "warnings": list(self.warnings),
            "model": str(self.model),
            "log": str(self.out / "log.jsonl"),
            "candidates_log": str(self.out / "candidates"),
        }


def train_from_settings(
    settings: TrainRunSettings,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
    held: Mapping[str, Rows] | None = None,
) -> TrainResult:
    """The run that ``settings`` describe; see ``tamis.train``.

    ``method`` stands in for the one they name, and ``held`` has the rows in memory that they name.
    """
    held, progress = held or {}, progress or NoProgress()
    method, step_settings = method_and_step(settings, method)
    out = Path(settings.out)
    check_reports(settings)
    check_record(settings)
    if is_main():  # what takes no time is tried before files are read and weights are hashed
        check_writable(out)
    dtype = compute_dtype(settings)  # refuses a device that is not there
    check_device(settings)
    check_tuning(settings)
    check_proxy_vocabulary(settings)
    fingerprint = model_fingerprint(model_settings(settings))
    # Rows that measure are read like target rows, as targets of their own.
    sources = read_sources(replace(settings, target=(*settings.target, *measuring_targets(settings))), held)
    data = {"pool": sources.pool.identity, "target": sources.target.identity}
    identity = {
        **base_identity(model=fingerprint, data=data, libraries=TRAINER),
        "dtype": dtype,
        "processes": world_size(),
        **_settings_identity(settings),
    }
    if is_main():
        claim_folder(out, identity)
        require_begun_record(settings)
        write_config("train", settings, out / "run.yaml", held=list(held))
    barrier()
    if (out / "manifest.json").is_file() and (out / "model").is_dir():
        require_record(settings)
        logger.info("%s holds this run already, finished; nothing is trained again", out)
        return _result(out, was_finished=True)

    rendered = render_corpora(sources, settings, store=out / "store", progress=progress)
    rows = split_rows(sources, rendered, settings)
    check_candidates(rendered.pool.examples.sources_of(rows.pool), method, step_settings)
    total = num_updates(
        settings, pool_rows=len(rows.pool), candidates=method.keep * method.oversample, choices=step_settings.reuse
    )
    warnings = [*rendered.warnings, *rows.warnings]
    cold = cold_updates(method)
    if cold >= total:
        warnings.append(
            f"{method.name} never starts: it waits for {cold} updates and the run has {total}; give more "
            "steps, or lower its cold_start"
        )
    for sentence in warnings:
        logger.warning("%s", sentence)
    if method.name == "target-only":  # the trainer says so when it starts
        warnings.append("target-only trains on the target rows themselves, which memorises small targets")
    if step_settings.candidates_kind == "sources":  # likewise
        sources_of_pool = len(np.unique(rendered.pool.examples.source_index[rows.pool]))
        warnings += filter(None, [said_of_many_sources(sources_of_pool, method.keep * method.oversample)])
    if is_main():
        write_skipped(out / "skipped.jsonl", rendered.skipped)
    run = _Run(
        settings=settings,
        digest=fingerprint_of(identity),
        method=method,
        step_settings=step_settings,
        dtype=dtype,
        out=out,
        rendered=rendered,
        rows=rows,
        total=total,
    )
    done = run.train(progress)
    if is_main():
        check_claim(out, identity)
        manifest = {
            **identity,
            "command": repeat_command("train", out, held),
            "versions": versions(),
            "method": {"name": method.name, **vars(method)},
            "settings": to_dict(settings),
            "data_files": {
                c.name: {"files": list(c.examples.files), "content_hash": c.examples.content_hash, "rows": len(c)}
                for c in (rendered.pool, rendered.target)
            },
            "rows": {name: len(getattr(rows, name)) for name in ("pool", "target", "held_out", "leaked")},
            **done,
            "warnings": warnings,
            "files": {p.name: file_sha256(p) for p in sorted((out / "model").glob("*.safetensors"))},
        }
        write_json(out / "manifest.json", manifest)  # last: its presence says that the run is complete
    barrier()
    return _result(out, was_finished=False)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The part of a run that needs the model."""

    settings: TrainRunSettings
    digest: str  # of all that determines the run
    method: Method
    step_settings: StepSettings
    dtype: str
    out: Path
    rendered: Rendered
    rows: RunRows
    total: int  # updates

    def train(self, progress: Progress) -> dict[str, Any]:
        """Train to the end from wherever the folder stands, write the model; the manifest's part about it.

        Raises:
            InvalidSettings: a forward pass does not fit in memory.
        """
        settings, total, checkpoints = self.settings, self.total, self.out / "checkpoints"
        found = whole_checkpoints(checkpoints)
        start = found[-1] if found else None
        barrier()  # everybody has looked
        if is_main():
            remove_after(checkpoints, start.step if start else -1)
            cut_log(self.out / "log.jsonl", start.step if start else -1)
        barrier()
        opened = open_model(settings, dtype=self.dtype)
        with progress.stage("train", total, "updates") as advance:
            callback = RunCallback(
                log=self.out / "log.jsonl",
                checkpoints=checkpoints,
                seconds=start.seconds if start else 0.0,
                patience=settings.patience,
                advance=advance,
            )
            trainer = self._trainer(opened, callback)
            if start is None:
                before = trainer.held_out_losses()
                if is_main():
                    append_log(self.out / "log.jsonl", {**before, "step": 0})
            else:
                logger.info("going on from update %d of %d", start.step, total)
                advance(start.step)
            try:
                steps, stopped = self._to_the_end(trainer, start)
                if settings.record is not None and is_main():
                    finish_record(Path(settings.record), self.rendered, self.rows.pool)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise InvalidSettings(
                    f"out of memory with {settings.batch_rows} rows in a forward pass; run again with a smaller "
                    "--batch-rows, --gradient-checkpointing, a smaller --max-length, or a smaller keep or oversample"
                ) from error
        after = trainer.held_out_losses()
        cost = describe_cost(trainer.work(), seconds=callback.seconds)  # every process takes part
        if is_main():
            if after:
                append_log(self.out / "log.jsonl", {**{f"final_{k}": v for k, v in after.items()}, "step": steps})
            self._write_model(trainer, opened.tokenizer)
        barrier()
        return {
            "models": [opened.description],
            "training": describe_training(self.out, after, steps=steps, stopped_early=stopped),
            "cost": cost,
        }

    def _trainer(self, opened: LoadedModel, callback: RunCallback) -> RunTrainer:
        settings, rows, rendered = self.settings, self.rows, self.rendered
        template: Any = opened.tokenizer.chat_template
        recorder = recorder_of(
            settings, owner=self.digest, chat_template=template if isinstance(template, str) else None
        )
        held_out = None
        if len(rows.held_out):
            held_out = HeldOut(
                rows=TokenRows(rendered.target, rows.held_out), group=rows.held_out_group, names=rows.names
            )
        trainer = RunTrainer(
            model=opened.model,
            args=training_arguments(settings, total=self.total, dtype=self.dtype, out=self.out),
            train_dataset=TokenRows(rendered.pool, rows.pool),
            target_dataset=TokenRows(rendered.target, rows.target),
            data_collator=PaddingCollator(opened.pad_id),
            selection=self.method,
            step_settings=self.step_settings,
            target_rows=settings.target_rows,
            forecast_every=settings.forecast_every,
            candidates_folder=self.out / "candidates",
            sources=rendered.pool.examples.sources_of(rows.pool),
            held_out=held_out,
            callbacks=[
                *filter(None, [recorder]),
                callback,
            ],  # a whole checkpoint is recorded too
        )
        trainer.remove_callback(PrinterCallback)  # it prints every entry, which the log has
        return trainer

    def _to_the_end(self, trainer: RunTrainer, start: WholeCheckpoint | None) -> tuple[int, bool]:
        """Updates done, and whether the run stopped before all were."""
        total = self.total
        if start is not None:
            state = json.loads((start.folder / "trainer_state.json").read_text(encoding="utf-8"))
            stopped = is_stopped(state["log_history"], self.settings.patience)
            if start.step >= total or stopped:  # killed after training: the Trainer would do one more update
                best = state["best_model_checkpoint"] if self.settings.patience is not None else None
                # By its name alone: the state has the path of the folder where the run began, which may have moved.
                kept = start.folder if best is None else start.folder.with_name(Path(best).name)
                trainer._load_from_checkpoint(str(kept))
                trainer.restore_selection(start.folder)  # which has the cost of all updates, the best's may not
                return start.step, start.step < total
        with no_progress_bars():
            trainer.train(resume_from_checkpoint=None if start is None else str(start.folder))
        return trainer.state.global_step, trainer.state.global_step < total

    def _write_model(self, trainer: RunTrainer, tokenizer: Any) -> None:
        folder, partial = self.out / "model", self.out / ".model.tmp"
        model = trainer.accelerator.unwrap_model(trainer.model)
        with disk_errors(folder), no_progress_bars():
            for old in (folder, partial):
                shutil.rmtree(old, ignore_errors=True)
            options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
            model.save_pretrained(partial, **options)
            layout = None if hasattr(model, "peft_config") else layout_of(model)
            if layout is not None:  # a proxy that was trained whole is a proxy still
                write_layout(layout, partial)
            tokenizer.save_pretrained(partial)
            partial.replace(folder)


def _result(out: Path, *, was_finished: bool) -> TrainResult:
    path = out / "manifest.json"
    manifest = read_written(path, todo=f"delete it and run the same command again, which goes on from {_LAST}")
    if was_finished:
        todo = f"delete {out / 'model'} and run the same command again, which writes it anew from {_LAST}"
        check_files(out / "model", manifest["files"], todo=todo)
    return TrainResult(
        out=out,
        model=out / "model",
        log=tuple(read_log(out / "log.jsonl")),
        warnings=tuple(manifest["warnings"]),
        manifest=manifest,
        was_finished=was_finished,
    )


def _largest(shares: Mapping[str, float]) -> dict[str, float]:
    """The largest few of ``shares``, which are in order, and the sum of the others; the manifest has all."""
    some = [(name, share) for name, share in shares.items() if share > 0]
    found = dict(some[:_SOURCES_NAMED])
    if rest := some[_SOURCES_NAMED:]:
        found[f"{len(rest)} others"] = sum(share for _, share in rest)
    return found


def _settings_identity(settings: TrainRunSettings) -> dict[str, Any]:
    """``settings`` as far as they can change the weights, and what the files hold that they name."""
    kind, proxy = candidates_parts(settings.candidates)
    plain = identity_settings(settings, (*_FREE_SETTINGS, *_KNOWN_BY_CONTENT))
    inputs: dict[str, Any] = {}
    if kind == "proxy":
        inputs["proxy"] = model_fingerprint(ModelSettings(name=proxy))
    if settings.chat_template is not None:
        inputs["chat_template"] = template_sha256(settings.chat_template)
    return {"settings": plain, "inputs": inputs}
