"""Whose the --out folder is: a run that computed nothing leaves it free, one that did keeps it; cheap checks first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tamis
from tamis.cli.main import run as run_command
from tamis.errors import InvalidInput, InvalidSettings
from tamis.runs import select as pipeline
from tamis.runs.outputs import check_claim, claim_folder
from tiny_run import TinyRun, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), rows=30)


def select(run: TinyRun, out: Path, **settings: Any) -> tamis.Selection:
    values = {"model": run.model, "pool": run.pool, "target": run.target, "budget": 5, "out": out}
    return tamis.select(**{**values, **settings})


def test_a_folder_whose_run_failed_before_it_computed_is_taken_by_the_corrected_run(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise InvalidInput("the model does not fit")

    with monkeypatch.context() as patch:
        patch.setattr("tamis.collect.load_model", no_memory)
        with pytest.raises(InvalidInput, match="does not fit"):
            select(run, tmp_path / "out", dtype="float64")
    assert list((tmp_path / "out" / "store").glob("tokens-pool-*/shard-*")), "the run failed before the tokens"
    assert len(select(run, tmp_path / "out", dtype="float32")) == 5
    assert json.loads((tmp_path / "out" / "identity.json").read_text())["settings"]["dtype"] == "float32"
    assert "dtype: float32" in (tmp_path / "out" / "run.yaml").read_text()


@pytest.mark.parametrize("left", ["store/features-pool-1/shard-00000.safetensors", "selected.jsonl", "manifest.json"])
def test_a_folder_with_computed_work_is_kept_for_its_run(tmp_path: Path, left: str) -> None:
    claim_folder(tmp_path / "out", {"seed": 0})
    for name in ("store/tokens-pool-1/shard-00000.safetensors", "store/features-pool-1/plan.json"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("x")
    claim_folder(tmp_path / "out", {"seed": 1})  # tokens and plans are no work of a model
    (tmp_path / "out" / left).write_text("x")
    with pytest.raises(InvalidSettings, match="holds another run: seed was 1 there and is 2 now"):
        claim_folder(tmp_path / "out", {"seed": 2})
    claim_folder(tmp_path / "out", {"seed": 1})


@pytest.mark.parametrize(
    ("own", "holds"), [({"verb": "verify"}, "`tamis verify`"), ({}, "another command")], ids=["named", "unnamed"]
)
def test_a_folder_of_another_verb_is_refused_as_such(tmp_path: Path, own: dict[str, str], holds: str) -> None:
    claim_folder(tmp_path, {"settings": {"seed": 0}, **own})
    (tmp_path / "manifest.json").write_text("x")
    with pytest.raises(InvalidSettings, match=f"holds a result of {holds}; choose another --out, or delete the folder"):
        claim_folder(tmp_path, {"settings": {"curvature": "exact", "seed": 0}, "verb": "attribute"})


def test_a_run_whose_folder_was_claimed_by_another_writes_nothing(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"seed": 0})
    check_claim(tmp_path, {"seed": 0})
    claim_folder(tmp_path, {"seed": 1})
    with pytest.raises(InvalidSettings, match="claimed by another run while this one worked"):
        check_claim(tmp_path, {"seed": 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused_before_anything_is_read_or_hashed(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model_fingerprint", "read_sources"):
        monkeypatch.setattr(pipeline, name, lambda *_: pytest.fail("work was done"))
    with pytest.raises(InvalidSettings, match="device 'cuda' is not available here"):
        select(run, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read_or_hashed(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    monkeypatch.setattr(pipeline, "model_fingerprint", lambda *_: pytest.fail("work was done"))
    for setting in ("out", "store"):
        with pytest.raises(InvalidInput, match=r"/proc/foo: .*no folder can be made there; choose another one"):
            select(run, **{"out": tmp_path / "out", setting: "/proc/foo"})


def test_dropping_leaks_that_are_the_whole_pool_is_refused_before_scoring(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tamis.collect.load_model", lambda settings: pytest.fail("the model was loaded"))
    with pytest.raises(InvalidSettings, match=r"--drop-leaks leaves no row .* all 30 usable rows .*--keep-leaks"):
        select(run, tmp_path / "out", target=run.pool, drop_leaks=True)


def test_warnings_of_the_method_and_of_the_budget_reach_console_json_and_selection(
    run: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(run.model), "--pool", str(run.pool), "--target", str(run.target), "--budget", "100%"]
    words += ["--set", "normalize=dot", "--json", "--out", str(tmp_path / "out")]
    assert run_command(["select", *words]) == 0
    printed = json.loads(capfd.readouterr().out)["warnings"]
    assert any("tracin ran with the plain inner product" in warning for warning in printed)
    assert any(warning.startswith("The budget was not spent. 28 rows were selected") for warning in printed)
    assert run_command(["select", "--quiet", *words[:-3], *words[-2:]]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "warning: About the run. tracin ran with the plain inner product" in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["warnings"] == printed
    assert not any("plain inner product" in note for note in manifest["notes"])
