"""Runs that are killed, interrupted or spread over processes end in the bytes of a run that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tamis
from control_c import heed_control_c
from tiny_run import TinyRun, make_run

SETTINGS = {
    "tracin": {"method": "tracin"},
    "less": {"method": "less", "set": ["warmup_epochs=2", "warmup_pool_share=0.3"]},
    "influence-distillation": {
        "method": "influence-distillation",
        "set": ["landmarks=20", "warmup_epochs=2", "warmup_update_rows=4", "embedding_budget=0.5"],
    },
}

# What each of several runs is in the midst of when it is killed: the first file that it writes there.
KILLED_IN = {
    "tracin": ("gradients-target-*/shard-00000.*", "gradients-pool-*/shard-00003.*"),
    "less": ("less-warm-up-*/step-*", "*adam*-pool-*/shard-00003.*"),
    "influence-distillation": (
        "influence-distillation-warm-up-*/step-*",
        "gradients-pool-*/shard-00001.*",
        "embedding-*-pool-*/shard-00012.*",  # of all rows: the landmarks' embeddings, of which one is chosen, are fewer
        "landmark-scores-pool-*/shard-00000.*",
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), rows=80)


def command(run: TinyRun, out: Path, method: str) -> list[str]:
    settings = SETTINGS[method]
    words = ["select", "--model", str(run.model), "--pool", str(run.pool), "--target", str(run.target)]
    words += ["--budget", "12", "--out", str(out), "--method", str(settings["method"]), "--shard-rows", "4", "--quiet"]
    for pair in settings.get("set", ()):
        words += ["--set", pair]
    return words


def environment() -> dict[str, str]:
    # One thread everywhere: the number of threads changes the order of floating-point sums.
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tamis", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_control_c,
    )


def results(out: Path) -> tuple[bytes, bytes]:
    return (out / "scores.parquet").read_bytes(), (out / "selected.jsonl").read_bytes()


def files_in_store(out: Path) -> int:
    # os.walk forgives folders that are renamed while it looks, which is when a checkpoint is put in place.
    return sum(len(folders) + len(files) for _, folders, files in os.walk(out / "store"))


@pytest.mark.parametrize("method", list(SETTINGS))
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(run: TinyRun, tmp_path: Path, method: str) -> None:
    whole = start(command(run, tmp_path / "whole", method))
    assert whole.wait(timeout=300) == 0, whole.stderr.read() if whole.stderr else ""
    out = tmp_path / "killed"
    for stage in KILLED_IN[method]:
        process = start(command(run, out, method))
        while process.poll() is None and not list((out / "store").glob(stage)):
            time.sleep(0.005)
        assert process.poll() is None, f"the run ended before it was seen to write {stage}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start(command(run, out, method))
    assert last.wait(timeout=300) == 0, last.stderr.read() if last.stderr else ""
    assert results(out) == results(tmp_path / "whole")


@pytest.mark.parametrize("method", ["tracin", "influence-distillation"])
def test_two_processes_give_the_bytes_of_one(run: TinyRun, tmp_path: Path, method: str) -> None:
    alone = start(command(run, tmp_path / "one", method))
    assert alone.wait(timeout=300) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    launched = subprocess.run(
        [*launcher, "-m", "tamis", *command(run, tmp_path / "two", method)],
        env=environment(),
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr.decode()[-2000:]
    assert results(tmp_path / "two") == results(tmp_path / "one")
    writers = {path.name for path in (tmp_path / "two" / "store").rglob("cost-*.jsonl")}
    assert {"cost-0.jsonl", "cost-1.jsonl"} <= writers, "one of the two processes did no work"


def test_an_interrupted_run_says_how_to_resume_and_exits_130(run: TinyRun, tmp_path: Path) -> None:
    process = start([word for word in command(run, tmp_path / "out", "tracin") if word != "--quiet"])
    while process.poll() is None and files_in_store(tmp_path / "out") < 8:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    assert "run the same command again" in errors.decode()
    assert "Traceback" not in errors.decode()


def test_a_finished_run_repeats_from_its_config_without_loading_the_model(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert start(command(run, out, "tracin")).wait(timeout=300) == 0
    before = results(out)
    monkeypatch.setattr("tamis.collect.load_model", lambda settings: pytest.fail("the model was loaded again"))
    tamis.select(model=run.model, pool=run.pool, target=run.target, budget=12, out=out, shard_rows=4)
    assert results(out) == before


def test_a_flipped_byte_in_the_store_is_found(run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert start(command(run, out, "tracin")).wait(timeout=300) == 0
    shard = next((out / "store").glob("gradients-pool-*/shard-00003.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-7] ^= 0x20
    shard.write_bytes(content)
    again = start(command(run, out, "tracin"))
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 2
    assert shard.name in errors.decode() and "delete" in errors.decode()
