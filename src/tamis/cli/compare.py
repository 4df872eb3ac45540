"""``tamis compare``: parse, call the library, print the verdict and where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tamis.cli import options as opt
from tamis.cli.command import work
from tamis.cli.output import plain
from tamis.report.wording import number, percent, visible
from tamis.settings import CompareSettings

__all__ = ["EPILOG", "compare"]

HOW, MEASURE, TRAINING, PLANTED = "What to compare", "Measuring", "Training", "Known answers"

EPILOG = """
[bold]Methods[/bold]

[cyan]METHOD[/cyan]  any of [cyan]tamis select[/cyan]; [cyan]bm25:5x+METHOD[/cyan] with a shortlist before it

[cyan]sources:8+METHOD[/cyan]  random rows of the sources whose 8 scored rows are best

[cyan]online:METHOD[/cyan]  any of [cyan]tamis train[/cyan], choosing at every update; \
[cyan]online:less@sources:8[/cyan] with its --candidates

[cyan]LABEL=METHOD[/cyan]  under another name, for [cyan]--set LABEL.NAME=VALUE[/cyan]

Always beside them: uniform, bm25, length, random rows of the chosen sources, full at equal updates, and
[cyan]full[/cyan] at equal cost for every method that costs model passes.

[bold]Examples[/bold]

[cyan]tamis compare --model M --pool P --target T --planted --methods tracin less[/cyan]   a check without training runs

[cyan]tamis compare --model M --pool P --target T --eval E --methods tracin bm25:5x+tracin --seeds 5[/cyan]

[cyan]tamis compare --model M --pool P --target T --eval E --methods tracin --budget 5% --budgets 1% 20%[/cyan]

[cyan]tamis compare --model M --pool P --target T --eval E --methods tracin dot=tracin --set dot.normalize=dot[/cyan]

[cyan]tamis compare --config out/run.yaml --seeds 10[/cyan]   the same with more seeds; finished runs are kept

