"""From files to a proxy on disk that any verb takes as a model; killed, repeated, refused, and shown on a page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tamis
from proxy_case import SETTINGS, UNALIGNED
from tamis.cli.main import run as tamis_command
from tamis.errors import InvalidInput, InvalidSettings, StoreCorrupted, Unsupported
from tamis.model.load import ModelSettings, load_model
from tamis.model.low_rank_linear import low_rank_layers
from tamis.model.source import resolve_source
from tamis.runs.report import write_report
from tiny_run import TinyRun, chat, make_run, write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), rows=120)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(run: TinyRun, out: Path, *, base: dict[str, Any] | None = None, **changes: Any) -> tamis.ProxyResult:
    return tamis.proxy(
        **{"model": run.model, "pool": run.pool, "target": run.target, "out": out, **(base or SETTINGS), **changes}
    )


@pytest.fixture(scope="module")
def built(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tamis.ProxyResult:
    return build(run, tmp_path_factory.mktemp("proxy") / "proxy", sweep=True)


def test_a_build_says_what_it_keeps_and_costs(run: TinyRun, built: tamis.ProxyResult) -> None:
    found = built.retention
    final = found["final"]["agreement"]
    assert 0.3 < final["spearman"]["value"] <= 1 and final["spearman"]["low"] <= final["spearman"]["value"]
    assert found["rows"] == {"held_out": 20, "validation": 8, "probe": 8, "align": 8}
    assert found["targets"] == {"target": 4}
    assert 0.4 < found["achieved"] < 0.6 and found["achieved_whole"] < found["achieved"]
    assert found["flops_ratio"] < 0.8 and found["cost"]["params_proxy"] < found["cost"]["params_full"]
    assert [point["sparsity"] for point in found["sweep"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    correlations = [point["kept"]["agreement"]["spearman"]["value"] for point in found["sweep"]]
    assert correlations[0] > correlations[-1]
    assert {entry["name"] for entry in found["others"]} == {
        "before alignment",
        "this proxy, factors",
        "rows by the proxy, targets by the full model",
    }
    assert found["advice"]["sentences"] and found["aligned"]["curve"][0]["step"] == 0
    assert sorted(p.name for p in built.out.iterdir() if p.is_dir()) == []  # what only the build needed is gone


def test_the_folder_is_a_model_to_every_verb(run: TinyRun, built: tamis.ProxyResult, tmp_path: Path) -> None:
    loaded = load_model(ModelSettings(name=str(built.out), device="cpu"))
    assert len(low_rank_layers(loaded.model)) == 14
    selection = tamis.select(
        model=built.out, pool=run.pool, target=run.target, budget=10, out=tmp_path / "tracin", device="cpu"
    )
    relevant = np.isin(selection.order, run.relevant).mean()
    assert len(selection) == 10 and relevant > 0.5  # the planted rows, a fifth of the pool
    assert selection.manifest["models"][0]["class"] == "LlamaForCausalLMProxy"
    states = tamis.select(
        model=built.out, pool=run.pool, target=run.target, method="rds+", budget=5, out=tmp_path / "rds", device="cpu"
    )
    assert len(states) == 5
    plan = tamis.plan(model=built.out, pool=run.pool, target=run.target, device="cpu")
    whole = tamis.plan(model=run.model, pool=run.pool, target=run.target, device="cpu")
    costs = [next(m.tflops for m in each.methods if m.method == "tracin" and not m.shortlist) for each in (plan, whole)]
    assert costs[0] < costs[1]


def test_lora_methods_and_training_run_on_a_proxy(run: TinyRun, built: tamis.ProxyResult, tmp_path: Path) -> None:
    less = tamis.select(
        model=built.out, pool=run.pool, target=run.target, method="less", budget=5, out=tmp_path / "less",
        device="cpu", set={"lora_rank": 2, "warmup_epochs": 1},
    )  # fmt: skip
    assert len(less) == 5
    trained = tamis.train(
        model=built.out, pool=run.pool, target=run.target, steps=2, keep=2, oversample=2, out=tmp_path / "train",
        device="cpu", held_out=0,
    )  # fmt: skip
    whole = tamis.train(
        model=built.out, pool=run.pool, target=run.target, steps=1, keep=2, oversample=2, out=tmp_path / "whole",
        device="cpu", held_out=0, tune="full", method="uniform",
    )  # fmt: skip
    again = load_model(ModelSettings(name=str(whole.model), device="cpu")).model
    before = load_model(ModelSettings(name=str(built.out), device="cpu")).model
    changed = [not torch.equal(p, before.get_parameter(n)) for n, p in again.named_parameters()]
    assert len(low_rank_layers(again)) == 14 and any(changed)
    source = resolve_source(str(trained.model))
    assert source.is_adapter and source.base is not None and source.base.proxy_layout() is not None
    assert low_rank_layers(load_model(ModelSettings(name=str(trained.model), device="cpu")).model)


def test_a_warm_up_of_all_weights_goes_on_from_a_proxy_to_a_proxy(
    run: TinyRun, built: tamis.ProxyResult, tmp_path: Path
) -> None:
    chosen = tamis.select(
        model=built.out, pool=run.pool, target=run.target, method="influence-distillation", budget=5, out=tmp_path,
        device="cpu", set={"warmup": "full", "landmarks": 20},
    )  # fmt: skip
    assert len(chosen) == 5
    first, *_, last = sorted(tmp_path.glob("store/influence-distillation-warm-up-*/step-*"))
    assert len(low_rank_layers(load_model(ModelSettings(name=str(last), device="cpu")).model)) == 14
    weights = (last / "model.safetensors").read_bytes()
    assert first != last
    for path in (last, tmp_path / "scores.parquet"):  # as if killed between the two
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = tamis.select(
        model=built.out, pool=run.pool, target=run.target, method="influence-distillation", budget=5, out=tmp_path,
        device="cpu", set={"warmup": "full", "landmarks": 20},
    )  # fmt: skip
    assert again.table.equals(chosen.table) and (last / "model.safetensors").read_bytes() == weights


def test_two_builds_are_equal_and_a_third_into_the_folder_builds_nothing(
    run: TinyRun, built: tamis.ProxyResult, tmp_path: Path
) -> None:
    again = build(run, tmp_path / "again")  # no sweep: less is stored on the way
    for name in ("model.safetensors", "config.json", "proxy.json"):
        assert (again.out / name).read_bytes() == (built.out / name).read_bytes(), name
    before = (built.out / "retention.json").read_bytes()
    once_more = build(run, built.out, sweep=True)
    assert once_more.was_finished and (built.out / "retention.json").read_bytes() == before
    (built.out / "report.html").unlink()
    config = str(built.out / "run.yaml")
    with pytest.raises(
        InvalidInput, match=f"without a page; `tamis proxy --config {re.escape(config)} --report` writes"
    ):
        write_report(built.out)
    assert tamis_command(["proxy", "--config", config, "--report", "--quiet"]) == 0
    assert write_report(built.out) == built.out / "report.html"
    (built.out / "report.html").unlink()
    easier = build(run, built.out, sweep=True, keep=0.01)
    assert easier.was_finished and easier.retention["advice"]["keep"] == 0.01
    assert "0.01 was wanted" in (built.out / "report.html").read_text() and easier.retention["sweep"]
    build(run, built.out, sweep=True)
    assert (built.out / "retention.json").read_bytes() == before
    with pytest.raises(InvalidSettings, match=r"holds another run: settings\.sparsity was 0\.5 there and is 0\.7 now"):
        build(run, built.out, sweep=True, sparsity=0.7)


def test_a_finished_proxy_that_is_damaged_is_said(run: TinyRun, built: tamis.ProxyResult, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built.out, tmp_path / "out"))
    for name in ("model.safetensors", "config.json", "proxy.json", "retention.json", "manifest.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(StoreCorrupted, match=rf"{name} .*; delete .*manifest\.json and run the same command again"):
            build(run, out, sweep=True)
        (out / name).write_bytes(whole)
    assert build(run, out, sweep=True).was_finished


def test_new_advice_that_was_killed_on_the_way_is_on_the_page_in_the_end(
    run: TinyRun, built: tamis.ProxyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(built.out, tmp_path / "out"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("write_document", "write_json"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"tamis.runs.proxy.{name}", killed)
            build(run, out, sweep=True, keep=0.01)
    build(run, out, sweep=True, keep=0.01)
    assert "0.01 was wanted" in (out / "report.html").read_text()


def test_a_build_killed_at_any_time_ends_in_the_same_bytes(
    run: TinyRun, built: tamis.ProxyResult, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = [f"{k}={v!r}" for k, v in SETTINGS.items()]
    program = (
        f"import tamis; tamis.proxy(model={str(run.model)!r}, pool={str(run.pool)!r}, target={str(run.target)!r}, "
        f"out={str(out)!r}, {', '.join(words)})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (out / "store" / "alignment" / "state.safetensors").exists():
        time.sleep(0.005)
    lost = sorted((out / "store" / "layers").glob("*.safetensors"))[5:9]
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL  # or nothing was tried
    for file in lost:  # as if it had been killed earlier, too
        file.unlink()
    finished = build(run, out)
    for name in ("model.safetensors", "config.json", "proxy.json"):
        assert (finished.out / name).read_bytes() == (built.out / name).read_bytes(), name
    assert not (out / "store").exists()


def test_the_paper_preset_runs_with_its_control_beside(run: TinyRun, tmp_path: Path) -> None:
    found = build(run, tmp_path / "paper", preset="paper", probe_tokens=64, measure_steps=4, sweep=True).retention
    assert found["space"] == "factors" and found["objective"] == "align+kl"
    names = [entry["name"] for entry in found["others"]]
    assert any(name.startswith("control: outputs alone") for name in names) and "this proxy, product" in names
    assert found["control"]["steps"] == 3 * found["aligned"]["steps"]
    assert [point["sparsity"] for point in found["sweep"]] == [0.5, 0.7, 0.9]  # the core form reaches no further
    loaded = load_model(ModelSettings(name=str(tmp_path / "paper"), device="cpu"))
    assert {layer.space for layer in low_rank_layers(loaded.model).values()} == {"factors"}


def test_rows_of_the_pool_stand_in_for_a_target(run: TinyRun, tmp_path: Path) -> None:
    found = build(run, tmp_path / "alone", target=(), target_rows=6, base=UNALIGNED).retention
    assert set(found["targets"]) <= {"sums", "talk", "other sources"} and sum(found["targets"].values()) == 6
    assert "No --target was given" in found["notes"][0] and found["aligned"] is None and not found["sweep"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"sparsity": 1.0}, InvalidSettings, "sparsity=1.0: expected a share above 0 and below 1"),
        ({"preset": "ipsdv"}, InvalidSettings, "expected one of default, ipsvd.*did you mean 'ipsvd'"),
        ({"preset": "sibling"}, InvalidSettings, "pass --sibling MODEL"),
        ({"sibling": "x"}, InvalidSettings, "only the presets sibling and influence-scorer take one"),
        ({"preset": "paper", "probe_rows": 1, "probe_tokens": 2}, InvalidSettings, "has 2 probe tokens.*form=probe"),
        ({"learning_rate": 1e30}, tamis.TamisError, "diverged at step"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_way_out(
    run: TinyRun, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        build(run, tmp_path / "out", **changes)


def test_a_pool_of_too_few_rows_and_a_proxy_of_a_proxy_are_refused(
    run: TinyRun, built: tamis.ProxyResult, tmp_path: Path
) -> None:
    few = write_rows(tmp_path / "few.jsonl", [chat(f"Say {i}", f"{i}") for i in range(12)])
    with pytest.raises(InvalidInput, match=r"the pool has 12 distinct rows .* give at least 40"):
        build(run, tmp_path / "few", pool=few)
    with pytest.raises(InvalidSettings, match="is a proxy already; build from the model that it was made of"):
        build(run, tmp_path / "twice", model=built.out)


def test_target_rows_that_cannot_be_used_are_counted(run: TinyRun, tmp_path: Path) -> None:
    long = chat("Tell me. " * 80, "No.", id="long")  # its answer is cut off
    target = write_rows(tmp_path / "t.jsonl", [*map(json.loads, run.target.read_text().splitlines()), long])
    found = build(run, tmp_path / "proxy", target=target, max_length=256, base=UNALIGNED)
    assert found.retention["targets"] == {"t": 4}
    assert "1 of the 5 rows of target 't' have no supervised token" in found.retention["notes"][0]


def test_an_adapter_is_merged(run: TinyRun, tmp_path: Path) -> None:
    from tamis.training.lora import add_lora

    base = load_model(ModelSettings(name=str(run.model), device="cpu")).model
    adapted = add_lora(base, rank=2, alpha=4, seed=0, base=str(run.model))
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if ".lora_B." in name:
                param.normal_(generator=torch.Generator().manual_seed(0), std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    found = build(run, tmp_path / "proxy", model=tmp_path / "adapter", base=UNALIGNED)
    assert len(low_rank_layers(load_model(ModelSettings(name=str(found.out), device="cpu")).model)) == 14
    other = build(run, tmp_path / "plain", base=UNALIGNED)
    assert found.retention["loss_full"] != other.retention["loss_full"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_hostile_names_as_text(run: TinyRun, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run.pool.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["source"] = "<script>alert(1)</script>" if index % 2 else "a\u202eb & <b>"
    pool = write_rows(tmp_path / "pool.jsonl", rows)
    built = build(run, tmp_path / "out", pool=pool, target=(), sweep=True)
    page = _Page()
    text = (built.out / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.tags.count("script") == 3 and "b" not in page.tags and "\u202e" not in text
    assert "<script>alert(1)</script>" in page.text and "⟦U+202E⟧" in page.text
    shown, _, _ = text.partition('<script type="application/json"')
    assert shown.count("data-figure=") == 2 and "NaN" not in shown


def test_rows_in_memory_build_the_same_proxy(run: TinyRun, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run.pool.read_text().splitlines()]
    target = [json.loads(line) for line in run.target.read_text().splitlines()]
    found = build(run, tmp_path / "held", pool=rows, target={"target": target}, base=UNALIGNED)
    files = build(run, tmp_path / "files", base=UNALIGNED)
    assert (found.out / "model.safetensors").read_bytes() == (files.out / "model.safetensors").read_bytes()
    assert found.manifest["command"].startswith("tamis.proxy(...) in Python")
    assert files.manifest["command"] == f"tamis proxy --config {tmp_path / 'files' / 'run.yaml'}"


def test_the_command_prints_one_json_object(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--sparsity 0.5 --steps 0 --no-sweep --no-report --probe-rows 8 --held-out-rows 20 --device cpu --json"
    paths = [
        "--model",
        str(run.model),
        "--pool",
        str(run.pool),
        "--target",
        str(run.target),
        "--out",
        str(tmp_path / "o"),
    ]
    assert tamis_command(["proxy", *paths, *words.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["proxy"] == str(tmp_path / "o") and found["report"] is None and not found["was_finished"]
    assert tamis_command(["proxy", *paths, "--sparsity", "2"]) == 2
    assert "sparsity=2.0: expected a share" in capsys.readouterr().err


def test_a_model_with_code_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tamis.proxies.build import require_own_class

    with pytest.raises(Unsupported, match="Sequential is not a causal language model of Transformers' own"):
        require_own_class(torch.nn.Sequential())
