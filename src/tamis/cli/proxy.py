"""``tamis proxy``: parse, call the library, print what was built and what it keeps."""

from __future__ import annotations

from typing import Annotated

import typer

from tamis.cli import options as opt
from tamis.cli.command import work
from tamis.cli.output import plain, print_summary
from tamis.notation import PROXY_SUMMARIES
from tamis.settings import ProxySettings

__all__ = ["EPILOG", "proxy"]

HOW, PROBES, ALIGN, MEASURE = "How to compress", "The probes", "Alignment", "Measuring"

_PRESETS = "\n\n".join(f"[cyan]{name}[/cyan]  {summary}" for name, summary in PROXY_SUMMARIES.items())

EPILOG = f"""
[bold]Presets[/bold]

{_PRESETS}

[bold]Examples[/bold]

[cyan]tamis proxy --model Qwen/Qwen2.5-0.5B --pool pool/*.jsonl --target gsm8k.jsonl --sparsity 0.5 --out proxy[/cyan]

[cyan]tamis select --model proxy --pool pool/*.jsonl --target gsm8k.jsonl --out run1[/cyan]   any method runs on it

[cyan]tamis proxy --model M --pool P --sparsity 0.7 --allocation share --steps 300 --out proxy70[/cyan]

[cyan]tamis proxy --model M --pool P --preset paper --out paper[/cyan]   as published, with its control beside

[cyan]tamis proxy --model M --pool P --preset sibling --sibling SMALL --out small[/cyan]   is a smaller model as good?

A killed build resumes with the same command. The report says what the proxy keeps and which sparsity to take.
"""


