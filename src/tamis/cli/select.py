"""``tamis select``: parse, call the library, print what was selected and where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tamis.cli import options as opt
from tamis.cli.command import clean_output, plain, print_json, print_warnings, typed_flags
from tamis.cli.config import merge_settings
from tamis.cli.progress import choose_progress, is_main_rank
from tamis.notation import METHOD_SUMMARIES, PROJECTION_NAMES
from tamis.report.wording import visible
from tamis.settings import SelectSettings

__all__ = ["EPILOG", "select"]

HOW, KEEP = "How to score", "What to keep"

_METHODS = "\n\n".join(f"[cyan]{name}[/cyan]  {summary}" for name, summary in METHOD_SUMMARIES.items())

EPILOG = f"""
[bold]Methods[/bold]

{_METHODS}

[bold]Examples[/bold]

[cyan]tamis select --model Qwen/Qwen2.5-0.5B --pool pool/*.jsonl --target gsm8k.jsonl --budget 5%[/cyan]

[cyan]tamis select --model M --pool P --target maths=a.jsonl code=b.jsonl --share maths=2 --share code=1[/cyan]

[cyan]tamis select --model M --pool P --target T --method tracin --shortlist bm25:5x --out run1[/cyan]

[cyan]tamis select --model M --pool P --target T --method less --set warmup_share=0.05 --seed 1[/cyan]

[cyan]tamis select --config run1/run.yaml[/cyan]   repeats that run; more flags change it

Killed or interrupted runs resume with the same command. First time with this model and data: [cyan]tamis doctor[/cyan].
"""


def select(
    ctx: typer.Context,
    model: opt.Model = None,
    pool: opt.Pool = None,
    target: opt.Target = None,
    method: Annotated[
        str,
        typer.Option(
            help="One of the methods below.",
            metavar="METHOD",
            rich_help_panel=HOW,
            autocompletion=lambda: list(METHOD_SUMMARIES),
        ),
    ] = SelectSettings.method,
    shortlist: Annotated[
        str | None,
        typer.Option(
            help="A cheap method first, as METHOD:MULTIPLE: [cyan]bm25:5x[/cyan] keeps five times the budget by BM25 "
            "and scores only those, which makes gradients nearly free.",
            rich_help_panel=HOW,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the method, read as YAML. Repeat for several.",
            metavar="NAME=VALUE",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    projection: Annotated[
        str | None,
        typer.Option(
            help=f"Of gradients: {', '.join(PROJECTION_NAMES)}; the method's own when left out.", rich_help_panel=HOW
        ),
    ] = None,
    projection_dim: Annotated[
        int | None,
        typer.Option(help="Numbers a row keeps; for factorized: the side of each layer's square.", rich_help_panel=HOW),
    ] = None,
    aggregate: Annotated[
        str,
        typer.Option(
            help="round-robin over the target rows, or mean over them.",
            metavar="round-robin|mean",
            rich_help_panel=HOW,
        ),
    ] = SelectSettings.aggregate,
    budget: Annotated[
        str,
        typer.Option(
            help="Rows ([cyan]500[/cyan]), a share of the pool ([cyan]5%[/cyan]) or tokens ([cyan]200k-tokens[/cyan]).",
            rich_help_panel=KEEP,
        ),
    ] = SelectSettings.budget,
    share: Annotated[
        list[str] | None,
        typer.Option(
            help="Part of the budget for a target, relative to the others. Repeat for each target.",
            metavar="NAME=NUMBER",
            rich_help_panel=KEEP,
            show_default=False,
        ),
    ] = None,
    duplicates: Annotated[
        str,
        typer.Option(
            help="one copy of exact duplicates, keep all, or near: one of near-duplicates too.",
            metavar="one|keep|near",
            rich_help_panel=KEEP,
        ),
    ] = SelectSettings.duplicates,
    near_threshold: Annotated[
        float, typer.Option(help="Similarity from which two rows are near-duplicates.", rich_help_panel=KEEP)
    ] = SelectSettings.near_threshold,
    drop_leaks: Annotated[
        bool,
        typer.Option(
            "--drop-leaks/--keep-leaks", help="Leave out pool rows that are target rows.", rich_help_panel=KEEP
        ),
    ] = SelectSettings.drop_leaks,
    drop_flagged: Annotated[
        bool,
        typer.Option(
            "--drop-flagged/--keep-flagged",
            help="Leave out rows whose own loss is unusually high (wrong answers among them).",
            rich_help_panel=KEEP,
        ),
    ] = SelectSettings.drop_flagged,
    out: Annotated[
        str, typer.Option(help="Folder for the results.", metavar="DIR", rich_help_panel="Results")
    ] = SelectSettings.out,
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder of computed features, shared by runs that name it; OUT/store when left out.",
            metavar="DIR",
            rich_help_panel="Results",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html.", rich_help_panel="Results")
    ] = SelectSettings.report,
    write_messages: Annotated[
        bool,
        typer.Option(
            "--write-messages/--no-write-messages",
            help="Also write the selected rows as chats to selected-messages.jsonl, for trainers that read no "
            "instruction rows, or one format only.",
            rich_help_panel="Results",
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
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant/--no-batch-invariant",
            help="One row per forward pass: scores equal to the last bit whatever the batch, at a cost in time.",
            rich_help_panel=opt.RUN,
        ),
    ] = SelectSettings.batch_invariant,
    shard_rows: Annotated[
        int, typer.Option(help="Rows between two writes: the most a kill can lose.", rich_help_panel=opt.RUN)
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
    settings = merge_settings(SelectSettings, typed_flags(ctx), config)
    with clean_output(quiet=quiet or as_json) as console:
        from tamis import api  # imports PyTorch; help and wrong settings must not wait for it

        selection = api.select_from_settings(settings, progress=choose_progress(console, quiet=quiet))
        summary = plain(selection.summary())
    if as_json:
        print_json(summary)
        return
    print_warnings(console, list(selection.warnings))
    if not quiet and is_main_rank():
        print_summary(Console(), summary)


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Counts, cost and paths of a selection, one a line and never wrapped; warnings are printed elsewhere."""
    shown = {_words(name): _said(value) for name, value in summary.items() if name != "warnings"}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        console.print(Text.assemble((name.ljust(width), "bold"), "  ", value), soft_wrap=True)


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
