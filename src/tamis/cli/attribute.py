"""``tamis attribute``: parse, call the library, print where the scores are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tamis.cli import options as opt
from tamis.cli.command import next_command, work
from tamis.cli.output import plain, print_summary
from tamis.report.wording import visible
from tamis.settings import AttributeSettings, VerifySettings
from tamis.settings.trace import TRACE_METHODS

__all__ = ["EPILOG", "attribute"]

_METHODS = "\n\n".join(f"[cyan]{name}[/cyan]  {summary}" for name, summary in TRACE_METHODS.items())

EPILOG = f"""
[bold]Methods[/bold]

{_METHODS}

[bold]Examples[/bold]

[cyan]tamis train --model M --pool P --target T --steps 500 --method full --record trace[/cyan]   a run to attribute

[cyan]tamis attribute --run trace --target gsm8k.jsonl --out scores[/cyan]

[cyan]tamis attribute --run trace --target T --curvature fisher --error proxy --out scores[/cyan]

[cyan]tamis attribute --run trace --target T --secant 10 --out scores[/cyan]   finite removal: small models

[cyan]tamis attribute --run trace --target T --form matrix --curvature fisher --masks 4 --store S --out scores[/cyan]

Interrupted attributions resume with the same command. Ask [cyan]tamis verify[/cyan] whether to believe the scores.
"""


def attribute(
    ctx: typer.Context,
    run: opt.Run = None,
    target: opt.PooledTarget = None,
    method: Annotated[str, opt.method(TRACE_METHODS, opt.SCORE)] = AttributeSettings.method,
    curvature: opt.Curvature = AttributeSettings.curvature,
    secant: Annotated[
        int,
        typer.Option(
            help="Remove each sample exactly, not to first order, over so many updates (10 is a good number). Needs "
            "every sample's gradient, so it is for small models.",
            rich_help_panel=opt.SCORE,
        ),
    ] = AttributeSettings.secant,
    removal: opt.Removal = AttributeSettings.removal,
    per_row: Annotated[
        bool,
        typer.Option(
            "--per-row/--mean", help="A score for every target row, beside their mean.", rich_help_panel=opt.SCORE
        ),
    ] = AttributeSettings.per_row,
    form: Annotated[
        str,
        typer.Option(
            help="adjoint: the target is known; matrix: embeddings first, targets later, for small models.",
            metavar="adjoint|matrix",
            rich_help_panel=opt.SCORE,
        ),
    ] = AttributeSettings.form,
    masks: Annotated[
        int,
        typer.Option(
            help="Matrix form only: number of groups the parameters are split into.", rich_help_panel=opt.SCORE
        ),
    ] = AttributeSettings.masks,
    mask_share: Annotated[
        float | None,
        typer.Option(
            help="Matrix form only: draw each group anew, of this share of the parameters, and average, as the paper "
            "does; when left out, groups divide the parameters and add up.",
            rich_help_panel=opt.SCORE,
        ),
    ] = None,
    rescale: Annotated[
        bool,
        typer.Option(
            "--rescale/--no-rescale",
            help="Matrix form only: multiply the curvature within a group up to that of all parameters.",
            rich_help_panel=opt.SCORE,
        ),
    ] = AttributeSettings.rescale,
    error: Annotated[
        str,
        typer.Option(
            help="Estimate how wrong each score is. proxy: element-wise, for all samples; exact: also the exact second "
            "order, for some.",
            metavar="none|proxy|exact",
            rich_help_panel=opt.SCORE,
        ),
    ] = AttributeSettings.error,
    error_samples: Annotated[
        int, typer.Option(help="With --error exact: number of samples.", rich_help_panel=opt.SCORE)
    ] = AttributeSettings.error_samples,
    diagnose: Annotated[
        bool | None,
        typer.Option(
            "--diagnose/--no-diagnose",
            help="Say which curvature is needed, at the cost of two more sweeps; when left out, on unless --curvature "
            "is exact.",
            rich_help_panel=opt.SCORE,
        ),
    ] = None,
    out: opt.Out = AttributeSettings.out,
    store: Annotated[
        str | None,
        typer.Option(
            help="Embeddings of the matrix form, shared by targets; inside --out when left out.",
            metavar="DIR",
            rich_help_panel=opt.RESULTS,
        ),
    ] = None,
    model: opt.RunModel = None,
    revision: opt.Revision = None,
    device: opt.Device = AttributeSettings.device,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = AttributeSettings.trust_remote_code,
    max_length: opt.MaxLength = AttributeSettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = AttributeSettings.on_bad_row,
    batch_rows: opt.TargetBatchRows = AttributeSettings.batch_rows,
    tolerance: opt.Tolerance = None,
    seed: opt.Seed = AttributeSettings.seed,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Score every sample of a recorded training run by what its removal would do to the target, with AdamW's dynamics.

    Writes to the --out folder: [bold]uses.parquet[/bold] (a score per sample and update), [bold]samples.parquet[/bold]
    (their sums per sample), [bold]manifest.json[/bold], and [bold]run.yaml[/bold], which repeats it.
    """
    with work(ctx, AttributeSettings) as job:
        from tamis import api

        result = api.attribute_from_settings(job.settings, progress=job.progress)
        summary = plain(result.summary())
    out = f"{job.settings.out}-verified"
    verify = next_command("verify", job.settings, VerifySettings, out=out, batch_rows=None, seed=None)
    job.answer({**summary, "next": verify}, _print_scores, warnings=summary["warnings"])


def _print_scores(console: Console, summary: Mapping[str, Any]) -> None:
    """What the samples did, by source and at either end, then counts, cost and paths."""
    console.print(
        "A score is by how much the target's mean loss (in nats) would be higher at the end without the sample in one "
        "update: + helped, - did less than its share. Of best and worst it is the sum over the row's uses.",
        style="dim",
    )
    if len(summary["sources"]) > 1:
        heads = {"samples": "samples", "uses": "uses", "mean_score": "mean per use"}
        if summary["outsized_updates"]:
            heads["mean_score_elsewhere"] = "without update " + ", ".join(map(str, summary["outsized_updates"]))
        console.print(_table("source", summary["sources"], heads))
    for name in ("best", "worst") if summary["best"] else ():  # of one sample there is neither
        console.print(_table(name, summary[name], {"uses": "uses", "update": "most in update", "score": "score"}))
    shown = ("sources", "best", "worst", "outsized_updates")
    rest = {key: value for key, value in summary.items() if key not in shown}
    print_summary(console, {**rest, "target_rows": len(rest["target_rows"])})


def _table(name: str, lines: Sequence[Mapping[str, Any]], heads: Mapping[str, str]) -> Table:
    """``heads`` has a title for each key of ``lines`` that is shown."""
    table = Table(box=None, pad_edge=False)
    table.add_column(name, overflow="fold")
    for head in heads.values():
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines:
        numbers = [line[key] for key in heads]
        said = [_said(value) for value in numbers]
        table.add_row(Text(visible(line["source" if name == "source" else "sample"])), *said)
    return table


def _said(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:+.3g}"
