"""What every verb does around its work: take several values after one flag, know which flags were typed, keep the
standard output clean, and print results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from tamis.cli.config import parse_pairs
from tamis.cli.progress import is_main_rank
from tamis.config import write_config
from tamis.errors import InvalidInput
from tamis.report.wording import visible

__all__ = [
    "UserInterruptError",
    "VerbCommand",
    "clean_output",
    "plain",
    "print_json",
    "print_warnings",
    "typed_flags",
    "write_result",
]

_SEVERAL = (
    *("--pool", "--target", "--eval-target", "--lora-targets", "--report-to", "--tasks"),
    *("--eval", "--methods", "--budgets", "--relevant", "--relevant-sources"),
)
_PAIRS = {"set_": ("set", "--set"), "share": ("shares", "--share")}  # parameter -> setting, flag


class UserInterruptError(Exception):
    """Control-C reached a verb. Typer versions differ in what they make of ``KeyboardInterrupt``; this they pass on."""


class VerbCommand(TyperCommand):
    """A command without arguments, so that ``--pool a b c`` (what a shell makes of a glob) can mean three pools."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, then parse as usual."""
        spread: list[str] = []
        flag, values = "", 0
        for word in args:
            if word.startswith("-") and word != "-":
                flag, values = (word, 0) if word in _SEVERAL else ("", 0)
            elif flag:
                values += 1
                if values > 1:
                    spread.append(flag)
            spread.append(word)
        rest: list[str] = super().parse_args(ctx, spread)
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb.

        Raises:
            UserInterruptError: by the user.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise UserInterruptError from error


def typed_flags(ctx: typer.Context) -> dict[str, Any]:
    """The settings that the user typed, by name; flags left at their defaults are not among them.

    Raises:
        InvalidSettings: a NAME=VALUE flag has no ``=``.
    """
    typed: dict[str, Any] = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in ("config", "quiet", "as_json"):
            continue
        if name in _PAIRS:
            setting, flag = _PAIRS[name]
            typed[setting] = parse_pairs(flag, value)
        else:
            typed[name] = value
    return typed


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


def print_warnings(console: Console, sentences: list[str]) -> None:
    """Each warning on a line of its own, also when quiet."""
    if is_main_rank():
        for sentence in sentences:
            console.print(Text.assemble(("warning: ", "bold yellow"), visible(sentence)), soft_wrap=True)


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
