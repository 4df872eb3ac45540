"""Training runs from files to a model on disk: like the trainer built by hand, resumable, known by their folder."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tamis
from online_runs import arguments, collate
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.errors import InvalidInput, InvalidSettings, NonFinite, StoreCorrupted, Unsupported
from tamis.online.fate import read_candidates
from tamis.online.trainer import OnlineTrainer
from tamis.runs.report import write_report
from tamis.training.loop import TrainSettings, learning_rate_at
from tamis.training.lora import add_lora
from tiny_run import TinyRun, chat, make_run, save_model, write_rows

STEPS = 6
BASE = {"keep": 4, "oversample": 2, "learning_rate": 1e-2, "log_steps": 1, "batch_rows": 4, "device": "cpu"}
CHOOSING = {"method": "filter-then-weight", "set": {"cold_start": 2}}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The number of threads changes the order of floating-point sums, and subprocesses here have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("run")
    made = make_run(folder, rows=40)
    sums = [chat(f"How much is {a} plus {a + 3}?", f"{a} + {a + 3} = {2 * a + 3}.", id=f"t{a}") for a in range(10, 20)]
    write_rows(made.target, sums)
    return made


def train(run: TinyRun, out: Path, **changes: Any) -> tamis.TrainResult:
    values = {"model": run.model, "pool": run.pool, "target": run.target, "steps": STEPS, "out": out, **BASE}
    return tamis.train(**{**values, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def entries(out: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in found if name in entry]


@pytest.mark.parametrize("changes", [{"method": "uniform", "tune": "full"}, CHOOSING], ids=["uniform-full", "ftw-lora"])
def test_a_run_is_the_trainer_built_by_hand_bit_for_bit(run: TinyRun, tmp_path: Path, changes: dict[str, Any]) -> None:
    # With a schedule of Transformers: "linear" and every warm-up are our own.
    chosen = {"accumulation": 2, "weight_decay": 0.1, "warmup_share": 0.0, "scheduler": "cosine"}
    train(run, tmp_path / "out", held_out=0, **chosen, **changes)

    renderer = Renderer(AutoTokenizer.from_pretrained(run.model), max_length=2048)

    def rows(path: Path) -> datasets.Dataset:
        tokens = [renderer.render(example) for example in read_examples([str(path)])]
        ids = [t.input_ids.tolist() for t in tokens]
        labels = [
            [i if s else -100 for i, s in zip(t.input_ids.tolist(), t.supervised.tolist(), strict=True)] for t in tokens
        ]
        return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})

    model: Any = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    if changes.get("tune") == "full":
        selection: Any = tamis.online.Uniform(keep=4, oversample=2)
    else:
        selection = tamis.online.FilterThenWeight(keep=4, oversample=2, cold_start=2)
        model = add_lora(model, rank=16, alpha=32, seed=0)
    target = rows(run.target)
    by_hand = OnlineTrainer(
        model=model,
        args=arguments(
            tmp_path / "by-hand", max_steps=STEPS, seed=0, warmup_steps=0, weight_decay=0.1,
            gradient_accumulation_steps=2, lr_scheduler_type="cosine",
        ),
        train_dataset=rows(run.pool),
        # The order of target rows is drawn from their number, and these are in the order of the file.
        target_dataset=target,
        data_collator=collate,
        selection=selection,
    )  # fmt: skip
    by_hand.train()
    found = weights(tmp_path / "out")
    trained = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained)
    for name, param in trained.items():
        assert torch.equal(found[name], param), name


def test_the_linear_schedule_is_that_of_training_on_a_selection(run: TinyRun, tmp_path: Path) -> None:
    settings = TrainSettings(learning_rate=1e-2, lr_warmup_share=0.4)
    train(run, tmp_path / "out", held_out=0, warmup_share=0.4, method="uniform")
    expected = [learning_rate_at(settings, step, STEPS) for step in range(STEPS)]
    assert min(expected) > 0 and max(expected) == 1e-2
    assert entries(tmp_path / "out", "learning_rate")[:STEPS] == pytest.approx(expected)


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "inverse_sqrt"])
def test_the_first_update_of_a_warm_up_trains(run: TinyRun, tmp_path: Path, scheduler: str) -> None:
    asked = {"warmup_share": 0.4, "learning_rate": 1e-2, "scheduler": scheduler}
    train(run, tmp_path / "out", held_out=0, method="uniform", **asked)
    rates = entries(tmp_path / "out", "learning_rate")[:STEPS]
    rising = math.ceil(0.4 * STEPS)
    assert rates[:rising] == pytest.approx([1e-2 * (step + 1) / rising for step in range(rising)])
    assert min(rates) > 0


def test_a_run_learns_and_says_what_it_did(run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(run, out, steps=14, forecast_every=2, eval_steps=5, learning_rate=1e-3, **CHOOSING)
    summary = result.summary()
    assert summary["steps"] == 14 and not summary["was_finished"] and not summary["stopped_early"]
    loss = summary["held_out_loss"]
    assert loss["after"] < loss["before"] - 0.05
    assert entries(out, "eval_loss")[0] == loss["before"] and entries(out, "final_eval_loss") == [loss["after"]]
    assert len(entries(out, "eval_loss")) == 1 + 3  # before, and after updates 5, 10 and 14
    table = read_candidates(out / "candidates").to_pylist()
    assert summary["candidates"] == len(table) == 14 * 8
    assert summary["distinct_rows"] == len({row["row"] for row in table if row["kept"]})
    assert sum(summary["share_by_source"].values()) == pytest.approx(1)
    assert summary["predicted_vs_realised_drop"]["pairs"] == 6  # of updates 4 to 14
    assert summary["predicted_vs_realised_drop"]["correlation"] > 0.99  # the rate is small
    assert result.manifest["rows"] == {"pool": 40, "target": 8, "held_out": 2, "leaked": 0}
    assert result.manifest["cost"]["candidate_tokens"] > 0
    assert {path.name for path in out.iterdir()} == {
        "candidates", "checkpoints", "identity.json", "log.jsonl", "manifest.json", "model", "run.yaml", "store",
    }  # fmt: skip
    AutoTokenizer.from_pretrained(out / "model")


def test_an_adapter_loads_with_peft_and_is_trained_on(run: TinyRun, tmp_path: Path) -> None:
    train(run, tmp_path / "first", method="tilt", set={"cold_start": 1}, lora_rank=2, lora_targets=["q_proj", "v_proj"])
    found = weights(tmp_path / "first")
    assert all(name.split(".")[-3] in ("q_proj", "v_proj") for name in found)
    plain = AutoModelForCausalLM.from_pretrained(run.model)
    ids = torch.arange(3, 12)[None]
    before = plain(ids).logits.detach().clone()
    adapted = PeftModel.from_pretrained(plain, tmp_path / "first" / "model")
    assert not torch.allclose(adapted(ids).logits, before)

    more = train(run, tmp_path / "second", model=tmp_path / "first" / "model", method="full", steps=2)
    assert more.manifest["models"][0]["kind"] == "adapter"
    again = weights(tmp_path / "second")
    assert again.keys() == found.keys() and not all(torch.equal(again[name], found[name]) for name in found)
    with pytest.raises(InvalidSettings, match=r"lora_rank: '.*' is an adapter and is trained as it is"):
        train(run, tmp_path / "third", model=tmp_path / "first" / "model", lora_rank=4)
    with pytest.raises(InvalidSettings, match=r"tune='full': '.*' is an adapter"):
        train(run, tmp_path / "third", model=tmp_path / "first" / "model", tune="full")


def test_a_finished_run_is_recognised_and_another_one_refused_by_what_differs(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, pool = tmp_path / "out", tmp_path / "pool.jsonl"
    shutil.copy(run.pool, pool)
    first = train(run, out, pool=pool, method="full", steps=2)
    monkeypatch.setattr("tamis.runs.train.open_model", lambda *_, **__: pytest.fail("the model was loaded again"))
    again = train(run, out, pool=pool, method="full", steps=2, log_steps=2)  # what cannot change the weights may differ
    assert again.was_finished and again.manifest == first.manifest and again.log == first.log
    with pytest.raises(InvalidSettings, match=r"holds another run: settings\.weight_decay was 0\.0 there and is 0\.5"):
        train(run, out, pool=pool, method="full", steps=2, weight_decay=0.5)
    named = {name: value for name, value in BASE.items() if name not in ("keep", "oversample")}
    same = {"model": run.model, "pool": pool, "target": run.target, "steps": 2, "out": out, **named}
    assert tamis.train(method=tamis.online.Full(keep=4, oversample=2), **same).was_finished  # an object like the name
    with pytest.raises(InvalidSettings, match=r"holds another run: settings\.keep was 4 there and is 2 now"):
        tamis.train(method=tamis.online.Full(keep=2, oversample=2), **same)
    lines = pool.read_text().splitlines()
    pool.write_text("\n".join([lines[0].replace("plus", "minus"), *lines[1:]]) + "\n")
    with pytest.raises(InvalidSettings, match=r"holds another run: data\.pool\.content was"):
        train(run, out, pool=pool, method="full", steps=2)


def test_a_finished_run_whose_model_is_damaged_is_said_and_writes_it_again(run: TinyRun, tmp_path: Path) -> None:
    first = train(run, tmp_path, method="full", steps=2, save_steps=1)
    (file,), manifest = first.model.glob("*.safetensors"), tmp_path / "manifest.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        StoreCorrupted, match=r"model\.safetensors is missing or was changed .*; delete .*model and run"
    ):
        train(run, tmp_path, method="full", steps=2, save_steps=1)
    shutil.rmtree(first.model)
    assert train(run, tmp_path, method="full", steps=2, save_steps=1).model == first.model
    assert file.read_bytes() == whole
    manifest.write_text(manifest.read_text()[:-9])
    with pytest.raises(StoreCorrupted, match=r"manifest\.json cannot be read .*; delete it and run the same command"):
        train(run, tmp_path, method="full", steps=2, save_steps=1)
    with pytest.raises(StoreCorrupted, match=r"manifest\.json cannot be read .*; a page about the run cannot be made"):
        write_report(tmp_path)


def words(run: TinyRun, out: Path, *more: str) -> list[str]:
    line = ["train", "--model", run.model, "--pool", run.pool, "--target", run.target, "--out", out, "--steps", STEPS]
    for name, value in BASE.items():
        line += [f"--{name.replace('_', '-')}", value]
    return [sys.executable, "-m", *(more or ("tamis",)), *map(str, line), "--set", "cold_start=2", "--quiet"]


def environment() -> dict[str, str]:
    path = str(Path(tamis.__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


@pytest.mark.slow
def test_a_run_killed_by_force_ends_in_the_bytes_of_one_left_alone(run: TinyRun, tmp_path: Path) -> None:
    settings = {**CHOOSING, "steps": 30, "save_steps": 2}
    train(run, tmp_path / "whole", **settings)
    command = [*words(run, tmp_path / "killed"), "--steps", "30", "--save-steps", "2"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoints" / "checkpoint-6").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    checkpoints = tmp_path / "killed" / "checkpoints"
    stopped_at = max(int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*"))
    assert stopped_at < 30, "the run ended before it could be killed"
    (next(checkpoints.glob(f"checkpoint-{stopped_at}")) / "tamis_whole.json").unlink(
        missing_ok=True
    )  # as if half written

    with pytest.raises(InvalidSettings, match=r"settings\.seed was 0 there and is 1 now"):
        train(run, tmp_path / "killed", seed=1, **settings)
    result = train(run, tmp_path / "killed", **settings)

    (whole,), (killed,) = ((tmp_path / n / "model").glob("*.safetensors") for n in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    tables = [read_candidates(tmp_path / n / "candidates") for n in ("whole", "killed")]
    assert tables[0].equals(tables[1])
    assert entries(tmp_path / "killed", "loss") == entries(tmp_path / "whole", "loss")
    assert result.summary()["candidates"] == 30 * 8
    (closing,) = (entry for entry in result.log if "train_runtime" in entry)
    assert not {"train_loss", "train_samples_per_second"} & set(closing), "they are of the last part alone"
    assert 0 < closing["train_runtime"] <= result.manifest["cost"]["seconds"]
    assert len(entries(tmp_path / "whole", "train_loss")) == 1


def test_training_stops_when_nothing_becomes_better_and_keeps_the_best(run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = {"steps": 40, "eval_steps": 1, "patience": 3, "learning_rate": 0.3, "method": "full", "warmup_share": 0}
    result = train(run, out, **settings)
    losses = entries(out, "eval_loss")[1:]
    best = min(losses)
    assert result.summary()["stopped_early"] and result.summary()["steps"] == len(losses) < 40
    assert len(losses) - 1 - losses.index(best) == 3
    assert result.summary()["held_out_loss"]["after"] == pytest.approx(best, rel=1e-6)

    found = weights(out)
    (out / "manifest.json").unlink()  # as if killed between the last checkpoint and the end
    shutil.rmtree(out / "model")
    moved = shutil.move(out, tmp_path / "moved")
    resumed = train(run, moved, **settings)
    assert resumed.summary()["steps"] == len(losses) and resumed.summary()["stopped_early"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(moved).items())
    costs = [{k: v for k, v in one.manifest["cost"].items() if k != "seconds"} for one in (result, resumed)]
    assert costs[0] == costs[1] and costs[0]["total_tflops"] > 0


def test_a_run_killed_after_its_last_update_ends_as_one_left_alone(run: TinyRun, tmp_path: Path) -> None:
    whole = train(run, tmp_path / "out", **CHOOSING)
    found = weights(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "out" / "model")
    again = train(run, tmp_path / "out", **CHOOSING)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(tmp_path / "out").items())
    costs = [{k: v for k, v in one.manifest["cost"].items() if k != "seconds"} for one in (whole, again)]
    assert costs[0] == costs[1] and min(costs[0]["tflops"].values()) > 0
    assert whole.manifest["training"] == again.manifest["training"]


@pytest.mark.slow
def test_two_processes_train_like_one(run: TinyRun, tmp_path: Path) -> None:
    train(run, tmp_path / "one", set={"cold_start": 2})
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command = words(run, tmp_path / "two", *launcher, "--rdzv_endpoint", "localhost:0", "-m", "tamis")
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
    kept = [
        {
            (row["choice"], row["row"])
            for row in read_candidates(tmp_path / name / "candidates").to_pylist()
            if row["kept"]
        }
        for name in ("one", "two")
    ]
    assert kept[0] == kept[1]
    assert entries(tmp_path / "two", "final_eval_loss") == pytest.approx(
        entries(tmp_path / "one", "final_eval_loss"), abs=1e-4
    )


def test_training_on_the_target_alone_is_warned_of(
    run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tamis"):
        result = train(run, tmp_path / "out", method="target-only", steps=2)
    assert "memorises small targets" in caplog.text
    assert any("memorises small targets" in sentence for sentence in result.warnings)
    assert result.summary()["distinct_rows"] == 0 and result.manifest["cost"]["candidate_tokens"] == 0
    assert result.manifest["cost"]["target_tokens"] > 0


def test_targets_measure_apart_and_leaks_are_dropped(run: TinyRun, tmp_path: Path) -> None:
    pool = [json.loads(line) for line in run.pool.read_text().splitlines()]
    target = [json.loads(line) for line in run.target.read_text().splitlines()]
    leaky = [*target[:3], *pool]
    changes = {"pool": leaky, "target": {"a": target[:5], "b": target[5:]}, "method": "uniform", "steps": 1}
    kept = train(run, tmp_path / "kept", **changes)
    assert kept.manifest["rows"] == {"pool": 43, "target": 8, "held_out": 2, "leaked": 3}
    assert any("3 of 43 pool rows" in sentence for sentence in kept.warnings)
    assert set(kept.manifest["training"]["held_out_loss_by_target"]) == {"a", "b"}
    dropped = train(run, tmp_path / "dropped", drop_leaks=True, **changes)
    assert dropped.manifest["rows"]["pool"] == 40
    looked_at = read_candidates(tmp_path / "dropped" / "candidates").to_pylist()
    sources = ["target"] * 3 + [row["source"] for row in pool[:-2]] + ["sums", "talk"]
    assert all(row["row"] >= 3 and row["source"] == sources[row["row"]] for row in looked_at)
    measured = train(run, tmp_path / "measured", **{**changes, "target": target[:6], "eval": target[6:]})
    assert measured.manifest["rows"]["target"] == 6 and measured.manifest["rows"]["held_out"] == 4
    assert "run.yaml cannot bring back" in measured.manifest["command"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"method": "full", "set": {"ridge": 2}},
            InvalidSettings,
            "settings of method 'full': unknown setting 'ridge'",
        ),
        ({"keep": 50}, InvalidSettings, "the pool has 40 usable rows, fewer than the 50 x 2 candidates"),
        ({"lora_targets": ["q_prj"]}, InvalidSettings, "no layer is called 'q_prj' .*q_proj"),
        ({"report_to": ["tensorboard"]}, Unsupported, "report_to='tensorboard' needs the package tensorboard"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    run: TinyRun,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tamis.runs.train_setup.find_spec", lambda name: None)
    with pytest.raises(error, match=message) as caught:
        train(run, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_bfloat16_computes_and_float32_is_kept(run: TinyRun, tmp_path: Path, tune: str) -> None:
    settings = {"method": "tilt", "set": {"cold_start": 1}, "steps": 3, "gradient_checkpointing": True, "tune": tune}
    result = train(run, tmp_path / "out", dtype="bfloat16", **settings)
    assert result.manifest["models"][0]["dtype"] == ("bfloat16" if tune == "lora" else "float32")
    assert result.manifest["models"][0]["computes_in"] == "bfloat16"
    exact = train(run, tmp_path / "exact", dtype="float32", **settings)
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "exact")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert not all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    losses = [one.summary()["held_out_loss"]["after"] for one in (result, exact)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize("method", ["uniform", "tracin"])
def test_a_run_that_diverges_says_when_and_at_which_rate(run: TinyRun, tmp_path: Path, method: str) -> None:
    with pytest.raises(NonFinite, match=r"^after \d updates? with a learning rate of up to 1e\+30: .* (in)?finite"):
        train(run, tmp_path / "out", method=method, tune="full", learning_rate=1e30)


def test_a_method_that_would_never_start_is_warned_of(run: TinyRun, tmp_path: Path) -> None:
    result = train(run, tmp_path / "out", method="tilt", steps=None, epochs=0.5)
    assert result.summary()["steps"] == 3  # half of the 5 choices that 40 rows make, 8 at a time
    assert any("tilt never starts: it waits for 10 updates" in sentence for sentence in result.warnings)


def test_a_target_too_small_to_hold_rows_out_is_refused(run: TinyRun, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run.target.read_text().splitlines()]
    with pytest.raises(InvalidSettings, match="target 'target' has 1 usable rows, of which 1 would only measure"):
        train(run, tmp_path / "out", target=rows[:1])


def test_a_proxy_is_named_by_its_folder_counted_apart_and_part_of_what_a_run_is(run: TinyRun, tmp_path: Path) -> None:
    proxy = save_model(tmp_path / "proxy", seed=9)
    common = {"method": "tracin", "set": {"cold_start": 1}}
    cheap = train(run, tmp_path / "out", candidates=f"proxy:{proxy}", **common)
    exact = train(run, tmp_path / "exact", **common)
    spent, plain = cheap.manifest["cost"], exact.manifest["cost"]
    assert spent["total_tflops"] == pytest.approx(sum(spent["tflops"].values()))
    assert cheap.summary()["tflops"]["total"] == spent["total_tflops"]
    # The cold update runs its rows either way; the others run theirs a second time.
    assert plain["tflops"]["update"] < spent["tflops"]["update"]
    assert spent["candidate_tokens"] > plain["candidate_tokens"]
    assert spent["target_tokens"] == plain["target_tokens"] > 0
    save_model(tmp_path / "proxy", seed=8)
    with pytest.raises(InvalidSettings, match="proxy"):
        train(run, tmp_path / "out", candidates=f"proxy:{proxy}", **common)
    with pytest.raises(InvalidSettings, match="'tilt' keeps all candidates"):
        train(run, tmp_path / "no", candidates="jvp", method="tilt")
    with pytest.raises(InvalidSettings, match="candidates='proxy': name the model"):
        train(run, tmp_path / "no", candidates="proxy", method="tracin")


def test_a_proxy_that_reads_other_tokens_at_the_same_ids_is_refused(run: TinyRun, tmp_path: Path) -> None:
    """Its table is as high as the model's, so only the tokenizers tell."""
    proxy = save_model(tmp_path / "proxy", seed=9)
    path = proxy / "tokenizer.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    vocab = plain["model"]["vocab"]
    first, second = sorted(vocab, key=lambda token: vocab[token])[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(plain), encoding="utf-8")
    said = rf"token {vocab[second]} of .* and the proxy has it as {vocab[first]} \(2 of {len(vocab)}"
    with pytest.raises(InvalidInput, match=said):
        train(run, tmp_path / "out", candidates=f"proxy:{proxy}", method="tracin")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_windows_fill_the_epochs_of_a_run(run: TinyRun, tmp_path: Path) -> None:
    result = train(run, tmp_path, candidates="reuse:2", method="tracin", steps=None, epochs=1)
    assert result.manifest["training"]["steps"] == 10  # 40 rows, five windows of eight, two choices of each
    assert result.manifest["rows"]["pool"] == 40


