"""``tamis plan``: parse, call the library, print a table of what each method would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tamis.cli import options as opt
from tamis.cli.command import work
from tamis.cli.output import write_result
from tamis.notation import PROJECTION_NAMES
from tamis.progress import time_text
from tamis.report.wording import visible
from tamis.settings import PlanSettings

if TYPE_CHECKING:  # imports PyTorch
    from tamis.evaluate.plan import PlanResult

__all__ = ["EPILOG", "plan", "print_plan"]

ASSUME = "What to assume"

EPILOG = """
[bold]Examples[/bold]

[cyan]tamis plan --model Qwen/Qwen2.5-0.5B --pool pool/*.jsonl --target gsm8k.jsonl --assume-device a100[/cyan]

[cyan]tamis plan --model M --pool P --target T --measure[/cyan]   times a few batches on this machine

[cyan]tamis plan --model M --pool P --target T --set less.warmup_epochs=2 --shortlist bm25:10x[/cyan]

[cyan]tamis plan --model M --pool P --target T --measure --compare run1[/cyan]   planned against spent
"""


def plan(
    ctx: typer.Context,
    model: opt.Model = None,
    pool: opt.Pool = None,
    target: opt.Target = None,
    budget: Annotated[
        str, typer.Option(help="As for select; it decides the length of a shortlist.", rich_help_panel=opt.WHAT)
    ] = PlanSettings.budget,
    assume_device: Annotated[
        str,
        typer.Option(
            help="b200, h200, h100, a100, l40s, l4, a10, v100, t4, rtx4090, rtx3090 or mi300x.",
            metavar="NAME",
            rich_help_panel=ASSUME,
        ),
    ] = PlanSettings.assume_device,
    utilisation: Annotated[
        float | None,
        typer.Option(help="Share of the device's peak that is reached; 0.35 when left out.", rich_help_panel=ASSUME),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Time a few batches on this machine instead.", rich_help_panel=ASSUME
        ),
    ] = PlanSettings.measure,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Folder of a finished run of the same model and data, to check the plan against.",
            metavar="DIR",
            rich_help_panel=ASSUME,
        ),
    ] = None,
    shortlist: Annotated[
        str, typer.Option(help="Shortlist shown beside every gradient method.", rich_help_panel=ASSUME)
    ] = PlanSettings.shortlist,
    set_: Annotated[list[str] | None, opt.method_setting("a method", "METHOD.NAME=VALUE", ASSUME)] = None,
    projection: Annotated[
        str | None,
        typer.Option(
            help=f"How gradients are projected: {', '.join(PROJECTION_NAMES)}; each method's own when left out.",
            rich_help_panel=ASSUME,
        ),
    ] = None,
    projection_dim: Annotated[int | None, opt.projection_dim(ASSUME)] = None,
    aggregate: Annotated[str, opt.aggregate(ASSUME)] = PlanSettings.aggregate,
    drop_flagged: Annotated[bool, opt.drop_flagged(ASSUME)] = PlanSettings.drop_flagged,
    sample: Annotated[
        int,
        typer.Option(help="Rows to tokenize for the counts, evenly spaced (0: all).", rich_help_panel=ASSUME),
    ] = PlanSettings.sample,
    out: opt.PrintedOut = None,
    revision: opt.Revision = None,
    dtype: opt.Dtype = PlanSettings.dtype,
    device: opt.Device = PlanSettings.device,
    device_map: opt.DeviceMap = None,
    attention: opt.Attention = PlanSettings.attention,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = PlanSettings.trust_remote_code,
    gradient_checkpointing: opt.GradientCheckpointing = PlanSettings.gradient_checkpointing,
    max_length: opt.MaxLength = PlanSettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = PlanSettings.on_bad_row,
    batch_tokens: opt.BatchTokens = None,
    batch_invariant: opt.BatchInvariant = PlanSettings.batch_invariant,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Estimate what each method would cost on this pool: operations, hours, memory and disk. No weights are loaded.

    Operations are counted from the model's shapes and the pool's tokens. Hours assume a share of a device's published
    peak, stated in the output; --measure loads the weights and times a few batches here instead.
    """
    with work(ctx, PlanSettings) as job:
        from tamis import api

        result = api.estimate_plan(job.settings, progress=job.progress)
        write_result("plan", job.settings, job.settings.out, result)
    job.answer(result, print_plan, warnings=result.notes)


def print_plan(console: Console, result: PlanResult) -> None:
    """The pool, the table of methods, the basis of the figures, and the comparison with a run if there is one."""
    pool, target = result.pool, result.target
    sampled = "" if result.sampled_rows == pool.rows else f", from {result.sampled_rows:,} sampled rows"
    lines = [
        f"{visible(result.model)}: {result.params:,} parameters",
        f"pool: {pool.rows:,} rows, {pool.tokens:,.0f} tokens, {pool.supervised_tokens:,.0f} carry loss{sampled}",
        f"target: {target.rows:,} rows in {result.targets} targets; budget: {result.budget_rows:,} rows",
        *_device_lines(result),
        f"reading and tokenizing on one core, before any of these: {time_text(result.tokenize_seconds)}",
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    console.print(_table(result))
    console.print(
        Text(
            "TFLOP: counted, every token. paper's TFLOP: as table 1 of Influence Distillation counts, one token a row, "
            "2 operations a parameter forward and 4 back, no warm-up, no target; for comparison with that table only. "
            "passes: in units of one forward pass over the pool. memory: within a factor of two. That paper's own "
            "settings (4,096 landmarks, 4 blocks; no warm-up) with every token counted would take "
            f"{_number(result.landmark_tflops)} TFLOP.",
            style="dim",
        ),
        soft_wrap=True,
    )
    if result.comparisons:
        console.print(_comparison(result))


def _device_lines(result: PlanResult) -> list[str]:
    """For which device the times are, and whether it is the one that a run here would use."""
    rate = result.rate
    lines = [f"device: {rate.device}, {rate.origin}"]
    if rate.is_assumed and result.device.startswith("cpu"):
        lines.append(
            f"times are those of that {rate.device}, not of this machine, where a run would be on the CPU and take far "
            "longer: --measure times it"
        )
    return lines


def _table(result: PlanResult) -> Table:
    # Eight columns in 80 characters: two lines of heads, and a cascade without its method's name, which is above it.
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    time = "assumed\ntime" if result.rate.is_assumed else "\ntime"
    for name in ("rows\nscored", "\nTFLOP", "paper's\nTFLOP", "\npasses", time, "\nmemory", "\ndisk"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in result.methods:
        name = f"  after {method.shortlist}" if method.shortlist else method.method
        used = bool(method.passes)
        table.add_row(
            Text(name, style="cyan" if method.shortlist else ""),
            f"{method.scored_rows:,}",
            _number(method.tflops) if used else "0",
            _number(method.paper_tflops) if used else "0",
            f"{method.forward_passes:.2f}" if used else "0",
            time_text(method.seconds) if used else "–",
            _bytes(method.memory_bytes) if used else "–",
            _bytes(method.disk_bytes) if method.disk_bytes else "–",
        )
    return table


def _comparison(result: PlanResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), title="Planned against spent")
    table.add_column("quantity")
    for name in ("planned", "spent", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.comparisons:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
        planned = "–" if row.planned is None else _number(row.planned)
        table.add_row(row.quantity, planned, _number(row.measured), ratio)
    return table


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
