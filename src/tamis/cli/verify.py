"""``tamis verify``: parse, call the library, print how well scores agree with retraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tamis.cli import options as opt
from tamis.cli.command import work
from tamis.cli.output import plain, print_summary
from tamis.settings import VerifySettings

__all__ = ["EPILOG", "verify"]

EPILOG = """
[bold]Examples[/bold]

[cyan]tamis verify --run trace --target gsm8k.jsonl --samples 50 --out check[/cyan]

[cyan]tamis verify --run trace --target T --samples 100 --secant 10 --processes 8 --json[/cyan]

Each sample costs a retraining from the last recorded state before its use to the end. Interrupted verifications resume
with the same command. Read the interval, not the number alone: below 30 samples it is wide.
"""


def verify(
    ctx: typer.Context,
    run: opt.Run = None,
    target: opt.PooledTarget = None,
    samples: Annotated[
        int, typer.Option(help="How many samples to leave out; each takes one retraining.", rich_help_panel=opt.SCORE)
    ] = VerifySettings.samples,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose scores are compared; all when left out.",
            metavar="METHOD...",
            rich_help_panel=opt.SCORE,
            show_default=False,
        ),
    ] = None,
    curvature: opt.Curvature = VerifySettings.curvature,
    secant: Annotated[
        int,
        typer.Option(help="Also compare finite removal over so many updates (0: no).", rich_help_panel=opt.SCORE),
    ] = VerifySettings.secant,
    removal: opt.Removal = VerifySettings.removal,
    per_row: Annotated[
        bool,
        typer.Option(
            "--per-row/--mean",
            help="Correlate for each target row and average, instead of for their mean loss.",
            rich_help_panel=opt.SCORE,
        ),
    ] = VerifySettings.per_row,
    out: opt.Out = VerifySettings.out,
    model: opt.RunModel = None,
    revision: opt.Revision = None,
    device: opt.Device = VerifySettings.device,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = VerifySettings.trust_remote_code,
    max_length: opt.MaxLength = VerifySettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = VerifySettings.on_bad_row,
    processes: Annotated[
        int,
        typer.Option(help="Retrainings that run at the same time, each with its own model.", rich_help_panel=opt.RUN),
    ] = VerifySettings.processes,
    batch_rows: opt.TargetBatchRows = VerifySettings.batch_rows,
    tolerance: opt.Tolerance = None,
    seed: opt.Seed = VerifySettings.seed,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Retrain a recorded run without each of some random samples, and see which method's scores predicted the outcome.

    Prints Spearman's correlation with an interval of 95 % for every method. Writes to the --out folder:
    [bold]truth[/bold] (one file per retraining), [bold]pairs.parquet[/bold] (what each found beside every method's
    score), [bold]manifest.json[/bold], and [bold]run.yaml[/bold].
    """
    with work(ctx, VerifySettings) as job:
        from tamis import api

        result = api.verify_from_settings(job.settings, progress=job.progress)
        summary = plain(result.summary())
    job.answer(summary, _print_agreement)


def _print_agreement(console: Console, summary: Mapping[str, Any]) -> None:
    table = Table("method", "Spearman", "95 % interval", "relative error")
    for name, values in summary["methods"].items():
        table.add_row(name, _number(values["spearman"]), _interval(values), _number(values["relative_error"]))
    console.print(table)
    console.print(
        "Spearman: whether the scores have the order of what retraining did. Relative error: of their sizes; scores of "
        "zero have 1.",
        style="dim",
    )
    for name, values in summary["methods"].items():
        if values["relative_error"] > 1:
            console.print(Text(_oversized(name, values)))
    print_summary(console, {key: value for key, value in summary.items() if key != "methods"})


def _oversized(name: str, values: Mapping[str, Any]) -> str:
    """Of scores that are further from the truth than zeros would be."""
    miss = values["largest_miss"]
    advice = " (try --secant 10)" if name == "adamw-influence" else ""
    return (
        f"{name}: sizes are wrong, so neither sums per row nor means per source are to be trusted{advice}. Its largest "
        f"miss: update {miss['step']}, place {miss['place']}, scored {miss['score']:+.3g}, retrained "
        f"{miss['retrained']:+.3g}."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(values: dict[str, float | None]) -> str:
    if values["low"] is None:
        return "–"
    return f"{_number(values['low'])} to {_number(values['high'])}"
