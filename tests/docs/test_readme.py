"""What the README and docs/ show can be typed: commands parse, code compiles, names, files and fields exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import tamis
import tamis.methods
import tamis.online
from tamis.cli import main as cli
from tamis.notation import METHOD_SUMMARIES, ONLINE_SUMMARIES, PROJECTION_NAMES
from tamis.settings import CompareSettings, ProxySettings, SelectSettings, TrainRunSettings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PUBLIC = {
    *("select", "doctor", "plan", "train", "compare", "proxy", "attribute", "verify", "methods", "embeddings"),
    *("OnlineTrainer", "OnlineSFTTrainer", "online", "errors"),
    *("CompareSettings", "CompareResult", "PlantedResult", "DoctorResult", "PlanResult"),
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


SETTINGS = {"select": SelectSettings, "train": TrainRunSettings, "compare": CompareSettings, "proxy": ProxySettings}


@pytest.mark.parametrize("words", [words for words in command_lines() if words.values[0][0] in SETTINGS])
def test_commands_in_the_documents_state_settings_that_are_accepted(words: list[str]) -> None:
    """The settings classes check what the parser does not: methods, budgets, shortlists, shares."""
    from tamis.cli.command import typed_flags
    from tamis.cli.config import merge_settings

    context = command_of(words[0]).make_context("tamis", list(words[1:]))
    flags = typed_flags(context)
    if context.params.get("config"):
        return  # settings of a run that the reader has made
    merge_settings(SETTINGS[words[0]], flags, None)


def test_the_quickstart_is_three_commands_from_two_files_to_a_verdict() -> None:
    first = CODE.search(TEXTS["docs/quickstart.md"])
    assert first is not None
    lines = [shlex.split(line) for line in first[2].splitlines()]
    assert [words[1] for words in lines] == ["select", "train", "compare"]
    given = {word for words in lines for word in words if word.endswith(".jsonl")}
    made = f"{lines[0][-1]}/selected.jsonl"
    assert given - {made} == {"pool.jsonl", "target.jsonl"} and made in lines[1]


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


HEADING = re.compile(r"^#+ (?:Online: )?`([^`]+)`.*$", re.MULTILINE)


def method_sections(*, online: bool) -> dict[str, str]:
    """The part of a page under ``docs/methods`` that is about one method: under its name as a heading."""
    found: dict[str, str] = {}
    for name, text in TEXTS.items():
        if not name.startswith("docs/methods/") or name.startswith("docs/methods/online-") != online:
            continue
        headings = [match for match in HEADING.finditer(text) if " and `" not in match[0] and ", `" not in match[0]]
        for match, following in zip(headings, [*headings[1:], None], strict=False):  # the last has none after it
            assert match[1] not in found, f"{match[1]} has two sections"
            found[match[1]] = text[match.start() : following.start() if following else None]
    return found


@pytest.mark.parametrize("online", [False, True])
def test_every_method_has_a_section_that_says_what_a_user_has_to_know(online: bool) -> None:
    sections = method_sections(online=online)
    methods = tamis.online.METHODS if online else tamis.methods.METHODS
    assert sorted(sections) == sorted(ONLINE_SUMMARIES if online else METHOD_SUMMARIES) == sorted(methods)
    for name, method in methods.items():
        page = next(text for text in TEXTS.values() if sections[name] in text and "# " in text)
        assert f"tamis.{'online' if online else 'methods'}.{method.__name__}`" in sections[name], name
        assert f"<!-- generated: {'online-' if online else ''}settings {name} -->" in sections[name]
        for said in ("**When.**", "Cost", "iagnos"):
            assert said in page or (said in ("Cost", "iagnos") and name in ("uniform", "length")), f"{name}: {said}"


@pytest.mark.parametrize("online", [False, True])
def test_settings_named_in_the_section_of_a_method_belong_to_it(online: bool) -> None:
    methods = tamis.online.METHODS if online else tamis.methods.METHODS
    for name, section in method_sections(online=online).items():
        known = {field.name for field in dataclasses.fields(methods[name])} | {"preset"}
        for setting in re.findall(r"--set \"?(\w+)=", section):
            assert setting in known, f"{name} has no setting {setting}"


def test_generated_parts_of_the_pages_are_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate_tables", ROOT / "docs" / "generate_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in TEXTS.items():
        assert module.fill(text) == text, f"{name} is stale: run `python docs/generate_tables.py`"


def test_every_projection_is_described() -> None:
    for name in PROJECTION_NAMES:
        assert f"`{name}`" in TEXTS["docs/faithfulness.md"] or f"--projection {name}" in TEXTS["docs/faithfulness.md"]


def test_public_face_is_exactly_all() -> None:
    assert set(tamis.__all__) == set(dir(tamis)) == PUBLIC
    assert len(tamis.__all__) == len(PUBLIC)
    rooms = {"embeddings", "errors", "methods", "online"}
    assert all(callable(getattr(tamis, name)) for name in PUBLIC - rooms - {"__version__"})
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
