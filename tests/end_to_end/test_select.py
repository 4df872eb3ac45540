"""The main job from files to files: what is planted is found, rows keep their identity, the outputs say the truth."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import tamis
from tamis.cli.main import app
from tamis.errors import BadRow, InvalidInput, InvalidSettings, NonFinite, TamisError
from tamis.score import features
from tamis.types import Batch
from tiny_run import TinyRun, chat, make_run, write_rows

METHODS = ["uniform", "length", "bm25", "mid-ppl", "rds+", "tracin", "less", "loss-drop", "influence-distillation"]
QUICK = {
    "less": {"warmup_epochs": 1, "warmup_pool_share": 0.3},
    "loss-drop": {"warmup_steps": 2},
    "influence-distillation": {"landmarks": 24, "warmup_epochs": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


def select(run: TinyRun, out: Path, **settings: object) -> tamis.Selection:
    values: dict[str, object] = {"model": run.model, "pool": run.pool, "target": run.target, "budget": 10, "out": out}
    return tamis.select(**{**values, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_selects_the_budget_and_writes_every_file(run: TinyRun, tmp_path: Path, method: str) -> None:
    selection = select(run, tmp_path / "out", method=method, set=QUICK.get(method, {}))
    assert len(selection) == 10
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"selected.jsonl", "scores.parquet", "manifest.json", "report.html", "run.yaml"} <= names
    assert "skipped.jsonl" not in names  # no row was
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert table.num_rows == 60
    assert sum(table["selected"].to_pylist()) == 10
    scores = np.array(table["score"].to_pylist(), dtype=float)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"target": None}, "target: expected paths, a list of rows or a datasets.Dataset, got NoneType"),
        ({"pool": None}, "pool: expected paths, a list of rows or a datasets.Dataset, got NoneType"),
        ({"method": None}, "method: expected a name or a method object such as .*, got NoneType"),
        ({"method": tamis.methods.Less}, "method: expected a name or a method object such as .*, got type"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(
    run: TinyRun, tmp_path: Path, wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(TamisError, match=said):
        select(run, tmp_path / "out", **wrong)


@pytest.mark.parametrize("method", ["tracin", "less", "bm25", "influence-distillation"])
def test_planted_rows_rank_above_the_rest(run: TinyRun, tmp_path: Path, method: str) -> None:
    selection = select(run, tmp_path / "out", method=method, set=QUICK.get(method, {}))
    hits = len(set(selection.order.tolist()) & {*run.relevant, run.copies[0][1]})
    assert hits >= 9, f"{hits} of 10 selected rows are of the planted kind"


def test_robust_weights_reach_both_files_and_average_one(run: TinyRun, tmp_path: Path) -> None:
    asked = {**QUICK["influence-distillation"], "weights": "first-order"}
    selection = select(run, tmp_path / "out", method="influence-distillation", set=asked, aggregate="mean")
    lines = (tmp_path / "out" / "selected.jsonl").read_text().splitlines()
    weights = np.array([json.loads(line)["_tamis"]["weight"] for line in lines])
    table = np.array(selection.table["weight"].to_pylist())
    np.testing.assert_allclose(table[selection.order], weights)
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert (np.diff(weights) <= 0).all() and weights[0] > weights[-1] > 0
    assert np.count_nonzero(table) == 10
    notes = selection.manifest["notes"]
    assert any(note.startswith("Robust weights for target ") for note in notes)
    assert any(
        "selected rows" in note and "are landmarks, which have a gradient of their own" in note for note in notes
    )
    assert sum(selection.table["landmark"].to_pylist()) == asked["landmarks"]


def test_selected_rows_are_the_users_rows_plus_a_mark(run: TinyRun, tmp_path: Path) -> None:
    selection = select(run, tmp_path / "out")
    pool = [json.loads(line) for line in run.pool.read_text().splitlines()]
    lines = (tmp_path / "out" / "selected.jsonl").read_text().splitlines()
    for rank, (row, line) in enumerate(zip(selection.order.tolist(), lines, strict=True), start=1):
        written = json.loads(line)
        mark = written.pop("_tamis")
        assert written == pool[row]
        assert mark["id"] == pool[row]["id"] and mark["rank"] == rank and mark["weight"] == 1.0


def test_selected_rows_load_as_a_dataset(run: TinyRun, tmp_path: Path) -> None:
    select(run, tmp_path / "out")
    loaded = load_dataset(
        "json", data_files=str(tmp_path / "out" / "selected.jsonl"), cache_dir=str(tmp_path / "cache")
    )
    assert loaded["train"].num_rows == 10
    assert loaded["train"][0]["messages"][-1]["role"] == "assistant"


def test_copies_are_scored_alike_reported_and_taken_once(run: TinyRun, tmp_path: Path) -> None:
    selection = select(run, tmp_path / "out", budget="100%")
    first, copy = run.copies[0]
    score = selection.table["score"].to_pylist()
    assert score[first] == pytest.approx(score[copy], abs=1e-6)
    assert selection.table["duplicate_of"].to_pylist()[copy] == first
    assert {first, copy} - set(selection.order.tolist()), "both copies were taken"
    kept = select(run, tmp_path / "kept", budget="100%", duplicates="keep")
    assert len(kept) == 60


def test_a_shortlist_scores_only_what_it_keeps(run: TinyRun, tmp_path: Path) -> None:
    selection = select(run, tmp_path / "out", budget=4, shortlist="bm25:5x")
    scores = selection.table["score"].to_pylist()
    assert sum(score is not None for score in scores) == 20
    assert len(selection) == 4
    assert all(scores[row] is not None for row in selection.order)


def test_sources_are_chosen_by_a_few_of_their_rows(run: TinyRun, tmp_path: Path) -> None:
    selection = select(run, tmp_path / "out", budget=6, shortlist="sources:4")
    table = selection.table
    scored = {line["name"]: line["rows"] for line in selection.manifest["cost"]["stages"]}["gradients-pool"]
    assert scored == table["landmark"].to_numpy().sum() == 8, "four of each of two sources"
    source, score = np.array(table["source"].to_pylist()), table["score"].to_numpy()
    assert np.isfinite(score).all()
    assert len(set(score[source == "sums"])) == len(set(score[source == "talk"])) == 1, "one score for a source"
    assert set(source[selection.order]) == {"sums"}
    assert not table["flagged"].to_numpy().any(), "no source has enough rows with a loss"
    assert any("sources explain" in note for note in selection.manifest["notes"])
    assert selection.summary()["pool"]["scored"] == 8


def test_sources_of_a_pool_that_has_one_are_refused(run: TinyRun, tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [chat("How are you?", f"Well, {index}.") for index in range(9)])
    with pytest.raises(InvalidSettings, match=r"one source \('pool'\).*field 'source'"):
        tamis.select(
            model=run.model, pool=pool, target=run.target, out=tmp_path / "out", budget=2, shortlist="sources:4"
        )


def test_two_targets_share_the_budget(run: TinyRun, tmp_path: Path) -> None:
    talk = write_rows(
        tmp_path / "talk.jsonl", [chat("Say something about bread.", "river lamp stone cloud") for _ in range(2)]
    )
    selection = tamis.select(
        model=run.model,
        pool=run.pool,
        target={"sums": run.target, "talk": talk},
        budget=12,
        out=tmp_path / "out",
        share={"sums": 3, "talk": 1},
    )
    assert {"score:sums", "score:talk"} <= set(selection.table.column_names)
    for_whom = [selection.table["picked_for"].to_pylist()[row] for row in selection.order]
    assert for_whom.count("sums") == 9 and for_whom.count("talk") == 3


def test_a_token_budget_is_kept(run: TinyRun, tmp_path: Path) -> None:
    selection = select(run, tmp_path / "out", budget="400-tokens")
    tokens = np.array(selection.table["tokens"].to_pylist())
    assert 0 < tokens[selection.order].sum() <= 400


def test_scores_do_not_depend_on_the_order_of_the_pool(run: TinyRun, tmp_path: Path) -> None:
    rows = run.pool.read_text().splitlines()
    back = tmp_path / "backwards.jsonl"
    back.write_text("\n".join(reversed(rows)) + "\n")
    forward = select(run, tmp_path / "a").table
    backward = select(run, tmp_path / "b", pool=back).table
    ours = dict(zip(forward["id"].to_pylist(), forward["score"].to_pylist(), strict=True))
    theirs = dict(zip(backward["id"].to_pylist(), backward["score"].to_pylist(), strict=True))
    for name, score in ours.items():
        assert theirs[name] == pytest.approx(score, abs=2e-4)  # float16 storage of the features


def test_one_row_per_pass_gives_the_same_bits_whatever_the_pool(run: TinyRun, tmp_path: Path) -> None:
    rows = run.pool.read_text().splitlines()
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(rows[:30]) + "\n")
    whole = select(run, tmp_path / "a", batch_invariant=True).table["score"].to_pylist()
    part = select(run, tmp_path / "b", pool=half, batch_invariant=True).table["score"].to_pylist()
    assert whole[:30] == part


def test_rows_that_are_target_rows_are_counted_and_dropped_on_request(run: TinyRun, tmp_path: Path) -> None:
    leaky = tmp_path / "leaky.jsonl"
    leaky.write_text(run.pool.read_text() + run.target.read_text().splitlines()[0] + "\n")
    selection = select(run, tmp_path / "warned", pool=leaky)
    assert selection.manifest["data_files"]["pool"]["leaked"] == 1
    assert any("target" in warning for warning in selection.warnings)
    assert 60 in selection.order.tolist()
    dropped = select(run, tmp_path / "dropped", pool=leaky, drop_leaks=True)
    assert 60 not in dropped.order.tolist()


def test_a_second_run_in_the_same_folder_is_refused_with_the_field(run: TinyRun, tmp_path: Path) -> None:
    select(run, tmp_path / "out", method="length")
    with pytest.raises(InvalidSettings, match=r"settings\.budget was \"10\" there and is \"11\" now"):
        select(run, tmp_path / "out", method="length", budget=11)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(run.pool.read_text())
    again = {"model": run.model, "pool": changed, "target": run.target, "budget": 5, "method": "length"}
    tamis.select(**again, out=tmp_path / "two")  # type: ignore[arg-type]
    changed.write_text(run.pool.read_text().replace("lamp", "lump"))
    with pytest.raises(InvalidSettings, match=r"data\.pool\.content was"):
        tamis.select(**again, out=tmp_path / "two")  # type: ignore[arg-type]


def test_a_folder_with_other_files_is_refused(run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidSettings, match=r"not empty and was not written by tamis \(it holds thesis.tex\)"):
        select(run, tmp_path / "out", method="length")


def test_a_row_without_supervised_tokens_fails_or_is_listed(run: TinyRun, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run.pool.read_text().splitlines()]
    rows[7] = chat("x" * 400, "late", id="long")
    pool = write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(BadRow, match=r"long\.jsonl, row 7 .*no supervised token is left .*--max-length"):
        select(run, tmp_path / "a", pool=pool, max_length=128)
    selection = select(run, tmp_path / "b", pool=pool, max_length=128, on_bad_row="skip")
    skipped = [json.loads(line) for line in (tmp_path / "b" / "skipped.jsonl").read_text().splitlines()]
    assert [(s["corpus"], s["row"]) for s in skipped] == [("pool", 7)]
    assert selection.table["score"].to_pylist()[7] is None


def test_a_budget_above_the_pool_is_refused(run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="budget of 61 rows, but the pool has 60"):
        select(run, tmp_path / "out", method="length", budget=61)


def test_a_missing_model_is_refused_before_any_work(run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere"):
        select(run, tmp_path / "out", model=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_projection_of_the_run_is_the_methods(run: TinyRun, tmp_path: Path) -> None:
    by_flag = select(run, tmp_path / "a", projection="mask", projection_dim=40)
    by_method = select(run, tmp_path / "b", method=tamis.methods.TracIn(projection="mask", projection_dim=40))
    assert by_flag.table["score"].to_pylist() == by_method.table["score"].to_pylist()
    with pytest.raises(InvalidSettings, match="projects nothing"):
        select(run, tmp_path / "c", method="bm25", projection="mask")


def test_a_loss_that_is_not_finite_names_the_row(run: TinyRun, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(run.model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=r"NaN or infinite.*\.jsonl, row \d+ \(0-based\)"):
        select(run, tmp_path / "out", model=broken)


def test_memory_that_runs_out_halves_the_batches_and_changes_no_score(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = select(run, tmp_path / "whole").table["score"].to_pylist()
    sizes: list[int] = []
    real = features.per_sample_features

    def small_memory(model: nn.Module, batch: Batch, *rest: object) -> object:
        sizes.append(batch.input_ids.numel())
        if sizes[-1] > 500:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, batch, *rest)

    monkeypatch.setattr(features, "per_sample_features", small_memory)
    halved = select(run, tmp_path / "halved").table["score"].to_pylist()
    assert halved == pytest.approx(whole, abs=2e-4)
    failed = [size for size in sizes if size > 500]
    assert 0 < len(failed) <= 6, "a size that failed was tried again"


def test_a_budget_above_the_pool_is_refused_before_the_model_is_loaded(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tamis.collect.load_model", lambda settings: pytest.fail("the model was loaded"))
    with pytest.raises(InvalidSettings, match="budget of 61 rows, but the pool has 60"):
        select(run, tmp_path / "out", budget=61)


def test_a_folder_with_the_leftovers_of_a_kill_is_taken_up(run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".identity.json.0-123.tmp").write_text("{")
    assert len(select(run, tmp_path / "out", method="length")) == 10
    assert not list((tmp_path / "out").glob(".*"))


def test_a_row_that_failed_can_be_skipped_in_the_same_folder(run: TinyRun, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text(run.pool.read_text() + json.dumps(chat("x" * 400, "late")) + "\n")
    with pytest.raises(BadRow, match="on-bad-row skip"):
        select(run, tmp_path / "out", pool=pool, max_length=128, method="length")
    assert len(select(run, tmp_path / "out", pool=pool, max_length=128, method="length", on_bad_row="skip")) == 10


def test_rows_chosen_before_get_one_new_mark(run: TinyRun, tmp_path: Path) -> None:
    select(run, tmp_path / "first", budget=20, method="length")
    select(run, tmp_path / "second", pool=tmp_path / "first" / "selected.jsonl", budget=3, method="length")
    for rank, line in enumerate((tmp_path / "second" / "selected.jsonl").read_text().splitlines(), start=1):
        assert line.count('"_tamis"') == 1
        assert json.loads(line)["_tamis"]["rank"] == rank


def test_the_manifest_says_which_models_ran(run: TinyRun, tmp_path: Path) -> None:
    for method in ("tracin", "less"):
        selection = select(run, tmp_path / method, method=method, set=QUICK.get(method, {}))
        assert all(model["dtype"] == "float32" for model in selection.manifest["models"])
        assert selection.manifest["models"], method


def test_the_summary_says_which_weights_ran_in_which_dtype(run: TinyRun, tmp_path: Path) -> None:
    selection = select(run, tmp_path / "tracin")
    assert selection.summary()["model"] == f"{run.model} (float32 on cpu, sdpa attention)"
    quantised = {**selection.manifest, "models": [{**selection.manifest["models"][0], "kind": "gguf"}]}
    assert "dequantised to float32 on cpu" in replace(selection, manifest=quantised).summary()["model"]
    assert select(run, tmp_path / "length", method="length").summary()["model"] is None


def test_the_console_says_what_carried_the_scores_and_how_far_to_trust_them(run: TinyRun, tmp_path: Path) -> None:
    words = ["select", "--model", str(run.model), "--pool", str(run.pool), "--target", str(run.target)]
    words += ["--budget", "10", "--method", "influence-distillation", "--out", str(tmp_path / "out")]
    for pair in ("warmup=none", "landmarks=24", "embedding_budget=0"):
        words += ["--set", pair]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0, printed.output
    lines = {line.split("  ")[0]: line for line in printed.output.splitlines()}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for name, said in manifest["diagnosis"].items():
        assert said in lines[name]
    assert "kernel" in lines["embedding"] and "best of 2 tried" in lines["embedding"]
    assert "rank correlation of" in lines["expected"]
    (told,) = [text for text in [*manifest["notes"], *manifest["warnings"]] if "Verdict: " in text]
    assert told.removeprefix("Verdict: ") in lines["verdict"] or "see the warning" in lines["verdict"]
    assert "verdict" not in select(run, tmp_path / "bm25", method="bm25").summary()


def test_method_objects_and_flags_for_the_same_setting_exclude_each_other(run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="projection: the method object has settings of its own"):
        select(run, tmp_path / "out", method=tamis.methods.TracIn(), projection="mask")
