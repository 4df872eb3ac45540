"""``tamis attribute``: parse, call the library, print where the scores are."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from tamis.cli import options as opt
from tamis.cli.command import clean_output, plain, print_json, typed_flags
from tamis.cli.config import merge_settings
from tamis.cli.progress import choose_progress, is_main_rank
from tamis.cli.select import print_summary
from tamis.settings import AttributeSettings
from tamis.settings.trace import TRACE_METHODS

__all__ = ["EPILOG", "HOW", "RESULTS", "Run", "attribute"]

HOW, RESULTS = "How to score", "Results"

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

Run = Annotated[
    str | None,
    typer.Option(
        help="Folder of a recorded run: of [cyan]tamis train --record[/cyan] or tamis.TrajectoryRecorder.",
        metavar="DIR",
        rich_help_panel=opt.WHAT,
        show_default=False,
    ),
]
RunModel = Annotated[
    str | None,
    typer.Option(
        help="What training started from; the record names it when left out.",
        metavar="MODEL",
        rich_help_panel=opt.WHAT,
        show_default=False,
    ),
]
CurvatureFlag = Annotated[
    str,
    typer.Option(
        help="What stands for the Hessian of every update's loss.",
        metavar="exact|ggn|fisher|none",
        rich_help_panel=HOW,
    ),
]
Removal = Annotated[
    str,
    typer.Option(
        help="A removed sample leaves a gap in its batch, or the others take over its weight.",
        metavar="subtract|renormalise",
        rich_help_panel=HOW,
    ),
]
BatchRows = Annotated[int, typer.Option(help="Target rows of one pass.", rich_help_panel=opt.RUN)]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="How far replayed losses may be from recorded ones, relatively; by the dtype when left out.",
        rich_help_panel=opt.RUN,
    ),
]


def attribute(
    ctx: typer.Context,
    run: Run = None,
    target: opt.Target = None,
    method: Annotated[
        str,
        typer.Option(
            help="One of the methods below.",
            metavar="METHOD",
            rich_help_panel=HOW,
            autocompletion=lambda: list(TRACE_METHODS),
        ),
    ] = AttributeSettings.method,
    curvature: CurvatureFlag = AttributeSettings.curvature,
    secant: Annotated[
        int,
        typer.Option(
            help="Updates over which a sample is removed exactly and not to first order (10 is a good number); needs "
            "every sample's gradient, so small models.",
            rich_help_panel=HOW,
        ),
    ] = AttributeSettings.secant,
    removal: Removal = AttributeSettings.removal,
    per_row: Annotated[
        bool,
        typer.Option("--per-row/--mean", help="A score for every target row, beside their mean.", rich_help_panel=HOW),
    ] = AttributeSettings.per_row,
    form: Annotated[
        str,
        typer.Option(
            help="adjoint: the target is known; matrix: embeddings first, targets later, for small models.",
            metavar="adjoint|matrix",
            rich_help_panel=HOW,
        ),
    ] = AttributeSettings.form,
    masks: Annotated[
        int,
        typer.Option(help="Of the matrix form: parts into which trained numbers are divided.", rich_help_panel=HOW),
    ] = AttributeSettings.masks,
    error: Annotated[
        str,
        typer.Option(
            help="How wrong each sample's estimate is: an element-wise estimate, or also the exact second order of "
            "some.",
            metavar="none|proxy|exact",
            rich_help_panel=HOW,
        ),
    ] = AttributeSettings.error,
    error_samples: Annotated[
        int, typer.Option(help="Of --error exact: how many.", rich_help_panel=HOW)
    ] = AttributeSettings.error_samples,
    diagnose: Annotated[
        bool | None,
        typer.Option(
            "--diagnose/--no-diagnose",
            help="Say which curvature is needed, for two more sweeps; on when left out unless it is exact.",
            rich_help_panel=HOW,
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder for the results.", metavar="DIR", rich_help_panel=RESULTS)
    ] = AttributeSettings.out,
    store: Annotated[
        str | None,
        typer.Option(
            help="Embeddings of the matrix form, shared by targets; inside --out when left out.",
            metavar="DIR",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    model: RunModel = None,
    revision: opt.Revision = None,
    device: opt.Device = AttributeSettings.device,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = AttributeSettings.trust_remote_code,
    max_length: opt.MaxLength = AttributeSettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = AttributeSettings.on_bad_row,
    batch_rows: BatchRows = AttributeSettings.batch_rows,
    tolerance: Tolerance = None,
    seed: opt.Seed = AttributeSettings.seed,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Score every sample of a recorded training run by what its removal would do to the target, with AdamW's dynamics.

    Writes to the --out folder: [bold]uses.parquet[/bold] (a score per sample and update), [bold]samples.parquet[/bold]
    (their sums per sample), [bold]manifest.json[/bold], and [bold]run.yaml[/bold], which repeats it.
    """
    settings = merge_settings(AttributeSettings, typed_flags(ctx), config)
    with clean_output(quiet=quiet or as_json) as console:
        from tamis import api  # imports PyTorch; help and wrong settings must not wait for it

        result = api.attribute_from_settings(settings, progress=choose_progress(console, quiet=quiet))
        summary = plain(result.summary())
    if as_json:
        print_json(summary)
        return
    if not quiet and is_main_rank():
        shown = {**summary, "target_rows": len(summary["target_rows"])}
        print_summary(Console(), shown)
