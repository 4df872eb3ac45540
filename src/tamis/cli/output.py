"""What verbs say: results on standard output, everything else on standard error, and neither in the other's way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tamis.config import write_config
from tamis.errors import InvalidInput
from tamis.progress import is_main_rank
from tamis.report.wording import visible

__all__ = ["clean_output", "plain", "print_json", "print_summary", "print_warnings", "write_result"]


@contextlib.contextmanager
def clean_output(*, quiet: bool) -> Iterator[Console]:
    """While work runs, whatever prints goes to standard error; yields the console for progress and remarks there."""
    console = Console(stderr=True)
    # Other libraries draw bars and remark on the weights they load; ours says what matters.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = _ConsoleHandler(console)
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    logger = logging.getLogger("tamis")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # Notices for programmers, from libraries to each other.
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield console
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _ConsoleHandler(logging.Handler):
    """The library's log as lines that do not tear a progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not is_main_rank() and record.levelno < logging.ERROR:
            return
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self._console.print(Text(prefix + visible(record.getMessage()), style=style), soft_wrap=True)


def plain(value: Any) -> Any:
    """Dataclasses, paths, tuples and NumPy numbers as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and callable(value.item):  # a NumPy scalar
        return plain(value.item())
    if isinstance(value, float) and value != value:
        return None
    return value


def print_json(value: Any) -> None:
    """One JSON object, on one line, on standard output, from the main process only."""
    if is_main_rank():
        print(json.dumps(plain(value)), flush=True)


def print_warnings(console: Console, sentences: Sequence[str]) -> None:
    """Each warning on a line of its own, also when quiet."""
    if is_main_rank():
        for sentence in sentences:
            console.print(Text.assemble(("warning: ", "bold yellow"), visible(sentence)), soft_wrap=True)


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Counts, cost and paths of a selection, one a line and never wrapped; warnings are printed elsewhere."""
    shown = {_words(name): _said(value) for name, value in summary.items() if name != "warnings"}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        console.print(Text.assemble((name.ljust(width), "bold"), "  ", value), soft_wrap=True)


def write_result(verb: str, settings: Any, out: str | None, result: Any) -> None:
    """Write ``<verb>.json`` and the settings that made it into the folder ``out``, if there is one.

    Raises:
        InvalidInput: the folder cannot be written.
    """
    if out is None or not is_main_rank():
        return
    write_config(verb, settings, Path(out) / f"{verb}.yaml")
    path = Path(out) / f"{verb}.json"
    try:
        path.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}; pass an --out folder that can be written") from error


def _words(name: str) -> str:
    return name.replace("_", " ")


def _said(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(str(key))} {_said(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_said(item) for item in value)
    return visible(str(value))