def test_sources_speak_for_their_rows(run: TinyRun, tmp_path: Path) -> None:
    by_source = {"candidates": "sources:3", "source_rows": 1, "method": "less"}
    result = train(run, tmp_path / "out", **by_source)
    log = read_candidates(result.out / "candidates").to_pandas()
    assert set(log["source"]) == {"sums", "talk"}
    assert (log.groupby(["step", "source"])["alignment"].nunique() == 1).all()
    ages = entries(result.out, "selection/score_age")
    assert ages == [0.0, 1.0, 2.0] * 2
    assert 0 < result.manifest["cost"]["tflops"]["candidates"] < result.manifest["cost"]["tflops"]["update"]
    page = write_report(result.out).read_text()
    assert "Candidates were drawn by their sources" in page and "the mean alignment of its source" in page
    assert "mean alignment, first" in page and "Candidates that point towards the target" not in page
    rows = [json.loads(line) for line in run.pool.read_text().splitlines()]
    one = write_rows(tmp_path / "one.jsonl", [row | {"source": "all"} for row in rows])
    with pytest.raises(InvalidInput, match=r"all 40 rows of the pool are of one source \('all'\).*a file of its own"):
        train(run, tmp_path / "refused", pool=one, **by_source)
    many = write_rows(tmp_path / "many.jsonl", [row | {"source": f"s{i}"} for i, row in enumerate(rows)])
    split = train(run, tmp_path / "many", pool=many, **by_source)
    assert any("40 sources and 8 candidates to a choice" in warning for warning in split.manifest["warnings"])
    shares = split.summary()["share_by_source"]
    assert len(shares) == 9 and list(shares)[-1].endswith(" others") and sum(shares.values()) == pytest.approx(1)
    with pytest.raises(InvalidSettings, match=r"source_rows: candidates='exact' are not scored by source"):
        train(run, tmp_path / "refused", source_rows=3)


