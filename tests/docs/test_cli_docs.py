"""The command reference is what the commands say, and every command and flag says something."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import typer

from tamis.cli.main import app

ROOT = Path(__file__).parents[2]
GROUP: Any = typer.main.get_command(app)
COMMANDS = dict(GROUP.commands)


def generated_page() -> str:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text: str = module.page()
    return text


def test_the_reference_page_is_what_the_commands_say() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generated_page(), "run `python docs/generate_cli.py`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_examples(name: str) -> None:
    command = COMMANDS[name]
    assert command.help and len(command.help) > 40
    assert "Examples" in command.epilog and f"tamis {name}" in command.epilog


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_help_and_belongs_to_a_group(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"--{parameter.name} of {name} has no help"
        assert parameter.rich_help_panel, f"--{parameter.name} of {name} stands in no group"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_takes_config_quiet_and_json(name: str) -> None:
    flags = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    wanted = (
        {"--quiet", "--json"} if name == "report" else {"--config", "--quiet", "--json"}
    )  # a report has no settings
    assert wanted <= flags


@pytest.mark.parametrize(
    ("name", "is_pooled"), [("select", False), ("train", True), ("attribute", True), ("verify", True)]
)
def test_help_says_whether_several_targets_are_one(name: str, is_pooled: bool) -> None:
    helps = {parameter.name: parameter.help for parameter in COMMANDS[name].params}
    assert ("outweighs" in helps["target"]) == is_pooled
    assert ("each TARGET is one task" in helps["target"]) == (not is_pooled)
