"""Every preset and baseline by the same command, and every kind of selection through what it built."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tamis
from tamis.cli.main import run as tamis_command
from tamis.errors import InvalidInput, InvalidSettings
from tamis.model.load import ModelSettings, load_model
from tamis.model.low_rank_linear import low_rank_layers
from tamis.notation import PROXY_SUMMARIES
from tamis.proxies.decompose import decompose
from tiny_run import TinyRun, make_run, save_model

MEASURING = ["--held-out-rows", "20", "--no-sweep", "--projection-dim", "8", "--device", "cpu", "--no-report"]
PROBING = ["--probe-rows", "8"]
TOKENS = ["--probe-tokens", "64"]
TRAINING = ["--steps", "2", "--measure-steps", "2", "--update-rows", "2", "--validation-rows", "8"]


@dataclass(frozen=True)
class Case:
    """What is typed after a preset's name, and what must come of it."""

    typed: tuple[str, ...]
    factors: int  # layers in factors that the folder loads with
    blocks: int | None  # of the model in the folder; None: no model is in it
    says: str  # in the report's notes, settings or advice


CASES = {
    "default": Case((*PROBING, *TOKENS, *TRAINING), 14, 2, '"objective": "kl"'),
    "ipsvd": Case((*PROBING, *TOKENS, *TRAINING), 14, 2, '"objective": "kl"'),
    "activation": Case((*PROBING, *TOKENS, *TRAINING), 14, 2, '"objective": "kl"'),
    "svd": Case((*PROBING, *TRAINING), 14, 2, '"objective": "kl"'),
    "paper": Case((*PROBING, *TOKENS, *TRAINING), 14, 2, "control: outputs alone"),
    "layer-extraction": Case(tuple(PROBING), 0, 1, "Blocks kept: 1 of 2"),
    "sibling": Case((), 0, 2, '"sparsity": null'),
    "influence-scorer": Case(("--steps", "20", "--update-rows", "2"), 0, None, "The head was fitted to"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), rows=120)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("small") / "model", seed=3, hidden=16)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def typed(run: TinyRun, preset: str, out: Path, *, sibling: Path | None = None) -> list[str]:
    """The whole command."""
    words = ["proxy", "--model", str(run.model), "--pool", str(run.pool), "--target", str(run.target)]
    words += ["--preset", preset, "--out", str(out), *MEASURING, *CASES[preset].typed]
    return words + (["--sibling", str(sibling)] if preset in ("sibling", "influence-scorer") else [])


def test_the_table_has_every_preset() -> None:
    assert set(CASES) == set(PROXY_SUMMARIES)


