"""Everything a user can get wrong ends in exit code 2 and one line that names the place and says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tamis
from tamis.cli.main import run as run_command
from tiny_run import TinyRun, byte_tokenizer, chat, make_run, save_model, write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


def refused(capfd: pytest.CaptureFixture[str], tiny: TinyRun, place: Path, **flags: object) -> str:
    """The one line on standard error of a command that must be refused."""
    values = {"model": tiny.model, "pool": tiny.pool, "target": tiny.target, "budget": 10, "out": place, **flags}
    words = ["select", "--quiet"]
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not True else [f"--{name.replace('_', '-')}"]
    capfd.readouterr()
    code = run_command(words)
    said = capfd.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("tamis:")]
    assert len(lines) == 1 and "Traceback" not in said.err, said.err
    return lines[0]


def pool_with(folder: Path, line: str | bytes, *, at: int = 3) -> Path:
    rows = [json.dumps(chat(f"question {i}", f"answer number {i}", id=f"r{i}")).encode() for i in range(20)]
    rows[at] = line if isinstance(line, bytes) else line.encode()
    path = folder / "pool.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def row(messages: object, **more: object) -> str:
    return json.dumps({"messages": messages, **more})


USER = {"role": "user", "content": "hello"}
BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "malformed": ('{"messages": [', "not valid JSON"),
    "not an object": ("[1, 2]", "object"),
    "wrong type of messages": (row("hi"), "messages"),
    "unknown role": (row([USER, {"role": "wizard", "content": "x"}]), "wizard"),
    "null answer": (row([USER, {"role": "assistant", "content": None}]), "assistant"),
    "empty answer": (row([USER, {"role": "assistant", "content": ""}]), "empty"),
    "no answer at all": (row([USER]), "assistant"),
    "not UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "UTF-8"),
    "no known field": (json.dumps({"question": "x", "reply": "y"}), "messages"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_is_named_by_file_and_row(
    name: str, capfd: pytest.CaptureFixture[str], tiny: TinyRun, tmp_path: Path
) -> None:
    line, word = BAD_LINES[name]
    said = refused(capfd, tiny, tmp_path / "out", pool=pool_with(tmp_path, line), method="length")
    assert "pool.jsonl, row 3" in said and word in said


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_can_be_skipped_and_is_listed(name: str, tiny: TinyRun, tmp_path: Path) -> None:
    pool = pool_with(tmp_path, BAD_LINES[name][0])
    words = ["--model", str(tiny.model), "--pool", str(pool), "--target", str(tiny.target), "--budget", "5"]
    code = run_command(
        ["select", "--quiet", *words, "--out", str(tmp_path / "out"), "--method", "length", "--on-bad-row", "skip"]
    )
    assert code == 0
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(s["corpus"], s["row"]) for s in skipped] == [("pool", 3)]
    warnings = json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]
    (said,) = [warning for warning in warnings if "left out" in warning]
    assert said.startswith(f"About the run. pool: 1 rows cannot be used and were left out; the first: {pool}, row 3")


def test_what_is_odd_about_rows_is_on_the_page_and_in_the_manifest(
    capfd: pytest.CaptureFixture[str], tiny: TinyRun, tmp_path: Path
) -> None:
    rows = [chat(f"q{i}", f"a {i}", id="same", tools=[{"name": "add"}]) for i in range(10)]
    pool = write_rows(tmp_path / "pool.jsonl", rows)
    words = ["--model", str(tiny.model), "--pool", str(pool), "--target", str(tiny.target), "--budget", "4"]
    sentences = (
        "pool: 10 of 10 rows have tools, but the chat template writes none",
        "pool: 1 ids occur more than once; rows stay apart.",
    )
    for _ in range(2):  # the second run reads its tokens from the store
        capfd.readouterr()
        assert run_command(["select", "--quiet", *words, "--out", str(tmp_path / "out"), "--method", "bm25"]) == 0
        printed = capfd.readouterr().err
        warnings = json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        for sentence in sentences:
            assert len([warning for warning in warnings if sentence in warning]) == 1
            assert printed.count(sentence) == 1 and sentence in page
    assert run_command(["plan", "--quiet", *words]) == 0
    assert all(capfd.readouterr().err.count(sentence) == 1 for sentence in sentences[:1])


def missing_file(tmp: Path) -> dict[str, object]:
    return {"pool": tmp / "none.jsonl"}


def directory(tmp: Path) -> dict[str, object]:
    (tmp / "folder").mkdir()
    return {"pool": tmp / "folder"}


def empty_file(tmp: Path) -> dict[str, object]:
    (tmp / "empty.jsonl").touch()
    return {"pool": tmp / "empty.jsonl"}


def huge_line(tmp: Path) -> dict[str, object]:
    return {"pool": pool_with(tmp, '{"messages": "' + "x" * 100_000_000 + '"}')}


def empty_target(tmp: Path) -> dict[str, object]:
    (tmp / "target.jsonl").write_text("\n")
    return {"target": tmp / "target.jsonl"}


def budget_over_pool(tmp: Path) -> dict[str, object]:
    return {"budget": 1000}


def unknown_method(tmp: Path) -> dict[str, object]:
    return {"method": "tracing"}


def unknown_setting(tmp: Path) -> dict[str, object]:
    return {"set": "normalise=dot"}


def folder_under_a_file(tmp: Path) -> dict[str, object]:
    (tmp / "file").touch()
    return {"out": tmp / "file" / "out"}


def adapter_of_another_base(tmp: Path) -> dict[str, object]:
    base = save_model(tmp / "base", hidden=32)
    other = save_model(tmp / "other", hidden=16)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp / "adapter")
    config = tmp / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(other)}))
    byte_tokenizer().save_pretrained(tmp / "adapter")
    return {"model": tmp / "adapter"}


def folder_without_config(tmp: Path) -> dict[str, object]:
    (tmp / "model").mkdir()
    return {"model": tmp / "model"}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, object]], str]] = {
    "missing file": (missing_file, "none.jsonl"),
    "directory": (directory, "folder"),
    "empty file": (empty_file, "empty.jsonl"),
    "100 MB line": (huge_line, "row 3"),
    "empty target": (empty_target, "target.jsonl"),
    "budget over the pool": (budget_over_pool, "budget of 1000 rows, but the pool has 60"),
    "unknown method": (unknown_method, "did you mean 'tracin'"),
    "unknown method setting": (unknown_setting, "did you mean 'normalize'"),
    "out below a file": (folder_under_a_file, "file"),
    "adapter of another base": (adapter_of_another_base, "does not fit its base"),
    "model folder without config": (folder_without_config, "config.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_and_files_are_refused_in_one_line(
    name: str, capfd: pytest.CaptureFixture[str], tiny: TinyRun, tmp_path: Path
) -> None:
    make, words = REFUSED[name]
    said = refused(capfd, tiny, tmp_path / "out", **make(tmp_path))
    assert words in said


def test_a_folder_that_cannot_be_written_is_refused(
    capfd: pytest.CaptureFixture[str], tiny: TinyRun, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere, so a read-only folder cannot be made")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in refused(capfd, tiny, tmp_path / "locked" / "out")


def test_a_full_disk_keeps_what_was_written(
    capfd: pytest.CaptureFixture[str], tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    said = refused(capfd, tiny, tmp_path / "out", shard_rows=4)
    assert "No space left" in said and "same command again" in said
    monkeypatch.setattr(os, "fsync", fsync)
    kept = len(list((tmp_path / "out" / "store").rglob("shard-*.safetensors")))
    assert kept > 2
    words = ["--model", str(tiny.model), "--pool", str(tiny.pool), "--target", str(tiny.target), "--budget", "10"]
    assert run_command(["select", "--quiet", *words, "--out", str(tmp_path / "out"), "--shard-rows", "4"]) == 0


def test_duplicate_ids_are_told_apart_and_counted(tiny: TinyRun, tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [chat(f"q{i}", f"a {i}", id="same") for i in range(10)])
    words = ["--model", str(tiny.model), "--pool", str(pool), "--target", str(tiny.target), "--budget", "4"]
    assert run_command(["select", "--quiet", *words, "--out", str(tmp_path / "out"), "--method", "bm25"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["data_files"]["pool"]["duplicate_ids"] == 1
    assert len((tmp_path / "out" / "selected.jsonl").read_text().splitlines()) == 4


def test_a_tokenizer_without_template_uses_a_stated_one(tiny: TinyRun, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    words = ["--model", str(model), "--pool", str(tiny.pool), "--target", str(tiny.target), "--budget", "4"]
    assert run_command(["select", "--quiet", *words, "--out", str(tmp_path / "out"), "--method", "tracin"]) == 0
    warnings = json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]
    assert any("template" in note for note in warnings)


def test_a_model_without_any_gradient_is_refused_not_scored_nan(
    capfd: pytest.CaptureFixture[str], tiny: TinyRun, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():  # the last norm closes: logits, and so every gradient below them, are zero
        model.model.norm.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    said = refused(capfd, tiny, tmp_path / "out", model=tmp_path / "model")
    assert "none of the 60 scored pool rows has a gradient" in said and "another model" in said


def test_rows_that_the_length_limit_leaves_nothing_of_are_counted(
    tiny: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = pool_with(tmp_path, json.dumps(chat("a question without end " * 40, "yes", id="long")))
    limit = {"pool": pool, "max_length": 200, "on_bad_row": "skip", "method": "bm25", "budget": 5}
    found = tamis.select(model=tiny.model, target=tiny.target, out=tmp_path / "out", **limit)
    (said,) = [warning for warning in found.warnings if "--max-length" in warning]
    assert "pool: 1 of 20 rows lost every supervised token to --max-length" in said
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(chat("a question without end " * 40, "yes", id="long")) + "\n", encoding="utf-8")
    said = refused(capfd, tiny, tmp_path / "none", target=long, max_length=200, on_bad_row="skip")
    assert "target 'long' has no row with a supervised token" in said and "--max-length: 1; raise it" in said
