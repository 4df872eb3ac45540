"""A folder holds one run: what can change the result is refused there by its name, what cannot is let through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tamis
from tamis.cli.main import app
from tamis.data.examples import read_examples
from tamis.embeddings import save_embeddings
from tamis.errors import InvalidInput, InvalidSettings
from tamis.versions import releases
from tiny_run import CHATML, TinyRun, make_run

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), rows=30)


def select(run: TinyRun, out: Path, **settings: Any) -> tamis.Selection:
    values = {"model": run.model, "pool": run.pool, "target": run.target, "budget": 5, "out": out, "method": "length"}
    return tamis.select(**{**values, **settings})


def results(out: Path) -> tuple[bytes, bytes]:
    return (out / "scores.parquet").read_bytes(), (out / "selected.jsonl").read_bytes()


def set_source(rows: Rows) -> None:
    rows[3]["source"] = "elsewhere"


def set_note(rows: Rows) -> None:
    rows[3]["note"] = "seen by nobody but written out"


def set_id(rows: Rows) -> None:
    rows[3]["id"] = "another"


def set_answer(rows: Rows) -> None:
    rows[3]["messages"][-1]["content"] += "!"


@pytest.mark.parametrize(
    ("change", "field"), [(set_source, "source"), (set_note, "text"), (set_id, "ids"), (set_answer, "content")]
)
@pytest.mark.parametrize("corpus", ["pool", "target"])
def test_changed_rows_are_refused_with_what_changed_in_them(
    run: TinyRun, tmp_path: Path, corpus: str, change: Callable[[Rows], None], field: str
) -> None:
    file = tmp_path / "rows.jsonl"
    shutil.copy(getattr(run, corpus), file)
    select(run, tmp_path / "out", **{corpus: file})
    before = results(tmp_path / "out")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidSettings, match=rf"holds another run: data\.{corpus}\.{field} was [0-9a-f]{{12}} "):
        select(run, tmp_path / "out", **{corpus: file})
    assert results(tmp_path / "out") == before


def test_rows_that_differ_in_what_is_not_trained_on_share_their_gradients(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(run, tmp_path / "out", method="tracin", store=str(tmp_path / "store"))
    rows = [json.loads(line) for line in run.pool.read_text().splitlines()]
    set_source(rows), set_note(rows), set_id(rows)
    (tmp_path / "renamed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("tamis.collect.load_model", lambda settings: pytest.fail("the model was loaded again"))
    again = select(
        run,
        tmp_path / "other",
        method="tracin",
        pool=tmp_path / "renamed.jsonl",
        store=str(tmp_path / "store"),
    )
    assert again.table["source"][3].as_py() == "elsewhere"
    assert again.table["id"][3].as_py() == "another"


def test_a_model_folder_may_move_but_not_change(run: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(run.model, tmp_path / "here")
    select(run, tmp_path / "out", method="tracin", model=tmp_path / "here")
    before = results(tmp_path / "out")
    shutil.move(tmp_path / "here", tmp_path / "there")
    select(run, tmp_path / "out", method="tracin", model=tmp_path / "there")
    assert results(tmp_path / "out") == before
    scale_weights(tmp_path / "there", 1.5)
    with pytest.raises(InvalidSettings, match="holds another run: model was"):
        select(run, tmp_path / "out", method="tracin", model=tmp_path / "there")


def test_a_run_is_not_resumed_under_another_release(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(run, tmp_path / "out")
    before = results(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("tamis.runs.manifest.releases", lambda *names: {**releases(*names), "peft": "0.0.1"})
        with pytest.raises(
            InvalidSettings, match=r'holds another run: libraries\.peft was ".*" there and is "0\.0\.1"'
        ):
            select(run, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("tamis.runs.manifest.__version__", "99.0")
        with pytest.raises(InvalidSettings, match=r'holds another run: tamis was ".*" there and is "99\.0" now'):
            select(run, tmp_path / "out")
    assert results(tmp_path / "out") == before


def test_a_chat_template_file_may_move_but_not_change(run: TinyRun, tmp_path: Path) -> None:
    here, there = tmp_path / "here.jinja", tmp_path / "there.jinja"
    here.write_text(CHATML)
    select(run, tmp_path / "out", chat_template=str(here))
    before = results(tmp_path / "out")
    here.rename(there)
    select(run, tmp_path / "out", chat_template=str(there))
    select(run, tmp_path / "out", chat_template=CHATML)  # the same, typed
    assert results(tmp_path / "out") == before
    there.write_text(CHATML.replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(InvalidSettings, match=r"holds another run: inputs\.chat_template was"):
        select(run, tmp_path / "out", chat_template=str(there))
    with pytest.raises(InvalidSettings, match=r"inputs\.chat_template was .* and is \"\(absent\)\" now"):
        select(run, tmp_path / "out")


def test_checkpoints_may_move_but_not_change(run: TinyRun, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(run.model, tmp_path / name)
    scale_weights(tmp_path / "two", 1.1)

    def again(*names: str) -> None:
        paths = [str(tmp_path / name) for name in names]
        select(run, tmp_path / "out", method="tracin", set={"checkpoints": paths})

    again("one", "two")
    before = results(tmp_path / "out")
    shutil.move(tmp_path / "two", tmp_path / "moved")
    again("one", "moved")
    assert results(tmp_path / "out") == before
    with pytest.raises(InvalidSettings, match=r"holds another run: inputs\.checkpoints\.0 was"):
        again("moved", "one")
    (tmp_path / "one" / "trainer_state.json").write_text(
        json.dumps({"global_step": 1, "log_history": [{"step": 1, "learning_rate": 0.5}]})
    )
    with pytest.raises(InvalidSettings, match=r"inputs\.learning_rates\.0 was null there and is 0.5 now"):
        again("one", "moved")
    (tmp_path / "one" / "trainer_state.json").unlink()
    scale_weights(tmp_path / "moved", 2.0)
    with pytest.raises(InvalidSettings, match=r"holds another run: inputs\.checkpoints\.1 was"):
        again("one", "moved")
    with pytest.raises(InvalidSettings, match=r"inputs\.checkpoints was .* and is \"\(absent\)\" now"):
        select(run, tmp_path / "out", method="tracin")


def test_moments_may_move_but_not_change(run: TinyRun, tmp_path: Path) -> None:
    warmed = {"warmup_epochs": 1, "warmup_pool_share": 0.2, "lora_rank": 2}
    select(run, tmp_path / "warm", method="less", set=warmed)
    made = next((tmp_path / "warm" / "store").glob("less-warm-up-*/step-*"))
    adapter = shutil.copytree(made, tmp_path / "adapter")

    def again(moments: Path) -> None:
        select(run, tmp_path / "out", model=adapter, method="less", set={"moments": str(moments)})

    again(adapter)
    before = results(tmp_path / "out")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    again(moved)
    assert results(tmp_path / "out") == before
    state = load_file(moved / "optimizer.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, moved / "optimizer.safetensors")
    with pytest.raises(InvalidSettings, match=r"holds another run: inputs\.moments was"):
        again(moved)


def test_embeddings_from_elsewhere_may_move_but_not_change(run: TinyRun, tmp_path: Path) -> None:
    ids = [*read_examples([str(run.pool)]).ids, *read_examples([str(run.target)]).ids]
    values = torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(0)).numpy()
    save_embeddings(tmp_path / "here", ids, values)

    def again(given: Path, **more: Any) -> None:
        asked = {"warmup": "none", "landmarks": 8, "embedding": "given", "given": str(given)}
        select(run, tmp_path / "out", method="influence-distillation", set=asked, **more)

    again(tmp_path / "here")
    before = results(tmp_path / "out")
    stages = sorted(path.name for path in (tmp_path / "out" / "store").iterdir())
    shutil.move(tmp_path / "here", tmp_path / "there")
    again(tmp_path / "there")
    assert results(tmp_path / "out") == before
    assert sorted(path.name for path in (tmp_path / "out" / "store").iterdir()) == stages
    save_embeddings(tmp_path / "there", ids, values[::-1])
    with pytest.raises(InvalidSettings, match=r"holds another run: inputs\.given\.vectors was"):
        again(tmp_path / "there")


def test_embeddings_from_elsewhere_follow_the_ids_of_the_rows(run: TinyRun, tmp_path: Path) -> None:
    pool, target = ([json.loads(line) for line in file.read_text().splitlines()] for file in (run.pool, run.target))
    for row, place in zip([*pool, *target], range(len(pool) + len(target)), strict=True):
        row["id"] = str(place)
    ids = [str(place) for place in range(len(pool) + len(target))]
    save_embeddings(
        tmp_path / "given", ids, torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(0)).numpy()
    )
    asked = {"warmup": "none", "landmarks": 8, "embedding": "given", "given": str(tmp_path / "given")}

    def scores(out: str) -> list[float]:
        rows = {"pool": pool, "target": target, "store": str(tmp_path / "store")}
        selection = select(run, tmp_path / out, method="influence-distillation", set=asked, **rows)
        found: list[float] = selection.table["score"].to_pylist()
        return found

    first = scores("first")
    for row, place in zip(pool, reversed(range(len(pool))), strict=True):
        row["id"] = str(place)  # the same tokens and gradients, other vectors
    assert scores("second") != first


def scale_weights(folder: Path, factor: float) -> None:
    state = load_file(folder / "model.safetensors")
    scaled = {name: tensor * factor if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})


def test_rows_in_memory_select_like_the_files_they_came_from(run: TinyRun, tmp_path: Path) -> None:
    pool, target = ([json.loads(line) for line in file.read_text().splitlines()] for file in (run.pool, run.target))
    filed = select(run, tmp_path / "filed", method="bm25")
    held = select(run, tmp_path / "held", method="bm25", pool=pool, target=datasets.Dataset.from_list(target))
    assert held.order.tolist() == filed.order.tolist()
    lines = [(tmp_path / name / "selected.jsonl").read_text().splitlines() for name in ("filed", "held")]
    assert [json.loads(line) for line in lines[0]] == [json.loads(line) for line in lines[1]]
    assert set(held.table["file"].to_pylist()) == {"pool (in memory)"}

    before = results(tmp_path / "held")
    again = select(run, tmp_path / "held", method="bm25", pool=list(pool), target=datasets.Dataset.from_list(target))
    assert results(tmp_path / "held") == before and again.order.tolist() == held.order.tolist()
    pool[0]["note"] = "changed"
    with pytest.raises(InvalidSettings, match=r"holds another run: data\.pool\.text was"):
        select(run, tmp_path / "held", method="bm25", pool=pool, target=datasets.Dataset.from_list(target))


def test_a_run_on_rows_in_memory_says_that_its_settings_cannot_repeat_it(run: TinyRun, tmp_path: Path) -> None:
    pool, target = ([json.loads(line) for line in file.read_text().splitlines()] for file in (run.pool, run.target))
    selection = select(run, tmp_path / "out", pool=pool, target={"sums": target, "filed": run.target})
    assert set(selection.table.column_names) >= {"score:sums", "score:filed"}
    text = (tmp_path / "out" / "run.yaml").read_text()
    assert "some of whose rows a Python program held: pool (in memory), target sums (in memory)." in text
    assert "run.yaml cannot bring back" in selection.manifest["command"]
    answer = CliRunner().invoke(app, ["select", "--config", str(tmp_path / "out" / "run.yaml")])
    with pytest.raises(InvalidInput, match=r"pool \(in memory\) stands for rows that a Python program held in memory"):
        raise answer.exception
