"""The flags that several verbs share, worded once.

A flag that stands in the same group of every verb's help is a type (``opt.Seed``); one whose group depends on the verb
is a function of the group (``Annotated[str, opt.budget(KEEP)]``). Choices are checked by the settings classes, not by
the parser: their errors also serve YAML files and Python, and suggest the nearest name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

__all__ = [
    "DATA",
    "MODEL",
    "RESULTS",
    "RUN",
    "SCORE",
    "WHAT",
    "Attention",
    "BatchInvariant",
    "BatchTokens",
    "ChatTemplate",
    "Config",
    "Curvature",
    "Device",
    "DeviceMap",
    "Dtype",
    "GradientCheckpointing",
    "JsonOutput",
    "MaxLength",
    "Model",
    "OnBadRow",
    "Out",
    "Pool",
    "PooledTarget",
    "PrintedOut",
    "Quiet",
    "Removal",
    "Report",
    "Revision",
    "RowFormat",
    "Run",
    "RunModel",
    "Seed",
    "Store",
    "Target",
    "TargetBatchRows",
    "Tolerance",
    "TrustRemoteCode",
    "aggregate",
    "budget",
    "clip",
    "drop_flagged",
    "drop_leaks",
    "duplicates",
    "learning_rate",
    "lora_alpha",
    "lora_rank",
    "lora_targets",
    "method",
    "method_setting",
    "projection_dim",
    "tune",
    "warmup_share",
    "weight_decay",
]

WHAT, SCORE, RESULTS = "What to work on", "How to score", "Results"
MODEL, DATA, RUN = "The model", "Reading the data", "Running"

Model = Annotated[
    str | None,
    typer.Option(
        help="Hub id, local folder, PEFT adapter folder, or a .gguf file.",
        metavar="MODEL",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
Pool = Annotated[
    list[str] | None,
    typer.Option(
        help="Chats to choose from: JSONL, JSON, Parquet, a glob, or a hub id as ORG/NAME\\[:CONFIG]\\[@SPLIT]. "
        "Several may follow, or repeat the flag.",
        metavar="POOL...",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        help="Rows of the task to improve, in the same formats; each TARGET is one task. NAME=PATH names it; without "
        "NAME it has the file's stem.",
        metavar="TARGET...",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
PooledTarget = Annotated[
    list[str] | None,
    typer.Option(
        help="Rows of the task to improve, in the same formats; the rows of several TARGETs count alike, so that a "
        "large TARGET outweighs a small one. NAME=PATH names it; without NAME it has the file's stem.",
        metavar="TARGET...",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
Out = Annotated[str, typer.Option(help="Folder for the results.", metavar="DIR", rich_help_panel=RESULTS)]
PrintedOut = Annotated[
    str | None,
    typer.Option(
        help="Also write what is printed to this folder, with the settings.", metavar="DIR", rich_help_panel=RESULTS
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        help="Folder of computed features, shared by runs that name it; OUT/store when left out.",
        metavar="DIR",
        rich_help_panel=RESULTS,
    ),
]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.", rich_help_panel=RESULTS)]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub model.", metavar="REV", rich_help_panel=MODEL),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (bfloat16 on a GPU that has it, float32 on a CPU), float32, bfloat16, float16 or float64.",
        metavar="DTYPE",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...", metavar="DEVICE", rich_help_panel=MODEL)]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Accelerate's device map ('auto', 'balanced', ...) for a model that does not fit one device.",
        metavar="MAP",
        rich_help_panel=MODEL,
    ),
]
Attention = Annotated[
    str,
    typer.Option(help="Attention kernel: sdpa, eager or flash_attention_2.", metavar="KERNEL", rich_help_panel=MODEL),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="Jinja chat template, or a file with one, in place of the tokenizer's.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Run Python code that comes with the model.",
        rich_help_panel=MODEL,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory for about a third more time.",
        rich_help_panel=MODEL,
    ),
]
MaxLength = Annotated[
    int,
    typer.Option(help="Longer rows are cut to so many tokens; what was cut is reported.", rich_help_panel=DATA),
]
RowFormat = Annotated[
    str | None,
    typer.Option(
        help="messages, prompt-completion, instruction or text; detected when left out.",
        metavar="FORMAT",
        rich_help_panel=DATA,
    ),
]
OnBadRow = Annotated[
    str,
    typer.Option(
        help="What to do with a row that cannot be used: fail, or skip it and list it in a file.",
        metavar="fail|skip",
        rich_help_panel=DATA,
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens per forward pass, padding included; chosen for the device when left out.", rich_help_panel=RUN
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant/--no-batch-invariant",
        help="One row per forward pass: slower, but scores do not depend on the batch, to the last bit.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.", rich_help_panel=RUN)]
Config = Annotated[
    str | None,
    typer.Option(
        help="YAML file of settings, such as the one beside an earlier result. Flags override it.",
        metavar="FILE",
        rich_help_panel=RUN,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Warnings and errors only.", rich_help_panel=RUN, show_default=False)
]
JsonOutput = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON object on standard output; everything else goes to standard error.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]

Run = Annotated[
    str | None,
    typer.Option(
        help="Folder of a recorded run: of [cyan]tamis train --record[/cyan] or tamis.TrajectoryRecorder.",
        metavar="DIR",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
RunModel = Annotated[
    str | None,
    typer.Option(
        help="What training started from; the record names it when left out.",
        metavar="MODEL",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
Curvature = Annotated[
    str,
    typer.Option(
        help="What is used as the Hessian of each update's loss.",
        metavar="exact|ggn|fisher|none",
        rich_help_panel=SCORE,
    ),
]
Removal = Annotated[
    str,
    typer.Option(
        help="subtract: a removed sample leaves a gap in its batch; renormalise: the others take over its weight.",
        metavar="subtract|renormalise",
        rich_help_panel=SCORE,
    ),
]
TargetBatchRows = Annotated[int, typer.Option(help="Target rows per pass.", rich_help_panel=RUN)]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Largest relative difference between replayed and recorded losses; by the dtype when left out.",
        rich_help_panel=RUN,
    ),
]


def method(names: Iterable[str], panel: str) -> Any:
    """``--method``, completed by the shell from ``names``."""
    known = list(names)
    return typer.Option(help="Name of a method.", metavar="METHOD", rich_help_panel=panel, autocompletion=lambda: known)


def method_setting(of: str, metavar: str, panel: str, *, more: str = "") -> Any:
    """``--set``: of the one method, or of one of several."""
    return typer.Option(
        "--set",
        help=f"A setting of {of}, read as YAML{more}. Repeat for several. A wrong name lists those there are.",
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
    )


def budget(panel: str) -> Any:
    """How much is selected."""
    return typer.Option(
        help="Rows ([cyan]500[/cyan]), a share of the pool ([cyan]5%[/cyan]) or tokens ([cyan]200k-tokens[/cyan]).",
        rich_help_panel=panel,
    )


def aggregate(panel: str) -> Any:
    """How the scores of several target rows become one order."""
    return typer.Option(
        help="round-robin: each target row in turn takes its best free row; mean: rank by the mean over target rows.",
        metavar="round-robin|mean",
        rich_help_panel=panel,
    )


def duplicates(panel: str) -> Any:
    """What becomes of copies."""
    return typer.Option(
        help="one: keep one copy of exact duplicates; near: also one of near-duplicates; keep: keep all.",
        metavar="one|near|keep",
        rich_help_panel=panel,
    )


def drop_leaks(panel: str) -> Any:
    """What becomes of target rows in the pool."""
    return typer.Option(
        "--drop-leaks/--keep-leaks", help="Leave out pool rows that are target rows.", rich_help_panel=panel
    )


def drop_flagged(panel: str) -> Any:
    """What becomes of rows with a high loss."""
    return typer.Option(
        "--drop-flagged/--keep-flagged",
        help="Leave out rows whose own loss is unusually high; some of them have wrong answers.",
        rich_help_panel=panel,
    )


def projection_dim(panel: str) -> Any:
    """How far gradients are compressed."""
    return typer.Option(
        help="Numbers per row after projection; for factorized: per side of each layer.", rich_help_panel=panel
    )


def tune(panel: str) -> Any:
    """What is trained."""
    return typer.Option(
        help="lora: a fresh adapter, or the one that MODEL is; full: all weights.",
        metavar="lora|full",
        rich_help_panel=panel,
    )


def lora_rank(panel: str) -> Any:
    """The adapter's rank."""
    return typer.Option(help="Rank of the fresh adapter; 16 when left out.", rich_help_panel=panel)


def lora_alpha(panel: str) -> Any:
    """The adapter's scale."""
    return typer.Option(help="LoRA's scale is this over the rank; twice the rank when left out.", rich_help_panel=panel)


def lora_targets(panel: str) -> Any:
    """The adapter's layers."""
    return typer.Option(
        help="Layers that get LoRA, by the end of their names ([cyan]q_proj v_proj[/cyan]); when left out, all linear "
        "layers but the head.",
        metavar="NAME...",
        rich_help_panel=panel,
        show_default=False,
    )


def learning_rate(panel: str) -> Any:
    """Of training."""
    return typer.Option(
        help="Peak learning rate; when left out, 2e-4 with LoRA and 2e-5 without.", rich_help_panel=panel
    )


def warmup_share(panel: str) -> Any:
    """Of training."""
    return typer.Option(help="Share of the updates over which the learning rate rises.", rich_help_panel=panel)


def weight_decay(panel: str) -> Any:
    """Of training."""
    return typer.Option(help="Decoupled weight decay, as in AdamW.", rich_help_panel=panel)


def clip(panel: str) -> Any:
    """Of training."""
    return typer.Option(help="Gradients of an update are clipped to this norm (0: not clipped).", rich_help_panel=panel)
