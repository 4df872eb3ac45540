"""What the README and docs/ show can be typed: commands parse, code compiles, names, files and fields exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import tamis
import tamis.methods
from tamis.cli import main as cli
from tamis.notation import METHOD_SUMMARIES, PROJECTION_NAMES
from tamis.settings import SelectSettings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PUBLIC = {
    *("select", "doctor", "plan", "train", "compare", "proxy", "attribute", "verify", "methods"),
    *("OnlineTrainer", "OnlineSFTTrainer", "online"),
    *("CompareSettings", "CompareResult", "PlantedResult"),
    *("SelectSettings", "DoctorSettings", "PlanSettings", "TrainRunSettings", "ProxySettings"),
    *("AttributeSettings", "VerifySettings", "TrajectoryRecorder", "Attribution", "Verification"),
    *("Selection", "TrainResult", "ProxyResult", "TamisError", "__version__"),
}


def blocks(*languages: str) -> list[Any]:
    """Every code block of these languages in the README and in docs/, with a name for the test's report."""
    found = []
    for name, text in TEXTS.items():
        for number, match in enumerate(CODE.finditer(text), start=1):
            if match[1] in languages:
                found.append(pytest.param(match[2], id=f"{name}:{number}"))
    return found


def command_lines() -> list[Any]:
    """Every line that starts the command, also behind a launcher."""
    found = []
    for block in blocks("", "bash", "sh", "console"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if "tamis" in words and words[0] in ("tamis", "accelerate", "torchrun"):
                found.append(pytest.param(words[words.index("tamis") + 1 :], id=f"{block.id} {' '.join(words)[:60]}"))
    return found


def command_of(verb: str) -> Any:
    group = typer.main.get_command(cli.app)
    return group.commands[verb]  # type: ignore[attr-defined]  # a Typer app with several commands is a group


@pytest.mark.parametrize("words", command_lines())
def test_commands_in_the_documents_parse(words: list[str]) -> None:
    if words[0].startswith("-") or words[0] == "VERB":
        return
    context = command_of(words[0]).make_context("tamis", list(words[1:]), resilient_parsing=False)
    assert context.params


@pytest.mark.parametrize("words", [words for words in command_lines() if "select" in words.values[0]])
def test_select_commands_state_settings_that_are_accepted(words: list[str]) -> None:
    """The settings classes check what the parser does not: methods, budgets, shortlists, shares."""
    from tamis.cli.command import typed_flags
    from tamis.cli.config import merge_settings

    context = command_of("select").make_context("tamis", list(words[1:]))
    flags = typed_flags(context)
    if context.params.get("config"):
        return  # settings of a run that the reader has made
    merge_settings(SelectSettings, flags, None)


def test_documents_show_the_three_verbs() -> None:
    shown = {words.values[0][0] for words in command_lines()}
    assert {"select", "doctor", "plan"} <= shown


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_documents_compiles_and_uses_public_names(code: str) -> None:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tamis":
            assert node.attr in tamis.__all__
        if isinstance(node, ast.Call):
            check_call(node)


def check_call(node: ast.Call) -> None:
    """Keyword arguments of ``tamis.select`` and of method classes are ones that they take."""
    name = ast.unparse(node.func)
    given = {keyword.arg for keyword in node.keywords}
    if name == "tamis.select":
        assert given <= {field.name for field in dataclasses.fields(SelectSettings)} | {"progress"}
        assert given >= {"model", "pool", "target"}
    if name.startswith("tamis.methods."):
        method = getattr(tamis.methods, name.rpartition(".")[2])
        assert given <= {field.name for field in dataclasses.fields(method)}


@pytest.mark.parametrize("code", blocks("json"))
def test_json_in_the_documents_is_json(code: str) -> None:
    import json

    for line in code.splitlines():
        json.loads(line)


@pytest.mark.parametrize("name", TEXTS)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# A script of this repository with its arguments, over continued lines.
SCRIPT_RUN = re.compile(r"python ((?:benchmarks|examples)/[\w/]+\.py)((?:[^\n`]*\\\n)*[^\n`]*)")


@pytest.mark.parametrize("name", TEXTS)
def test_flags_in_the_documents_exist(name: str) -> None:
    """Every --flag in running text belongs to a verb, except where another program is spoken of."""
    others = {"--num_processes", "--nproc-per-node", "--version", "--help", "--no-deps", "--constraint"}
    verbs = ("select", "doctor", "plan", "train", "compare", "proxy", "attribute", "verify")
    known = {flag for verb in verbs for flag in flags_of(verb)}
    assert set(FLAG.findall(SCRIPT_RUN.sub("", TEXTS[name]))) - known - others == set()


@pytest.mark.parametrize(
    "run", [run for text in TEXTS.values() for run in SCRIPT_RUN.finditer(text)], ids=lambda run: run[1]
)
def test_flags_of_scripts_in_the_documents_exist(run: re.Match[str]) -> None:
    source = (ROOT / run[1]).read_text(encoding="utf-8")
    missing = [flag for flag in FLAG.findall(run[0]) if f'"{flag}"' not in source]
    assert not missing, f"{run[1]} has no {missing}"


def flags_of(verb: str) -> set[str]:
    return {flag for parameter in command_of(verb).params for flag in [*parameter.opts, *parameter.secondary_opts]}


def test_methods_page_has_a_section_for_every_method_and_only_for_those() -> None:
    headings = re.findall(r"^## `([^`]+)`", TEXTS["docs/methods.md"], re.MULTILINE)
    assert sorted(headings) == sorted(METHOD_SUMMARIES) == sorted(tamis.methods.METHODS)
    for name, method in tamis.methods.METHODS.items():
        section = re.split(r"^## ", TEXTS["docs/methods.md"].split(f"## `{name}`")[1], flags=re.MULTILINE)[0]
        assert f"tamis.methods.{method.__name__}`" in section, f"{name} does not name its class"


def test_settings_named_in_the_methods_page_belong_to_their_method() -> None:
    for section in re.split(r"^## ", TEXTS["docs/methods.md"], flags=re.MULTILINE)[1:]:
        heading = re.match(r"`([^`]+)`", section)
        if heading is None:
            continue
        known = {field.name for field in dataclasses.fields(tamis.methods.METHODS[heading[1]])}
        for setting in re.findall(r"--set \"?(\w+)=", section):
            assert setting in known, f"{heading[1]} has no setting {setting}"


def test_every_projection_is_described() -> None:
    for name in PROJECTION_NAMES:
        assert f"`{name}`" in TEXTS["docs/faithfulness.md"] or f"--projection {name}" in TEXTS["docs/faithfulness.md"]


def test_public_face_is_exactly_all() -> None:
    assert set(tamis.__all__) == set(dir(tamis)) == PUBLIC
    assert len(tamis.__all__) == len(PUBLIC)
    assert all(callable(getattr(tamis, name)) for name in PUBLIC - {"__version__", "methods", "online"})
    assert set(tamis.methods.__all__) == {"METHODS", *(method.__name__ for method in tamis.methods.METHODS.values())}


def test_names_that_are_not_public_are_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="module 'tamis' has no attribute 'selct'"):
        tamis.selct  # noqa: B018


def test_every_verb_has_help_that_names_its_flags() -> None:
    for verb in ("select", "doctor", "plan", "train", "proxy", "compare"):
        result = CliRunner().invoke(cli.app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0
        assert "--model" in result.output
        assert all(parameter.help for parameter in command_of(verb).params if parameter.name != "ctx"), verb
