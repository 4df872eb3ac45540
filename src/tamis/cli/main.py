"""The command ``tamis``: its verbs, its version, and errors as one line with the right exit code.

0: done. 1: a check of ``doctor`` failed. 2: input or settings are wrong. 130: interrupted. Anything else is a fault of
ours and shows its traceback.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from tamis import __version__
from tamis.cli import attribute, compare, doctor, plan, proxy, report, select, train, verify
from tamis.cli.command import UserInterruptError, VerbCommand, VerbGroup, usage
from tamis.errors import TamisError
from tamis.progress import is_main_rank
from tamis.report.wording import visible
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

__all__ = ["app", "main", "run"]

_SECONDS_TO_BE_ENDED = 3.0  # in which a launcher ends the processes beside one that failed

app = typer.Typer(
    name="tamis",
    cls=VerbGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="New here? [cyan]tamis doctor[/cyan], then [cyan]tamis plan[/cyan], then [cyan]tamis select[/cyan]. "
    "Each verb has its own --help with examples.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tamis {__version__}")
        raise typer.Exit


@app.callback()
def _tamis(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Choose fine-tuning data by gradients: from a pool of chats, a target and a model to the subset worth training on.

    A positive score always means: training on this row lowers the target loss.
    """


app.command("select", cls=VerbCommand, epilog=select.EPILOG, options_metavar=usage(SelectSettings))(select.select)
app.command("doctor", cls=VerbCommand, epilog=doctor.EPILOG, options_metavar=usage(DoctorSettings))(doctor.doctor)
app.command("plan", cls=VerbCommand, epilog=plan.EPILOG, options_metavar=usage(PlanSettings))(plan.plan)
app.command("proxy", cls=VerbCommand, epilog=proxy.EPILOG, options_metavar=usage(ProxySettings))(proxy.proxy)
app.command("train", cls=VerbCommand, epilog=train.EPILOG, options_metavar=usage(TrainRunSettings, "--steps STEPS"))(
    train.train
)
app.command("compare", cls=VerbCommand, epilog=compare.EPILOG, options_metavar=usage(CompareSettings))(compare.compare)
app.command("attribute", cls=VerbCommand, epilog=attribute.EPILOG, options_metavar=usage(AttributeSettings))(
    attribute.attribute
)
app.command("verify", cls=VerbCommand, epilog=verify.EPILOG, options_metavar=usage(VerifySettings))(verify.verify)
app.command("report", cls=VerbCommand, epilog=report.EPILOG)(report.report)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; ``arguments`` defaults to those of the process."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(typed, prog_name="tamis", standalone_mode=False)
    except (UserInterruptError, KeyboardInterrupt, typer.Abort):
        if is_main_rank():  # Control-C reaches every process
            _say(
                "interrupted; what was finished is kept. To resume, run the same command again: "
                + shlex.join(["tamis", *typed]),
                style="yellow",
            )
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = _one_line(error)
        # Most errors are every process's, and a process that ends is an error of those that wait for it. What is said
        # once is enough: whoever has nothing of its own to say waits here, and is ended by the launcher.
        if not is_main_rank() or _has_lost_another(error):
            time.sleep(_SECONDS_TO_BE_ENDED)
        if line is None:
            raise
        if os.environ.get("TAMIS_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        _say(line, style="bold red")
        return 2
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """Entry point of the installed command."""
    _ask_for_huge_pages()
    sys.exit(run())


def _ask_for_huge_pages() -> None:
    """Let PyTorch put large CPU tensors on huge pages, unless the user has said otherwise.

    Less time, less memory lost between tensors of changing sizes (``benchmarks/engine.py --small-pages`` is without).
    PyTorch reads the variable when it first allocates, so this comes before its import; only here, in our own process.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None if the error is a fault of ours."""
    if isinstance(error, TamisError):
        return str(error)
    # Typer's usage errors. Their class moved between versions of Typer, their interface did not.
    format_message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
    if callable(format_message):
        command = context.command_path if context is not None else "tamis"
        said = str(format_message()).rstrip(".")
        return f"{said}{'' if said.endswith('?') else '.'} See {command} --help"
    if _has_lost_another(error):
        return (
            "another process of this run has ended; its own message, or the launcher's, says why. What was finished is "
            "kept, run the same command again to resume"
        )
    # A full disk, a missing permission: the system names the file and the reason.
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; what was finished is kept, run the same command again to resume"
    return None


def _has_lost_another(error: Exception) -> bool:
    """Whether a connection to another process of the run broke, by what gloo says; NCCL leaves it to the launcher."""
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "by peer" in str(error)


def _say(message: str, *, style: str) -> None:
    """One line on standard error, whatever the message holds."""
    rank = os.environ.get("RANK", "0")
    prefix = "tamis: " if rank == "0" else f"tamis (rank {rank}): "
    line = visible(" ".join(message.split()))
    Console(stderr=True).print(Text.assemble((prefix, style), line), soft_wrap=True, highlight=False)
