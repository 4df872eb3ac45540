"""The wheel holds what users need, declares what it imports, and works where nothing else is installed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from built_distribution import ROOT, build, canonical, closure, environment_with, wheel_metadata
from tiny_run import make_run

SOURCES = sorted((ROOT / "src").rglob("*.py"))
UNWANTED = {"torchvision", "torchaudio", "bitsandbytes", "trl", "llm", "llama-cpp-python", "tensorflow", "jax"}
# What came after Python 3.10 under names that a parser for 3.10 lets through.
AFTER_3_10 = {
    ("enum", "StrEnum"),
    ("typing", "Self"),
    ("typing", "LiteralString"),
    ("typing", "Never"),
    ("typing", "assert_never"),
    ("typing", "assert_type"),
    ("typing", "override"),
    ("typing", "Unpack"),
    ("typing", "NotRequired"),
    ("typing", "Required"),
    ("datetime", "UTC"),
    ("contextlib", "chdir"),
    ("itertools", "batched"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, Path]) -> Path:
    return built[1]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the wheel, what its metadata asks for, and nothing else."""
    needed = closure(wheel_metadata(wheel).get_all("Requires-Dist") or [])
    return environment_with(wheel, needed.values(), tmp_path_factory.mktemp("environment") / "venv")


def run(*command: str | Path) -> str:
    """What the command prints, started outside the checkout and without its Python settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "tamis").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "tamis/py.typed" in package
    assert {name for name in package if name.startswith("tamis/report/templates/")}, "the report's template is missing"
    assert package <= names
    others = {name for name in names - package if not re.match(r"tamis-[^/]+\.dist-info/", name)}
    assert not others
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_tests_demo_and_documents(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in (
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"),
        *("examples/demo/run.py", "examples/demo/data/pool.jsonl", "examples/demo/texts/target.txt"),
        *("tests/built_distribution.py", "docs/quickstart.md", "src/tamis/py.typed"),
    ):
        assert wanted in names, wanted
    assert not [name for name in names if "__pycache__" in name or name.startswith(("demo-out", ".venv"))]


def test_metadata_names_version_licence_and_pythons(wheel: Path) -> None:
    about = wheel_metadata(wheel)
    assert about["Name"] == "tamis"
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"
    assert f'__version__ = "{about["Version"]}"' in (ROOT / "src/tamis/__init__.py").read_text(encoding="utf-8")
    assert f"## [{about['Version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_third_party_import_is_a_declared_dependency(wheel: Path) -> None:
    stated = [re.match(r"[A-Za-z0-9_.-]+", text) for text in wheel_metadata(wheel).get_all("Requires-Dist") or []]
    declared = {canonical(match[0]) for match in stated if match}
    provides = metadata.packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SOURCES
        for module in imported_modules(path)
        if module not in sys.stdlib_module_names
        and module != "tamis"
        and not {canonical(name) for name in provides.get(module, [module])} & declared
    }
    assert not undeclared


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_every_declared_dependency_is_imported(wheel: Path) -> None:
    provides = metadata.packages_distributions()
    modules = {module for path in SOURCES for module in imported_modules(path)}
    used = {canonical(name) for module in modules for name in provides.get(module, [module])}
    # Not imported by name: Transformers loads models through Accelerate's device map and GGUF files through gguf.
    indirect = {"accelerate", "gguf"}
    stated = {
        canonical(re.match(r"[A-Za-z0-9_.-]+", text)[0])  # type: ignore[index]  # every requirement starts with a name
        for text in wheel_metadata(wheel).get_all("Requires-Dist") or []
    }
    assert stated - used - indirect == set()


@pytest.mark.parametrize("extras", [(), ("gguf",)], ids=["plain", "with gguf"])
def test_dependencies_bring_no_second_torch_and_no_trainer(wheel: Path, extras: tuple[str, ...]) -> None:
    needed = closure(wheel_metadata(wheel).get_all("Requires-Dist") or [], extras or ("",))
    assert "torch" in needed and "transformers" in needed
    assert needed.keys() & UNWANTED == set()


def test_every_module_imports_where_only_declared_dependencies_exist(python: Path) -> None:
    code = """
import importlib, json, pkgutil, tamis
names = [m.name for m in pkgutil.walk_packages(tamis.__path__, "tamis.") if not m.name.endswith("__main__")]
for name in names: importlib.import_module(name)
print(json.dumps([tamis.__file__, len(names)]))
"""
    place, count = json.loads(run(python, "-c", code).splitlines()[-1])
    assert str(python.parents[1]) in place  # the wheel's, not this checkout's
    assert count > 20


def test_command_answers_from_the_installed_wheel(python: Path, wheel: Path) -> None:
    command = python.parent / "tamis"
    for verb in ("select", "doctor", "plan"):
        assert verb in run(command, "--help")
        assert "--pool" in run(command, verb, "--help")
    assert run(command, "--version") == run(python, "-m", "tamis", "--version") != ""
    assert wheel_metadata(wheel)["Version"] in run(command, "--version")


def test_selection_runs_where_only_declared_dependencies_exist(python: Path, tmp_path: Path) -> None:
    tiny = make_run(tmp_path / "data", rows=24)
    out = tmp_path / "out"
    files = ("--model", tiny.model, "--pool", tiny.pool, "--target", tiny.target, "--out", out)
    summary = json.loads(run(python, "-m", "tamis", "select", *files, "--budget", "5", "--json").splitlines()[-1])
    assert summary["selected_rows"] == 5
    assert (out / "report.html").is_file() and (out / "manifest.json").is_file()


def test_importing_the_package_does_not_import_what_only_some_verbs_need(python: Path) -> None:
    loaded = json.loads(run(python, "-c", "import json, sys, tamis; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"trl", "plotly", "datasets", "datasketch", "peft", "transformers", "scipy", "playwright"}
    assert heavy & set(loaded) == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_sources_are_python_3_10(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    too_new = set(names_used(tree)) & AFTER_3_10
    assert not too_new
    assert not {name for name in imported_modules(path) if name == "tomllib"}


def names_used(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TAMIS_SLOW_TESTS") != "1", reason="downloads; set TAMIS_SLOW_TESTS=1 to run it")
def test_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    run(*pip, "torch")  # first and alone, as the README says
    run(*pip, f"{wheel}[gguf]")
    installed = {canonical(entry["name"]) for entry in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert installed & UNWANTED == set()
    assert "select" in run(python.parent / "tamis", "--help")
