"""The demo's script runs every method to its table and its reports; here with a tiny model, not the packaged one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tiny_run import save_model

DEMO = Path(__file__).parents[2] / "examples" / "demo"
METHODS = ("uniform", "length", "bm25", "tracin", "less")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_run", DEMO / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_run"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def run_demo(model: Path, out: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(DEMO / "run.py"), "--model", str(model), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def outcomes(printed: str) -> dict[str, list[str]]:
    """Method -> what the table says of it."""
    table = printed[printed.index("The 40 rows") :]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    return {name: rest for name, *rest in cells}


@pytest.mark.slow
def test_demo_prints_what_each_method_took_and_writes_its_reports(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", hidden=16)
    printed = run_demo(model, tmp_path / "out")
    found = outcomes(printed)
    assert set(found) == set(METHODS)
    for precision, _, _, _, above_rest, _ in found.values():
        assert 0 <= float(precision) <= 1 and 0 <= float(above_rest) <= 1
    for method in METHODS:
        selected = (tmp_path / "out" / method / "selected.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(selected) == 40
        assert {"id", "source", "messages", "planted", "_tamis"} <= set(json.loads(selected[0]))
    for method in ("tracin", "less"):
        assert str(tmp_path / "out" / method / "report.html") in printed
        assert (tmp_path / "out" / method / "report.html").stat().st_size > 10_000


def test_judging_counts_a_copy_for_its_original_once(script: ModuleType) -> None:
    planted = {
        "a": {"planted": "relevant"},
        "a-again": {"planted": "duplicate", "copy_of": "a"},
        "b": {"planted": "relevant"},
        "c": {"planted": "corrupted"},
        "d": {"planted": "look-alike"},
    }
    scores = {"a": 3.0, "a-again": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}
    outcome = script.judge(["a-again", "a", "c"], scores, planted)
    assert (outcome.relevant, outcome.corrupted, outcome.look_alike, outcome.copies) == (1, 1, 0, 1)
    # a and its copy beat both others (4 of 4), b ties with d and loses to c (½ of 2).
    assert outcome.above_rest == pytest.approx(4.5 / 6)


def test_demo_says_how_to_get_its_model(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is missing: run 'make demo'"):
        script.find_model()