Killed or interrupted comparisons resume with the same command.
"""


def compare(
    ctx: typer.Context,
    model: opt.Model = None,
    pool: opt.Pool = None,
    target: opt.Target = None,
    eval: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows of the task that only measure, like --target; they must not be in the pool or the target. When "
            "left out, half of every target's rows.",
            metavar="EVAL...",
            rich_help_panel=opt.WHAT,
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods to compare, as below; [cyan]tracin[/cyan] when left out.",
            metavar="METHOD...",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        opt.method_setting("a method (or aggregate, drop_flagged of its selection)", "LABEL.NAME=VALUE", HOW),
    ] = None,
    budget: Annotated[str, opt.budget(HOW)] = CompareSettings.budget,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            help="Further budgets, for a curve; every contender runs at each.",
            metavar="BUDGET...",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Training runs of every contender; uniform has at least 4.", rich_help_panel=HOW)
    ] = CompareSettings.seeds,
    aggregate: Annotated[str, opt.aggregate(HOW)] = CompareSettings.aggregate,
    duplicates: Annotated[str, opt.duplicates(HOW)] = CompareSettings.duplicates,
    drop_leaks: Annotated[bool, opt.drop_leaks(HOW)] = CompareSettings.drop_leaks,
    metric: Annotated[
        str,
        typer.Option(
            help="What the verdict is about. loss: of the held-out answers; exact-match: of answers that the model "
            "writes (the loss is measured, too).",
            metavar="loss|exact-match",
            rich_help_panel=MEASURE,
        ),
    ] = CompareSettings.metric,
    answer_pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression whose last match is the answer ([cyan]#### (.+)[/cyan]); the whole text when left "
            "out.",
            metavar="REGEX",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(help="Most tokens that the model may write.", rich_help_panel=MEASURE)
    ] = CompareSettings.answer_tokens,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness ([cyan]gsm8k[/cyan], [cyan]mmlu[/cyan]) that every trained model "
            "answers, too; needs [cyan]pip install 'tamis\\[eval]'[/cyan].",
            metavar="TASK...",
            rich_help_panel=MEASURE,
            show_default=False,
        ),
    ] = None,
    task_folder: Annotated[
        str | None,
        typer.Option(help="Folder with your own task files.", metavar="DIR", rich_help_panel=MEASURE),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="Questions of each task; all when left out.", rich_help_panel=MEASURE)
    ] = None,
    task_shots: Annotated[
        int | None,
        typer.Option(
            help="Examples before each question; the task's own number when left out.", rich_help_panel=MEASURE
        ),
    ] = None,
    subsets: Annotated[
        int,
        typer.Option(
            help="Train on so many random parts of the pool, to see whether scores predict the loss of each: the "
            "linear datamodelling score. For small models; 0: none.",
            rich_help_panel=MEASURE,
        ),
    ] = CompareSettings.subsets,
    subset_share: Annotated[
        float, typer.Option(help="Share of the pool's rows in each of these parts.", rich_help_panel=MEASURE)
    ] = CompareSettings.subset_share,
    planted: Annotated[
        bool,
        typer.Option(
            "--planted/--no-planted",
            help="Check the methods on a pool whose answer is known: relevant, wrong, broken, copied and irrelevant "
            "rows among rows of yours. No training runs: one scoring pass per method over about 500 rows, plus the "
            "method's warm-up.",
            rich_help_panel=PLANTED,
        ),
    ] = CompareSettings.planted,
    relevant: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to plant as relevant; when left out, half of the target rows.",
            metavar="FILE...",
            rich_help_panel=PLANTED,
            show_default=False,
        ),
    ] = None,
    relevant_sources: Annotated[
        list[str] | None,
        typer.Option(
            help="Sources of the pool with rows of the target's kind; they are left out of the background.",
            metavar="SOURCE...",
            rich_help_panel=PLANTED,
            show_default=False,
        ),
    ] = None,
    planted_rows: Annotated[
        int, typer.Option(help="Most relevant rows to plant.", rich_help_panel=PLANTED)
    ] = CompareSettings.planted_rows,
    background_rows: Annotated[
        int, typer.Option(help="Pool rows that the planted ones are mixed into; 0: all.", rich_help_panel=PLANTED)
    ] = CompareSettings.background_rows,
    steps: Annotated[
        int | None,
        typer.Option(help="Updates of every run; when left out, as many as --epochs takes.", rich_help_panel=TRAINING),
    ] = None,
    epochs: Annotated[
        int, typer.Option(help="Passes over as many rows as the budget allows.", rich_help_panel=TRAINING)
    ] = CompareSettings.epochs,
    update_rows: Annotated[
        int, typer.Option(help="Rows of one update.", rich_help_panel=TRAINING)
    ] = CompareSettings.update_rows,
    learning_rate: Annotated[float | None, opt.learning_rate(TRAINING)] = None,
    warmup_share: Annotated[float, opt.warmup_share(TRAINING)] = CompareSettings.warmup_share,
    weight_decay: Annotated[float, opt.weight_decay(TRAINING)] = CompareSettings.weight_decay,
    clip: Annotated[float, opt.clip(TRAINING)] = CompareSettings.clip,
    tune: Annotated[str, opt.tune(TRAINING)] = CompareSettings.tune,
    lora_rank: Annotated[int | None, opt.lora_rank(TRAINING)] = None,
    lora_alpha: Annotated[float | None, opt.lora_alpha(TRAINING)] = None,
    lora_targets: Annotated[list[str] | None, opt.lora_targets(TRAINING)] = None,
    oversample: Annotated[
        int, typer.Option(help="Online methods: candidates per row of an update.", rich_help_panel=TRAINING)
    ] = CompareSettings.oversample,
    out: opt.Out = CompareSettings.out,
    store: opt.Store = None,
    save_steps: Annotated[
        int,
        typer.Option(
            help="Updates between checkpoints of a run, the most that a kill can lose; shorter runs start again.",
            rich_help_panel=opt.RESULTS,
        ),
    ] = CompareSettings.save_steps,
    revision: opt.Revision = None,
    dtype: opt.Dtype = CompareSettings.dtype,
    device: opt.Device = CompareSettings.device,
    attention: opt.Attention = CompareSettings.attention,
    chat_template: opt.ChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = CompareSettings.trust_remote_code,
    gradient_checkpointing: opt.GradientCheckpointing = CompareSettings.gradient_checkpointing,
    max_length: opt.MaxLength = CompareSettings.max_length,
    row_format: opt.RowFormat = None,
    on_bad_row: opt.OnBadRow = CompareSettings.on_bad_row,
    batch_tokens: opt.BatchTokens = None,
    seed: opt.Seed = CompareSettings.seed,
    config: opt.Config = None,
    quiet: opt.Quiet = False,
    as_json: opt.JsonOutput = False,
) -> None:
    """Train on what each method selects, and say which one helped, whether by chance, and at what cost.

    Writes to the --out folder: [bold]report.html[/bold] (the verdict on one page), [bold]verdict.json[/bold],
    [bold]results.csv[/bold] (a line a run), [bold]rows.parquet[/bold] (the loss of every held-out row),
    [bold]records[/bold] (each finished run), [bold]selections[/bold] (each method's own result), and
    [bold]run.yaml[/bold], which repeats it.
    """
    with work(ctx, CompareSettings) as job:
        from tamis import api

        result = api.compare_from_settings(job.settings, progress=job.progress)
        summary = plain(result.summary())
    job.answer(summary, _print_planted if job.settings.planted else _print_verdict, warnings=summary["warnings"])


def _print_verdict(console: Console, summary: Mapping[str, Any]) -> None:
    _print(console, summary, _standing_table(summary))


def _print_planted(console: Console, summary: Mapping[str, Any]) -> None:
    _print(console, summary, _found_table(summary["standings"]))


def _print(console: Console, summary: Mapping[str, Any], standings: Table) -> None:
    """The verdict, how everybody stands, what to do next, and where the page is."""
    console.print(Text(visible(summary["verdict"]), style="bold"), soft_wrap=True)
    console.print(Text(visible(summary["details"])), soft_wrap=True)
    console.print(standings)
    for step in summary["next"]:
        console.print(Text.assemble(("next: ", "bold"), visible(step)), soft_wrap=True)
    for name in ("report", "results"):
        console.print(Text.assemble((f"{name}  ", "bold"), visible(summary[name])), soft_wrap=True)


def _standing_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("contender", overflow="fold")  # the one column that may wrap: no number is ever cut
    for head in ("budget", summary["metric"], "std", "updates", "TFLOPs", "selecting"):
        table.add_column(head, justify="right", no_wrap=True)
    for standing in summary["standings"]:
        share = standing["select_tflops"] / standing["tflops"] if standing["tflops"] else None
        table.add_row(
            Text(visible(standing["name"]), style="" if standing["is_baseline"] else "bold"),
            standing["budget"],
            number(standing["mean"]),
            number(standing["std"], 2),
            number(standing["steps"]),
            number(standing["tflops"], 3),
            percent(share),
        )
    return table


def _found_table(standings: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("method", overflow="fold")
    for head in ("found", "precision", "wrong taken", "AUC wrong", "AUC relevant"):
        table.add_column(head, justify="right", no_wrap=True)
    for standing in standings:
        table.add_row(
            Text(visible(standing["name"]), style="" if standing["is_baseline"] else "bold"),
            str(standing["found"]),
            percent(standing["precision"]),
            str(standing["taken"]["wrong answer"]),
            number(standing["wrong_auc"], 2),
            number(standing["background_auc"], 2),
        )
    return table