def proxy(
    ctx: typer.Context,
    model: opt.Model = None,
    pool: opt.Pool = None,
    target: opt.Target = None,
    sparsity: Annotated[
        float,
        typer.Option(
            help="Share of the blocks' numbers that is removed, above 0 and below 1.", rich_help_panel=opt.WHAT
        ),
    ] = ProxySettings.sparsity,
    preset: Annotated[
        str,
        typer.Option(
            help="Name of a preset; single settings change it.",
            metavar="PRESET",
            rich_help_panel=HOW,
            autocompletion=lambda: list(PROXY_SUMMARIES),
        ),
    ] = ProxySettings.preset,
    sibling: Annotated[
        str | None,
        typer.Option(
            help="The smaller model of the presets sibling and influence-scorer.", metavar="MODEL", rich_help_panel=HOW
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="probe (exact and quick), dense (the same by large eigenproblems) or core (the paper's).",
            metavar="FORM",
            rich_help_panel=HOW,
        ),
    ] = None,
    weighting: Annotated[
        str | None,
        typer.Option(
            help="influence: for gradient scores; inverse: for influence functions.",
            metavar="influence|inverse",
            rich_help_panel=HOW,
        ),
    ] = None,
    damping: Annotated[
        str | None,
        typer.Option(
            help="relative: in units of a side's mean eigenvalue; absolute: as in the paper.",
            metavar="relative|absolute",
            rich_help_panel=HOW,
        ),
    ] = None,
    damping_input: Annotated[
        float | None, typer.Option(help="Damping of the inputs' second moment.", rich_help_panel=HOW)
    ] = None,
    damping_output: Annotated[
        float | None, typer.Option(help="Damping of the output gradients' second moment.", rich_help_panel=HOW)
    ] = None,
    gauge: Annotated[
        str | None,
        typer.Option(
            help="balanced factors, or weighted ones as the paper's formula leaves them.",
            metavar="balanced|weighted",
            rich_help_panel=HOW,
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="uniform: every layer is cut alike; share: more rank where a direction holds more of its layer's "
            "energy (worth a try from sparsity 0.7 on).",
            metavar="uniform|share",
            rich_help_panel=HOW,
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Take the proxy's per-sample gradients of each layer's product, or of its two factors.",
            metavar="product|factors",
            rich_help_panel=HOW,
        ),
    ] = None,
    probe_rows: Annotated[
        int, typer.Option(help="Pool rows used to estimate which directions of a layer matter.", rich_help_panel=PROBES)
    ] = ProxySettings.probe_rows,
    probe_tokens: Annotated[
        int, typer.Option(help="Tokens drawn from each probe row.", rich_help_panel=PROBES)
    ] = ProxySettings.probe_tokens,
    probe_gb: Annotated[
        float,
        typer.Option(
            help="Memory for probes, in GB; less memory takes more passes over the probe rows.", rich_help_panel=PROBES
        ),
    ] = ProxySettings.probe_gb,
    objective: Annotated[
        str | None,
        typer.Option(
            help="kl (outputs), align (gradients), align+kl (the paper's) or none.",
            metavar="OBJECTIVE",
            rich_help_panel=ALIGN,
        ),
    ] = None,
    kl_weight: Annotated[
        float | None, typer.Option(help="Weight of the outputs in align+kl.", rich_help_panel=ALIGN)
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates.", rich_help_panel=ALIGN)] = ProxySettings.steps,
    update_rows: Annotated[
        int, typer.Option(help="Rows of an update.", rich_help_panel=ALIGN)
    ] = ProxySettings.update_rows,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; when left out, 1e-3 for hidden sizes up to 256 and 1e-4 above.",
            rich_help_panel=ALIGN,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the outputs that are compared.", rich_help_panel=ALIGN)
    ] = ProxySettings.temperature,
    measure_steps: Annotated[
        int, typer.Option(help="Updates between two measurements on validation rows.", rich_help_panel=ALIGN)
    ] = ProxySettings.measure_steps,
    patience: Annotated[
        int, typer.Option(help="Stop after so many measurements without improvement.", rich_help_panel=ALIGN)
    ] = ProxySettings.patience,
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control",
            help="With align and align+kl: also align a copy by outputs alone, for as long.",
            rich_help_panel=ALIGN,
        ),
    ] = ProxySettings.control,
    held_out_rows: Annotated[
        int, typer.Option(help="Pool rows that the report measures; 200 give about ±0.06.", rich_help_panel=MEASURE)
    ] = ProxySettings.held_out_rows,
    validation_rows: Annotated[
        int, typer.Option(help="Pool rows that decide when alignment stops.", rich_help_panel=MEASURE)
    ] = ProxySettings.validation_rows,
    target_rows: Annotated[
        int, typer.Option(help="Without --target: pool rows that stand in for one.", rich_help_panel=MEASURE)
    ] = ProxySettings.target_rows,
    keep: Annotated[
        float, typer.Option(help="Least rank correlation that the advised sparsity may have.", rich_help_panel=MEASURE)
    ] = ProxySettings.keep,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep/--no-sweep",
            help="Measure the sparsities 0.1 to 0.9 before alignment, too, for the advice.",
            rich_help_panel=MEASURE,
        ),
    ] = ProxySettings.sweep,
    projection_dim: Annotated[
        int, typer.Option(help="Side of each layer's sketch in the measurements.", rich_help_panel=MEASURE)
    ] = ProxySettings.projection_dim,
    out: Annotated[
        str, typer.Option(help="Folder of the proxy.", metavar="DIR", rich_help_panel=opt.RESULTS)
    ] = ProxySettings.out,
    report: opt.Report = ProxySettings.report,
    revision: opt.Revision = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type to compress and align in; auto is float32, the best one. The finished proxy loads in any type.",
            metavar="DTYPE",
            rich_help_panel=opt.MODEL,
        ),
    ] = ProxySettings.dtype,
    device: opt.Device = ProxySettings.device,
    attention: opt.Attention = ProxySettings.attention,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = ProxySettings.trust_remote_code,
    max_length: opt.MaxLength = ProxySettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = ProxySettings.on_bad_row,
    batch_tokens: opt.BatchTokens = None,
    seed: opt.Seed = ProxySettings.seed,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Build a cheap copy of a model that ranks a pool as the model does, and measure how far it does.

    The --out folder is a model: give it as --model to any verb. Beside the weights it has [bold]proxy.json[/bold]
    (which layers are in factors), [bold]retention.json[/bold] and [bold]report.html[/bold] (what the proxy keeps, at
    what cost, and which sparsity to take), [bold]manifest.json[/bold], and [bold]run.yaml[/bold], which repeats it.
    """
    with work(ctx, ProxySettings) as job:
        from tamis import api

        result = api.proxy_from_settings(job.settings, progress=job.progress)
        summary = plain(result.summary())
    # A build that ran has said its warnings when it began.
    job.answer(summary, print_summary, warnings=result.warnings if result.was_finished else ())
