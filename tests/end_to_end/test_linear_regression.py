"""The example of robust weights runs on images of anybody's, and robust weights find the real rows among impostors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "linear_regression" / "run.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def example() -> ModuleType:
    """The script as a module: nothing runs, and its libraries are loaded once."""
    spec = importlib.util.spec_from_file_location("linear_regression_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_robust_weights_are_on_real_rows_and_unconstrained_ones_are_not(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    patterns = random.uniform(0, 255, (2, 8, 8))
    labels = random.integers(0, 2, 800)
    images = np.clip(patterns[labels] + random.normal(0, 60, (800, 8, 8)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, y_train=labels)
    done = run("--data", str(tmp_path / "images.npz"), "--steps", "20", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = {row["weights"]: row for row in json.loads((tmp_path / "out" / "numbers.json").read_text(encoding="utf-8"))}
    assert rows["equal"]["share_on_real_rows"] == 0.5
    assert rows["unconstrained"]["negative"] > 100
    robust = rows["robust, λ = 1"]
    assert robust["negative"] == 0 and robust["gap"] < 1e-7 and robust["share_on_real_rows"] > 0.8
    assert robust["loss_after_1_step"] < rows["equal"]["loss_after_1_step"]
    page = (tmp_path / "out" / "weights.html").read_text(encoding="utf-8")
    assert "Unconstrained weights" in page and 'src="http' not in page


@pytest.mark.parametrize(("stored", "said"), [({"x_train": np.zeros((9, 4))}, "y_train"), (None, "cannot be used")])
def test_a_file_that_will_not_do_is_refused_with_what_is_needed(tmp_path: Path, stored: dict | None, said: str) -> None:
    path = tmp_path / "images.npz"
    if stored is not None:
        np.savez(path, **stored)
    with pytest.raises(SystemExit) as refusal:
        example().problem_from(path, (0, 1), 0)
    assert said in str(refusal.value) and "x_train (rows first" in str(refusal.value)
