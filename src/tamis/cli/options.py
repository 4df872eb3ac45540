"""The flags that several verbs share, worded once.

Choices are checked by the settings classes, not by the parser: their errors also serve YAML files and Python, and
suggest the nearest name.
"""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "WHAT",
    "Attention",
    "BatchTokens",
    "ChatTemplate",
    "Config",
    "Device",
    "DeviceMap",
    "Dtype",
    "GradientCheckpointing",
    "JsonOutput",
    "MaxLength",
    "Model",
    "OnBadRow",
    "Pool",
    "Quiet",
    "Revision",
    "RowFormat",
    "Seed",
    "Target",
    "TrustRemoteCode",
]

WHAT, MODEL, DATA, RUN = "What to work on", "The model", "Reading the data", "Running"

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
        help="Rows that stand for the task to help, in the same formats; each TARGET is one task. "
        "NAME=PATH names it (else: the file's stem).",
        metavar="TARGET...",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
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
    typer.Option(help="Tokens after which a row is cut; what was cut is reported.", rich_help_panel=DATA),
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
    typer.Option(help="fail, or skip (skipped rows are listed in a file).", metavar="fail|skip", rich_help_panel=DATA),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(help="Padded tokens per forward pass; chosen for the device when left out.", rich_help_panel=RUN),
]
Seed = Annotated[int, typer.Option(help="Root of all randomness.", rich_help_panel=RUN)]
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
