"""``tamis train``: parse, call the library, print what was trained and where it lies."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tamis.cli import options as opt
from tamis.cli.command import next_command, work
from tamis.cli.output import plain, print_summary
from tamis.notation import ONLINE_SUMMARIES
from tamis.settings import AttributeSettings, TrainRunSettings

__all__ = ["EPILOG", "train"]

HOW, MEASURE, OPTIMIZER, TUNE = "How to choose", "Measuring", "The optimizer", "What is trained"

_METHODS = "\n\n".join(f"[cyan]{name}[/cyan]  {summary}" for name, summary in ONLINE_SUMMARIES.items())

EPILOG = f"""
[bold]Methods[/bold]

{_METHODS}

[bold]Examples[/bold]

[cyan]tamis train --model Qwen/Qwen2.5-0.5B --pool pool/*.jsonl --target gsm8k.jsonl --steps 500[/cyan]

[cyan]tamis train --model M --pool P --target T --steps 500 --method tilt --eval-steps 50 --patience 3[/cyan]

[cyan]tamis train --model M --pool P --target T --epochs 1 --set preset=paper --keep 16 --out paper[/cyan]

[cyan]accelerate launch --num_processes 2 -m tamis train --model M --pool P --target T --steps 500[/cyan]

[cyan]tamis train --config run1/run.yaml --method full --out run2[/cyan]   the same run without choosing

Killed or interrupted runs resume with the same command. Always compare with [cyan]full[/cyan] and [cyan]uniform[/cyan].
"""


def train(
    ctx: typer.Context,
    model: opt.Model = None,
    pool: opt.Pool = None,
    target: opt.PooledTarget = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Updates.", rich_help_panel=opt.WHAT, show_default=False),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="In place of --steps: passes over the pool, each row a candidate once in each.",
            rich_help_panel=opt.WHAT,
            show_default=False,
        ),
    ] = None,
    method: Annotated[str, opt.method(ONLINE_SUMMARIES, HOW)] = TrainRunSettings.method,
    set_: Annotated[
        list[str] | None,
        opt.method_setting(
            "the method", "NAME=VALUE", HOW, more="; [cyan]preset=paper[/cyan] is filter-then-weight as published"
        ),
    ] = None,
    keep: Annotated[
        int, typer.Option(help="Candidates kept per choice, by methods that keep some.", rich_help_panel=HOW)
    ] = TrainRunSettings.keep,
    oversample: Annotated[
        int,
        typer.Option(
            help="Each choice scores keep × oversample rows (all processes together).",
            rich_help_panel=HOW,
        ),
    ] = TrainRunSettings.oversample,
    target_rows: Annotated[
        int | None,
        typer.Option(
            help="Target rows per look, new ones each time; when left out, half as many as candidates are scored.",
            rich_help_panel=HOW,
        ),
    ] = None,
    reduction: Annotated[
        str,
        typer.Option(
            help="rows: every row has the same weight in an update; tokens: every token, as in plain training.",
            metavar="rows|tokens",
            rich_help_panel=HOW,
        ),
    ] = TrainRunSettings.reduction,
    candidates: Annotated[
        str,
        typer.Option(
            help="How candidates are scored. exact: by gradients, at each choice; reuse:K: by gradients, once for K "
            "choices; sources:K: a few of each source at one choice in K, for all of the source; jvp: by a forward "
            "pass alone; proxy:MODEL: by a smaller model. Not all go with the default method; docs/online.md has the "
            "costs.",
            metavar="exact|reuse:K|sources:K|jvp|proxy:MODEL",
            rich_help_panel=HOW,
        ),
    ] = TrainRunSettings.candidates,
    source_rows: Annotated[
        int, typer.Option(help="Candidates of each source to score, with sources:K.", rich_help_panel=HOW)
    ] = TrainRunSettings.source_rows,
    source_temperature: Annotated[
        float,
        typer.Option(
            help="How strictly sources:K takes the best sources: 0 takes no other; large values draw evenly.",
            rich_help_panel=HOW,
        ),
    ] = TrainRunSettings.source_temperature,
    source_memory: Annotated[
        float,
        typer.Option(
            help="Weight of a score in its source's mean, relative to one of the next scoring (1: all alike).",
            rich_help_panel=HOW,
        ),
    ] = TrainRunSettings.source_memory,
    target_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank to cut every matrix of the target's direction to, for cheaper scores; whole when left out.",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = TrainRunSettings.target_rank,
    target_every: Annotated[
        int, typer.Option(help="Number of choices that use the same target gradient.", rich_help_panel=HOW)
    ] = TrainRunSettings.target_every,
    target_ema: Annotated[
        float,
        typer.Option(help="Weight of earlier target gradients in a running mean (0: no mean).", rich_help_panel=HOW),
    ] = TrainRunSettings.target_ema,
    drop_leaks: Annotated[bool, opt.drop_leaks(HOW)] = TrainRunSettings.drop_leaks,
    eval: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows of the task that only measure, like --target.",
            metavar="EVAL...",
            rich_help_panel=MEASURE,
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Share of every target's rows that only measure; 0.2 when left out, 0 with --eval.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Updates between measurements; only before and after when left out.", rich_help_panel=MEASURE
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many measurements without improvement, and keep the best weights.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    forecast_every: Annotated[
        int,
        typer.Option(
            help="Every so many updates, compare the predicted with the realised drop of the target loss (0: never).",
            rich_help_panel=MEASURE,
        ),
    ] = TrainRunSettings.forecast_every,
    tune: Annotated[str, opt.tune(TUNE)] = TrainRunSettings.tune,
    lora_rank: Annotated[int | None, opt.lora_rank(TUNE)] = None,
    lora_alpha: Annotated[float | None, opt.lora_alpha(TUNE)] = None,
    lora_targets: Annotated[list[str] | None, opt.lora_targets(TUNE)] = None,
    learning_rate: Annotated[float | None, opt.learning_rate(OPTIMIZER)] = None,
    scheduler: Annotated[
        str,
        typer.Option(
            help="How the learning rate changes after its warm-up, whose first update already trains.",
            metavar="linear|cosine|constant|inverse_sqrt",
            rich_help_panel=OPTIMIZER,
        ),
    ] = TrainRunSettings.scheduler,
    warmup_share: Annotated[float, opt.warmup_share(OPTIMIZER)] = TrainRunSettings.warmup_share,
    weight_decay: Annotated[float, opt.weight_decay(OPTIMIZER)] = TrainRunSettings.weight_decay,
    beta1: Annotated[float, typer.Option(help="AdamW's beta1.", rich_help_panel=OPTIMIZER)] = TrainRunSettings.beta1,
    beta2: Annotated[float, typer.Option(help="AdamW's beta2.", rich_help_panel=OPTIMIZER)] = TrainRunSettings.beta2,
    clip: Annotated[float, opt.clip(OPTIMIZER)] = TrainRunSettings.clip,
    accumulation: Annotated[
        int, typer.Option(help="Choices per update.", rich_help_panel=OPTIMIZER)
    ] = TrainRunSettings.accumulation,
    out: opt.Out = TrainRunSettings.out,
    save_steps: Annotated[
        int | None,
        typer.Option(
            help="Updates between checkpoints, the most that a kill can lose; when left out, 100, or --eval-steps with "
            "--patience.",
            rich_help_panel=opt.RESULTS,
        ),
    ] = None,
    log_steps: Annotated[
        int, typer.Option(help="Updates between log entries.", rich_help_panel=opt.RESULTS)
    ] = TrainRunSettings.log_steps,
    record: Annotated[
        str | None,
        typer.Option(
            help="Record in this folder what [cyan]tamis attribute[/cyan] needs: states, batches, learning rates.",
            metavar="DIR",
            rich_help_panel=opt.RESULTS,
            show_default=False,
        ),
    ] = None,
    record_every: Annotated[
        int | None,
        typer.Option(
            help="Updates between two recorded states, each three times the size of what is trained; when left out, "
            "the square root of the number of updates, at least 10.",
            rich_help_panel=opt.RESULTS,
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorboard or wandb, beside log.jsonl.",
            metavar="NAME...",
            rich_help_panel=opt.RESULTS,
            show_default=False,
        ),
    ] = None,
    revision: opt.Revision = None,
    dtype: opt.Dtype = TrainRunSettings.dtype,
    device: opt.Device = TrainRunSettings.device,
    attention: opt.Attention = TrainRunSettings.attention,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = TrainRunSettings.trust_remote_code,
    gradient_checkpointing: opt.GradientCheckpointing = TrainRunSettings.gradient_checkpointing,
    max_length: opt.MaxLength = TrainRunSettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = TrainRunSettings.on_bad_row,
    batch_rows: Annotated[
        int, typer.Option(help="Rows per forward pass; lower it if memory runs out.", rich_help_panel=opt.RUN)
    ] = TrainRunSettings.batch_rows,
    seed: opt.Seed = TrainRunSettings.seed,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Train a model on a pool, choosing and weighting its rows at every update by AdamW's own state and a target.

    Writes to the --out folder: [bold]model[/bold] (the trained model or adapter, with its tokenizer),
    [bold]log.jsonl[/bold], [bold]candidates[/bold] (Parquet: the fate of every candidate), [bold]checkpoints[/bold],
    [bold]manifest.json[/bold], and [bold]run.yaml[/bold], which repeats the run.
    """
    with work(ctx, TrainRunSettings) as job:
        from tamis import api

        result = api.train_from_settings(job.settings, progress=job.progress)
        summary = plain(result.summary())
    if job.settings.record is not None:
        own: dict[str, Any] = dict.fromkeys(("model", "revision", "method", "batch_rows", "seed"))
        record = job.settings.record
        own |= {"run": record, "out": f"{record}-scores"}
        summary["next"] = next_command("attribute", job.settings, AttributeSettings, **own)
    job.answer(summary, print_summary)