def test_the_report_of_a_run_shows_its_rows_as_long_as_they_are_the_same(run: TinyRun, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    shutil.copy(run.pool, pool)
    result = train(run, tmp_path / "out", pool=pool, forecast_every=2, **CHOOSING)
    page = write_report(tmp_path / "out").read_text()
    assert "Predicted and realised drop" in page and "Most weight in updates" in page
    assert '<details class="row"' in page
    assert f'<dd class="value">{result.manifest["training"]["distinct_rows"]}</dd>' in page
    with pool.open("a") as file:
        file.write(json.dumps(chat("One more?", "One more.")) + "\n")
    (tmp_path / "out" / "manifest.json").unlink()
    page = write_report(tmp_path / "out", out=tmp_path / "other.html").read_text()
    assert "pool&#39;s files have changed since the run" in page and '<details class="row"' not in page
    assert "not finished yet" in page
    pool.unlink()
    assert "cannot be read from here" in write_report(tmp_path / "out").read_text()


def test_a_record_of_several_processes_is_refused_before_any_file_is_read(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tamis.trajectory.recorder.world_size", lambda: 2)
    with pytest.raises(Unsupported, match="several processes or GPUs cannot be recorded"):
        train(run, tmp_path / "out", pool=tmp_path / "absent.jsonl", record=tmp_path / "trace")
    assert not (tmp_path / "out").exists() and not (tmp_path / "trace").exists()


def test_a_run_begun_with_a_record_does_not_go_on_without_it(run: TinyRun, tmp_path: Path) -> None:
    settings = {"method": "full", "keep": 4, "oversample": 1, "save_steps": 2}
    record = tmp_path / "trace"
    train(run, tmp_path / "out", record=record, **settings)
    (tmp_path / "out" / "manifest.json").unlink()  # as if killed before its end
    with pytest.raises(InvalidSettings, match=f"was begun with --record {record}: give it again"):
        train(run, tmp_path / "out", **settings)
    assert train(run, tmp_path / "out", record=record, **settings).summary()["steps"] == STEPS
    (tmp_path / "out" / "manifest.json").unlink()
    shutil.rmtree(record)
    assert train(run, tmp_path / "out", **settings).summary()["steps"] == STEPS
