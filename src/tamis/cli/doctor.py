"""``tamis doctor``: parse, call the library, print what it found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tamis.cli import options as opt
from tamis.cli.command import work
from tamis.cli.output import print_warnings, write_result
from tamis.notation import PROJECTION_NAMES
from tamis.progress import is_main_rank
from tamis.report.wording import visible
from tamis.settings import DoctorSettings

if TYPE_CHECKING:  # imports PyTorch
    from tamis.evaluate.checks import SignCheck
    from tamis.evaluate.doctor import CorpusReport, DoctorResult, Preview

__all__ = ["EPILOG", "doctor", "print_doctor"]

LOOK = "What to look at"
_BESIDE_NAMES = 44  # columns of the table of parameters that are not their names
_MOST_SHOWN = 1200  # characters of a previewed row
_FAILED = 1  # exit code when a check failed

EPILOG = """
[bold]Examples[/bold]

[cyan]tamis doctor --model Qwen/Qwen2.5-0.5B --pool pool/*.jsonl --target gsm8k.jsonl[/cyan]

[cyan]tamis doctor --model M --pool P --no-numeric --preview 10[/cyan]   only data and template; loads no weights
"""


def doctor(
    ctx: typer.Context,
    model: opt.Model = None,
    pool: opt.Pool = None,
    target: opt.Target = None,
    preview: Annotated[
        int, typer.Option(help="Rows of the pool, and of the target, whose loss mask is shown.", rich_help_panel=LOOK)
    ] = DoctorSettings.preview,
    sample: Annotated[
        int,
        typer.Option(
            help="Rows to tokenize for the counts, evenly spaced (0: all). All rows are read and checked.",
            rich_help_panel=LOOK,
        ),
    ] = DoctorSettings.sample,
    numeric: Annotated[
        bool,
        typer.Option(
            "--numeric/--no-numeric",
            help="Load the weights, and check batch composition, sign and projection on a few rows.",
            rich_help_panel=LOOK,
        ),
    ] = DoctorSettings.numeric,
    check_rows: Annotated[
        int,
        typer.Option(
            help="Rows used by each numeric check; for the projection: at each of four lengths.", rich_help_panel=LOOK
        ),
    ] = DoctorSettings.check_rows,
    projection: Annotated[
        str,
        typer.Option(
            help=f"Measure what it does to cosines of gradients: {', '.join(PROJECTION_NAMES)}.", rich_help_panel=LOOK
        ),
    ] = DoctorSettings.projection,
    projection_dim: Annotated[int | None, opt.projection_dim(LOOK)] = None,
    out: opt.PrintedOut = None,
    revision: opt.Revision = None,
    dtype: opt.Dtype = DoctorSettings.dtype,
    device: opt.Device = DoctorSettings.device,
    device_map: opt.DeviceMap = None,
    attention: opt.Attention = DoctorSettings.attention,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = DoctorSettings.trust_remote_code,
    gradient_checkpointing: opt.GradientCheckpointing = DoctorSettings.gradient_checkpointing,
    max_length: opt.MaxLength = DoctorSettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = DoctorSettings.on_bad_row,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Check before you spend money: what carries loss, which parameters count, whether the numbers can be trusted.

    Shows the loss mask of a few rows, counts supervised tokens, lists covered and uncovered parameters, says what the
    chat template adds or drops, checks that scores do not depend on batch mates and have the right sign, and measures
    the noise of the projection, by length. The exit code is 1 if a check failed, which --json says as "passed": false.
    """
    with work(ctx, DoctorSettings) as job:
        from tamis import api

        result = api.examine(job.settings, progress=job.progress)
        write_result("doctor", job.settings, job.settings.out, result)
    job.answer(result, print_doctor)
    if not job.as_json:
        print_warnings(job.console, result.warnings)
        if not job.quiet and not result.warnings and is_main_rank():
            Console().print(Text("Nothing to warn of.", style="green"))
    raise typer.Exit(0 if result.passed else _FAILED)


def print_doctor(console: Console, result: DoctorResult) -> None:
    """The findings, section by section; warnings are printed elsewhere."""
    for corpus in filter(None, (result.pool, result.target)):
        _print_corpus(console, corpus)
    _print_template(console, result)
    _print_model(console, result)
    _print_coverage(console, result)
    _print_checks(console, result)
    _print_distortion(console, result)


def _print_corpus(console: Console, corpus: CorpusReport) -> None:
    _heading(console, f"{corpus.kind}: {corpus.rows:,} rows in {len(corpus.files)} files")
    of = "" if corpus.sampled == corpus.rows else f" (of {corpus.sampled:,} rows, evenly spaced)"
    share = corpus.supervised_tokens / corpus.tokens if corpus.tokens else 0.0
    table = _grid()
    table.add_row("tokens" + of, f"{corpus.tokens:,}, {corpus.supervised_tokens:,} ({share:.0%}) carry loss")
    table.add_row("formats", ", ".join(f"{name} {count:,}" for name, count in corpus.formats.items()))
    table.add_row("without a supervised token", f"{corpus.unsupervised_rows:,}")
    table.add_row("cut at --max-length", f"{corpus.truncated_rows:,} rows, {corpus.truncated_tokens:,} tokens")
    table.add_row("cut by the chat template", f"{corpus.dropped_rows:,} rows, a part of an assistant turn")
    table.add_row("exact copies", f"{corpus.exact_copies:,}")
    table.add_row("unusable rows", f"{corpus.bad_rows:,}")
    console.print(table)
    for preview in corpus.previews:
        _print_preview(console, preview)


def _print_preview(console: Console, preview: Preview) -> None:
    where = f"{preview.file} row {preview.row}, {preview.tokens} tokens, {preview.supervised_tokens} carry loss"
    console.print(Text(f"\n{visible(preview.id)}  ({visible(where)})", style="bold"), soft_wrap=True)
    text = Text()
    for piece, supervised in preview.pieces:
        # Without colour (a file, a pipe) the brackets still show where the loss is.
        shown = f"⟦{visible(piece)}⟧" if supervised else visible(piece)
        text.append(shown, style="bold green" if supervised else "dim")
    if len(text) > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        text = Text.assemble(text[:half], (" … ", "yellow"), text[len(text) - half :])
    console.print(text, soft_wrap=True)


def _print_template(console: Console, result: DoctorResult) -> None:
    template = result.template
    _heading(console, f"chat template: {template.origin}")
    table = _grid()
    table.add_row("generation marks", _yes(template.has_generation_marks))
    table.add_row("adds before the first turn", visible(template.added_text).strip() or "nothing")
    table.add_row("trims white space of contents", _yes(template.trims_content))
    table.add_row("takes a system turn", _yes(template.takes_system))
    console.print(table)


def _print_model(console: Console, result: DoctorResult) -> None:
    _heading(console, f"model: {visible(str(result.model.get('name', '')))}")
    table = _grid()
    for name, value in result.model.items():
        if name != "name" and value is not None:
            said = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            table.add_row(name.replace("_", " "), visible(said))
    console.print(table)


def _print_coverage(console: Console, result: DoctorResult) -> None:
    covered = result.coverage
    share = covered.covered / covered.trainable if covered.trainable else 0.0
    _heading(console, f"gradients cover {share:.1%} of {covered.trainable:,} trainable numbers")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("parameters", no_wrap=True, overflow="fold")
    table.add_column("numbers", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in sorted(covered.rows, key=lambda row: (not row.covered, -row.numel)):
        mark = Text("✓", style="green") if row.covered else Text("–", style="yellow")
        name = row.parameters.removesuffix(".weight") + (f" ×{row.tensors}" if row.tensors > 1 else "")
        name = _folded_at_dots(name, max(36, console.width - _BESIDE_NAMES))
        table.add_row(mark, Text(name), f"{row.numel:,}", f"{row.share:.1%}", Text(row.reason))
    console.print(table)


def _folded_at_dots(name: str, width: int) -> str:
    """A dotted name on as many lines as it needs, none of them torn inside a part; further lines are indented."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        if lines[-1].strip() and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _print_checks(console: Console, result: DoctorResult) -> None:
    _heading(console, "numbers")
    table = _grid()
    batch, sign = result.batch_check, result.sign_check
    if batch is not None:
        table.add_row(
            "batch composition",
            f"{_passed(batch.passed)}: alone against in a batch of {batch.rows}, losses differ by "
            f"{batch.loss_difference:.1e}, features by {batch.feature_difference:.1e} "
            f"(rounding explains up to {batch.tolerance:.0e})",
        )
    if sign is not None:
        table.add_row(
            "sign",
            f"{_sign_verdict(sign)}: a step on pool row {sign.row} (score {sign.score:+.3g}, "
            f"cosine {sign.cosine:+.2f}) moved the target loss of {sign.target_loss:.3f} by "
            f"{sign.measured_change:+.2e}, predicted {sign.predicted_change:+.2e}"
            + (f" (the smallest of {sign.steps} steps)" if sign.steps > 1 else ""),
        )
    elif batch is not None:
        table.add_row("sign", "FAILED: every gradient of the checked rows is zero")
    table.add_row("convention", result.sign_convention)
    console.print(table)


def _print_distortion(console: Console, result: DoctorResult) -> None:
    if result.projection is None:
        return
    _heading(console, f"projection: {result.projection['name']}, dim {result.projection['dim']}")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("tokens of a row", "pairs", "cosine of their gradients", "error of the projected cosine"):
        table.add_column(column, justify="right")
    for at in result.distortion:
        table.add_row(
            f"{at.shortest:,}–{at.longest:,}",
            str(at.pairs),
            f"{at.mean_cosine:+.3f} ± {at.spread:.3f}",
            f"{at.rms_error:.4f}",
        )
    console.print(table)


def _heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold cyan"))


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _sign_verdict(sign: SignCheck) -> str:
    return "undecided" if sign.is_routed and not sign.passed else _passed(sign.passed)


def _passed(value: bool) -> str:
    return "passed" if value else "FAILED"
