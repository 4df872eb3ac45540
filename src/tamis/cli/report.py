"""``tamis report``: find the run, call the library, say where the page is."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from tamis.cli import options as opt
from tamis.cli.output import clean_output, print_json
from tamis.progress import is_main_rank

__all__ = ["EPILOG", "report"]

EPILOG = """
[bold]Examples[/bold]

[cyan]tamis report run1[/cyan]   writes run1/report.html, also while the run goes on

[cyan]tamis report run1 --out page.html[/cyan]
"""


def report(
    run: Annotated[
        str,
        typer.Argument(
            help="The --out folder of tamis train, or of another command that writes a page.",
            metavar="RUN",
            rich_help_panel=opt.WHAT,
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="File of the page; report.html in the folder when left out.",
            metavar="FILE",
            rich_help_panel=opt.RESULTS,
            show_default=False,
        ),
    ] = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Write one offline page about a training run: whether choices did what they promised, and what was trained on.

    It has forecasts and outcomes of updates, held-out loss, alignment, weights, sources, what happened to candidates,
    with the text of the best and worst rows, and the cost. `tamis select --report`,
    `tamis compare` and `tamis proxy` write their page themselves: its path is printed, and with --out it is copied.
    """
    if not is_main_rank():
        return  # the page is one file
    with clean_output(quiet=quiet or as_json):
        from tamis.runs.report import write_report  # imports PyTorch; help must not wait for it

        path = write_report(run, out=out)
    if as_json:
        print_json({"report": str(path)})
    elif not quiet:
        Console().print(str(path), soft_wrap=True, highlight=False)