@pytest.mark.parametrize("preset", list(PROXY_SUMMARIES))
def test_every_preset_is_built_by_the_command(
    run: TinyRun, small: Path, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, case = tmp_path / "proxy", CASES[preset]
    assert tamis_command([*typed(run, preset, out, sibling=small), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["preset"] == preset and printed["proxy"] == str(out) and printed["advice"]
    text = (out / "retention.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert case.says in text and found["preset"] == preset
    spearman = found["final"]["agreement"]["spearman"]
    assert -1 <= spearman["low"] <= spearman["value"] <= spearman["high"] <= 1
    assert found["cost"]["params_proxy"] < found["cost"]["params_full"]
    assert not (out / "store").exists()
    if case.blocks is None:
        with pytest.raises(InvalidInput, match=r"has no config\.json"):
            load_model(ModelSettings(name=str(out), device="cpu"))
        table = pq.read_table(out / "scores.parquet")
        assert table.column_names == ["row", "id", "score:target"] and table.num_rows == 120
        best = np.argsort(-table["score:target"].to_numpy(), kind="stable")[:10]
        assert np.isin(table["row"].to_numpy()[best], [*run.relevant, 118]).mean() > 0.5
        return
    model: Any = load_model(ModelSettings(name=str(out), device="cpu")).model
    assert len(low_rank_layers(model)) == case.factors and model.config.num_hidden_layers == case.blocks


@pytest.fixture(scope="module")
def proxies(run: TinyRun, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a preset, built once."""
    made: dict[str, Path] = {}

    def of(preset: str) -> Path:
        if preset not in made:
            made[preset] = tmp_path_factory.mktemp("proxies") / preset
            assert tamis_command([*typed(run, preset, made[preset], sibling=small), "--quiet"]) == 0
        return made[preset]

    return of


METHODS: dict[str, dict[str, str]] = {
    "tracin": {},
    "less": {"lora_rank": "2", "warmup_epochs": "1"},
    "influence-distillation": {"landmarks": "16"},
    "rds+": {},
}


@pytest.mark.parametrize("preset", ["default", "layer-extraction", "sibling"])
@pytest.mark.parametrize("method", list(METHODS))
def test_methods_select_through_a_proxy_by_the_command(
    run: TinyRun, proxies: Callable[[str], Path], preset: str, method: str, tmp_path: Path
) -> None:
    words = ["select", "--model", str(proxies(preset)), "--pool", str(run.pool), "--target", str(run.target)]
    words += ["--method", method, "--budget", "10", "--device", "cpu", "--quiet", "--no-report"]
    for name, value in METHODS[method].items():
        words += ["--set", f"{name}={value}"]
    assert tamis_command([*words, "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    if method != "influence-distillation":  # 16 landmarks on a random model are no promise of a ranking
        assert sum(row["source"] == "sums" for row in rows) > 5  # a fifth of the pool is, and the target asks for them
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["models"][0]["class"] == "LlamaForCausalLMProxy"


def test_a_refused_build_leaves_the_folder_free_and_its_factors_to_the_next(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, factored = tmp_path / "proxy", list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        missing = len(args[1]) - len(list(options["folder"].glob("*.safetensors")))
        factored.append(missing)
        return decompose(*args, **options)

    monkeypatch.setattr("tamis.proxies.build.decompose", counted)
    words = [*typed(run, "default", out), "--quiet"]
    assert tamis_command([*words, "--learning-rate", "1e30"]) != 0  # diverges, with all factors found
    assert sorted(entry.name for entry in out.iterdir()) == ["store"]
    assert tamis_command([*words, "--learning-rate", "1e-3"]) == 0
    assert factored == [14, 0]
    assert tamis_command([*typed(run, "default", tmp_path / "at-once"), "--quiet", "--learning-rate", "1e-3"]) == 0
    for name in ("model.safetensors", "config.json", "proxy.json"):
        assert (out / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes(), name


def test_factors_of_other_settings_are_not_taken(run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "proxy"
    words = [*typed(run, "default", out), "--quiet"]
    assert tamis_command([*words, "--learning-rate", "1e30"]) != 0
    assert tamis_command([*words, "--damping-output", "0.5"]) == 0
    assert tamis_command([*typed(run, "default", tmp_path / "at-once"), "--quiet", "--damping-output", "0.5"]) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "at-once" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("preset", ["sibling", "influence-scorer"])
def test_a_refused_baseline_leaves_the_folder_free(
    run: TinyRun, small: Path, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "proxy"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in run.pool.read_text().splitlines()[:12]), encoding="utf-8")
    words = [*typed(run, preset, out, sibling=small), "--quiet"]
    wrong = [str(few) if word == str(run.pool) else word for word in words]
    assert tamis_command(wrong) != 0
    assert "give at least 40" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    assert tamis_command(words) == 0


def test_another_runs_claim_is_not_given_up(tmp_path: Path) -> None:
    from tamis.runs.outputs import claim_folder, free_claim

    claim_folder(tmp_path / "out", {"verb": "proxy", "seed": 1})
    free_claim(tmp_path / "out", {"verb": "proxy", "seed": 2})
    assert (tmp_path / "out" / "identity.json").exists()
    free_claim(tmp_path / "out", {"verb": "proxy", "seed": 1})
    assert not (tmp_path / "out" / "identity.json").exists()


def test_a_head_learns_scores_for_a_target_only(run: TinyRun, small: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="learns the scores for a target; pass --target"):
        tamis.proxy(model=run.model, pool=run.pool, preset="influence-scorer", sibling=small, out=tmp_path / "y")
