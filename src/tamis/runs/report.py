"""The page of a run, made from its folder: of a training run anew; other commands have written their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tamis.config import read_config
from tamis.data.examples import read_examples
from tamis.errors import InvalidInput, TamisError
from tamis.notation import target_parts
from tamis.online.fate import read_candidates
from tamis.online.resume import read_log
from tamis.report.document import render_document
from tamis.report.page import write_text
from tamis.report.training import TrainingInputs, training_document
from tamis.runs.outputs import IDENTITY, read_written
from tamis.settings import TrainRunSettings
from tamis.types import Example
from tamis.values import from_dict

__all__ = ["write_report"]


def write_report(folder: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the page about the training run in ``folder``, finished or not, and say where it is.

    Args:
        folder: of ``tamis train``; or of another command, whose page is there already.
        out: where to write it; None: ``report.html`` in the folder.

    Raises:
        InvalidInput: the folder is of no run, has nothing to report yet, or its page cannot be made again.
    """
    folder = Path(folder)
    there = folder / "report.html"
    path = there if out is None else Path(out)
    if (folder / "candidates").is_dir() and (folder / "run.yaml").is_file():
        page = render_document(training_document(_inputs(folder)))
    elif there.is_file():
        if path == there:
            return there
        page = there.read_text("utf-8")
    elif (folder / "scores.parquet").is_file():
        raise InvalidInput(
            f"{folder} is of a selection without a page, which needs scores of the baselines that are not kept; "
            f"`tamis select --config {folder / 'run.yaml'} --report` writes it from features that are kept"
        )
    elif (folder / "retention.json").is_file():
        raise InvalidInput(
            f"{folder} is of a proxy without a page; `tamis proxy --config {folder / 'run.yaml'} --report` writes it "
            "from what was measured"
        )
    else:
        raise InvalidInput(
            f"{folder} holds neither a training run with choices (run.yaml, candidates/) nor a page (report.html); "
            "give the --out folder of `tamis train`, or of a finished `tamis select --report`, `tamis compare` or "
            "`tamis proxy`"
        )
    try:
        write_text(page, path)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}; pass an --out file that can be written") from error
    return path


def _inputs(folder: Path) -> TrainingInputs:
    settings = from_dict(TrainRunSettings, read_config(folder / "run.yaml"), origin=str(folder / "run.yaml"))
    is_finished = (folder / "manifest.json").is_file()
    path = folder / ("manifest.json" if is_finished else IDENTITY)
    described: dict[str, Any] = read_written(path, todo="a page about the run cannot be made without it")
    read, why = _texts(settings, described)
    return TrainingInputs(
        log=read_log(folder / "log.jsonl"),
        candidates=read_candidates(folder / "candidates"),
        manifest=described,
        target_names=[target_parts(text)[0] for text in settings.target],
        read_example=read,
        no_texts=why,
        is_finished=is_finished,
    )


def _texts(settings: TrainRunSettings, described: Mapping[str, Any]) -> tuple[Callable[[int], Example] | None, str]:
    """The pool's rows, if they are what the run read; else why they cannot be shown, which the page says."""
    try:
        pool = read_examples(settings.pool, row_format=settings.row_format, on_bad_row=settings.on_bad_row)
    except TamisError as error:
        return None, f"the pool cannot be read from here ({error})"
    if pool.identity != described["data"]["pool"]:
        return None, "the pool's files have changed since the run"
    return pool.__getitem__, ""
