"""What every verb does around its work: take several values after one flag, know which flags were typed, make its
settings of them, keep the standard output clean, and answer.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from tamis.cli.config import merge_settings, parse_pairs
from tamis.cli.output import clean_output, print_json, print_warnings
from tamis.progress import choose_progress, is_main_rank
from tamis.values import changed_values, required_names

if TYPE_CHECKING:  # imports PyTorch
    from tamis.protocols import Progress as ProgressProtocol

__all__ = ["UserInterruptError", "VerbCommand", "VerbGroup", "Work", "next_command", "typed_flags", "usage", "work"]

S = TypeVar("S")

_PAIRS = {"set_": ("set", "--set"), "share": ("share", "--share")}  # parameter -> setting, flag


class UserInterruptError(Exception):
    """Control-C reached a verb. Typer versions differ in what they make of ``KeyboardInterrupt``; this they pass on."""


class VerbGroup(TyperGroup):
    """The verbs together."""

    def get_params(self, ctx: Any) -> list[Any]:
        """With switches as switches."""
        return _as_switches(super().get_params(ctx))


class VerbCommand(TyperCommand):
    """A command without arguments, so that ``--pool a b c`` (what a shell makes of a glob) can mean three pools."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Paragraphs of the help fill their lines, wherever the source breaks them."""
        super().__init__(*args, **kwargs)
        self.help = "\n\n".join(" ".join(part.split()) for part in (self.help or "").split("\n\n"))

    def get_params(self, ctx: Any) -> list[Any]:
        """With switches as switches."""
        return _as_switches(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, then parse as usual."""
        several = {flag for param in self.params if getattr(param, "multiple", False) for flag in param.opts}
        spread: list[str] = []
        flag, values = "", 0
        for word in args:
            if word.startswith("-") and word != "-":
                flag, values = (word, 0) if word in several else ("", 0)
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


def usage(settings: type[Any], *more: str) -> str:
    """What follows the verb's name at least, by what its settings require; and ``more`` of it."""
    words = [f"--{name} {name.upper()}" for name in required_names(settings)]
    return " ".join([*words, *more, "[OPTIONS]"])


def _as_switches(params: list[Any]) -> list[Any]:
    """Without a value's place in the help: ``--quiet true`` would be an error."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


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


def next_command(verb: str, settings: Any, cls: type[Any], **given: Any) -> str:
    """What to type after a verb with ``settings``: ``verb``, with the values that its class ``cls`` shares with them.

    ``given`` stand in place of them; None leaves one at its default.
    """
    shared = {name: value for name, value in changed_values(settings).items() if name in {f.name for f in fields(cls)}}
    words = ["tamis", verb]
    for name, value in {**shared, **given}.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class Work(Generic[S]):
    """One run of a verb: what it works with, and how it answers when it is done."""

    settings: S
    progress: ProgressProtocol
    console: Console  # standard error
    quiet: bool
    as_json: bool

    def answer(self, result: Any, show: Callable[[Console, Any], None], *, warnings: Sequence[str] = ()) -> None:
        """Print ``result``: one JSON object if that was asked for, else the warnings and what ``show`` makes of it."""
        if self.as_json:
            print_json(result)
            return
        print_warnings(self.console, warnings)
        if not self.quiet and is_main_rank():
            show(Console(), result)


@contextlib.contextmanager
def work(ctx: typer.Context, cls: type[S]) -> Iterator[Work[S]]:
    """Settings of class ``cls`` from the flags and the file; inside, whatever prints goes to standard error.

    ``tamis.api``, which imports PyTorch, is imported inside: help and wrong settings must not wait for it.

    Raises:
        InvalidInput: the file of settings cannot be read.
        InvalidSettings: a setting is unknown, missing or refused.
    """
    settings = merge_settings(cls, typed_flags(ctx), ctx.params["config"])
    quiet, as_json = ctx.params["quiet"], ctx.params["as_json"]
    with clean_output(quiet=quiet or as_json) as console:
        yield Work(settings, choose_progress(console, quiet=quiet), console, quiet, as_json)
