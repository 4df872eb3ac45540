"""``tamis select``: parse, call the library, print what was selected and where it lies."""

from __future__ import annotations

from typing import Annotated

import typer

from tamis.cli import options as opt
from tamis.cli.command import work
from tamis.cli.output import plain, print_summary
from tamis.notation import METHOD_SUMMARIES, PROJECTION_NAMES
from tamis.settings import SelectSettings

__all__ = ["EPILOG", "select"]

KEEP = "What to keep"

_METHODS = "\n\n".join(f"[cyan]{name}[/cyan]  {summary}" for name, summary in METHOD_SUMMARIES.items())

EPILOG = f"""
[bold]Methods[/bold]

{_METHODS}

[bold]Examples[/bold]

[cyan]tamis select --model Qwen/Qwen2.5-0.5B --pool pool/*.jsonl --target gsm8k.jsonl --budget 5%[/cyan]

[cyan]tamis select --model M --pool P --target maths=a.jsonl code=b.jsonl --share maths=2 --share code=1[/cyan]

[cyan]tamis select --model M --pool P --target T --method tracin --shortlist bm25:5x --out run1[/cyan]

[cyan]tamis select --model M --pool P --target T --method less --set warmup_pool_share=0.05 --seed 1[/cyan]

[cyan]tamis select --config run1/run.yaml[/cyan]   repeats that run; more flags change it

Killed or interrupted runs resume with the same command. First time with this model and data: [cyan]tamis doctor[/cyan].
"""


def select(
    ctx: typer.Context,
    model: opt.Model = None,
    pool: opt.Pool = None,
    target: opt.Target = None,
    method: Annotated[str, opt.method(METHOD_SUMMARIES, opt.SCORE)] = SelectSettings.method,
    shortlist: Annotated[
        str | None,
        typer.Option(
            help="A cheap method first, as METHOD:MULTIPLE: [cyan]bm25:5x[/cyan] keeps five times the budget by BM25 "
            "and scores only those: a quarter of the pool at 5 %, a tenth at 2 %. Or [cyan]sources:8[/cyan]: "
            "scores 8 random rows of every source, and takes random rows of the best sources.",
            rich_help_panel=opt.SCORE,
        ),
    ] = None,
    set_: Annotated[list[str] | None, opt.method_setting("the method", "NAME=VALUE", opt.SCORE)] = None,
    projection: Annotated[
        str | None,
        typer.Option(
            help=f"How gradients are projected: {', '.join(PROJECTION_NAMES)}; the method's own when left out.",
            rich_help_panel=opt.SCORE,
        ),
    ] = None,
    projection_dim: Annotated[int | None, opt.projection_dim(opt.SCORE)] = None,
    aggregate: Annotated[str, opt.aggregate(opt.SCORE)] = SelectSettings.aggregate,
    budget: Annotated[str, opt.budget(KEEP)] = SelectSettings.budget,
    share: Annotated[
        list[str] | None,
        typer.Option(
            help="A target's part of the budget, relative to the others. Repeat for each target.",
            metavar="NAME=NUMBER",
            rich_help_panel=KEEP,
            show_default=False,
        ),
    ] = None,
    duplicates: Annotated[str, opt.duplicates(KEEP)] = SelectSettings.duplicates,
    near_threshold: Annotated[
        float, typer.Option(help="Similarity from which two rows are near-duplicates.", rich_help_panel=KEEP)
    ] = SelectSettings.near_threshold,
    drop_leaks: Annotated[bool, opt.drop_leaks(KEEP)] = SelectSettings.drop_leaks,
    drop_flagged: Annotated[bool, opt.drop_flagged(KEEP)] = SelectSettings.drop_flagged,
    out: opt.Out = SelectSettings.out,
    store: opt.Store = None,
    report: opt.Report = SelectSettings.report,
    write_messages: Annotated[
        bool,
        typer.Option(
            "--write-messages/--no-write-messages",
            help="Also write the selected rows as chats to selected-messages.jsonl, for trainers that do not "
            "read instruction rows, or read one format only.",
            rich_help_panel=opt.RESULTS,
        ),
    ] = SelectSettings.write_messages,
    revision: opt.Revision = None,
    dtype: opt.Dtype = SelectSettings.dtype,
    device: opt.Device = SelectSettings.device,
    device_map: opt.DeviceMap = None,
    attention: opt.Attention = SelectSettings.attention,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = SelectSettings.trust_remote_code,
    gradient_checkpointing: opt.GradientCheckpointing = SelectSettings.gradient_checkpointing,
    max_length: opt.MaxLength = SelectSettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = SelectSettings.on_bad_row,
    batch_tokens: opt.BatchTokens = None,
    batch_invariant: opt.BatchInvariant = SelectSettings.batch_invariant,
    shard_rows: Annotated[
        int,
        typer.Option(help="Rows between two writes to disk: the most that a kill can lose.", rich_help_panel=opt.RUN),
    ] = SelectSettings.shard_rows,
    seed: opt.Seed = SelectSettings.seed,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Choose the rows of a pool that help a target most, by a model's own gradients or by cheaper scores.

    Writes to the --out folder: [bold]selected.jsonl[/bold] (your rows, untouched, with rank, score and weight),
    [bold]scores.parquet[/bold] (every row), [bold]report.html[/bold], [bold]manifest.json[/bold], and
    [bold]run.yaml[/bold], which repeats the run.
    """
    with work(ctx, SelectSettings) as job:
        from tamis import api

        selection = api.select_from_settings(job.settings, progress=job.progress)
        summary = plain(selection.summary())
    job.answer(summary, print_summary, warnings=selection.warnings)
