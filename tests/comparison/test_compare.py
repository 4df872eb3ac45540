"""A whole comparison on a tiny model: complete, traceable, equal in updates and cost, and the same after a kill."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tamis
from tamis.comparison.contenders import contenders_of
from tamis.comparison.records import Records
from tamis.errors import InvalidInput, InvalidSettings
from tiny_run import TinyRun, chat, make_run, write_rows

BASE = {"budget": 8, "seeds": 2, "update_rows": 4, "learning_rate": 1e-2, "lora_rank": 2, "device": "cpu"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The number of threads changes the order of floating-point sums, and the subprocess here has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_run(tmp_path_factory.mktemp("run"), rows=40)
    sums = [chat(f"How much is {a} plus {a + 3}?", f"{a} + {a + 3} = {2 * a + 3}.", id=f"e{a}") for a in range(10, 16)]
    write_rows(made.pool.with_name("eval.jsonl"), sums)
    return made


def compare(run: TinyRun, out: Path, **changes: Any) -> tamis.CompareResult:
    held_out = run.pool.with_name("eval.jsonl")
    values = {"model": run.model, "pool": run.pool, "target": run.target, "eval": held_out, "out": out, **BASE}
    result = tamis.compare(**{**values, **changes})
    assert isinstance(result, tamis.CompareResult)
    return result


@pytest.fixture(scope="module")
def whole(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tamis.CompareResult:
    return compare(run, tmp_path_factory.mktemp("out") / "whole")


def records(out: Path) -> dict[str, Any]:
    """What each run ended with, without what it took in time."""
    found = {path.stem: json.loads(path.read_text()) for path in (out / "records").glob("*.json")}
    for record in found.values():
        del record["train_seconds"], record["measure_seconds"]
    return found


def test_all_baselines_run_and_every_number_is_traceable(whole: tamis.CompareResult) -> None:
    names = {standing.name for standing in whole.standings}
    assert names == {
        *("tracin", "full at tracin's cost", "full", "uniform", "bm25", "length"),
        *("random, tracin's sources", "untouched model"),
    }
    kept = Records(whole.out / "records")
    for standing in whole.standings:
        assert standing.values == tuple(kept.read(key).loss for key in standing.keys)
        assert len(standing.values) == {"uniform": 4, "untouched model": 1}.get(standing.name, 2)
    with (whole.out / "results.csv").open() as file:
        lines = {line["key"]: line for line in csv.DictReader(file)}
    assert set(lines) == {key for standing in whole.standings for key in standing.keys} == set(records(whole.out))
    rows = pq.read_table(whole.out / "rows.parquet").to_pandas()
    for key, own in rows.groupby("key", observed=True):
        assert float(lines[str(key)]["loss"]) == pytest.approx(own["loss"].mean(), rel=1e-12)
    written = json.loads((whole.out / "verdict.json").read_text())
    assert written["verdict"] == whole.conclusion.title and len(written["standings"]) == len(whole.standings)
    page = (whole.out / "report.html").read_text()
    assert whole.conclusion.title in page and "Does selecting pay at equal cost?" in page


def test_every_method_that_selects_meets_random_rows_of_its_own_sources(run: TinyRun, tmp_path: Path) -> None:
    methods = ("mid-ppl", "bm25:3x+tracin", "online:tilt")
    settings = tamis.CompareSettings(model="m", pool=("p",), target=("t",), eval=("e",), methods=methods)
    drawn = {c.name: c.of for c in contenders_of(settings) if c.kind == "same-sources"}
    assert drawn == {f"random, {name}'s sources": name for name in methods[:2]}


def test_a_method_behind_a_shortlist_uses_what_the_pool_has_cost_already(run: TinyRun, tmp_path: Path) -> None:
    """Without the whole pool beside it, it computes for itself; the charge is the same."""
    changes: dict[str, Any] = {"seeds": 1, "steps": 1}
    apart = compare(run, tmp_path / "apart", methods=["bm25:2x+tracin"], **changes)
    beside = compare(run, tmp_path / "beside", methods=["bm25:2x+tracin", "tracin"], **changes)
    alone, shared = apart.standing("bm25:2x+tracin"), beside.standing("bm25:2x+tracin")
    assert alone is not None and shared is not None
    assert shared.select_tflops == pytest.approx(alone.select_tflops, rel=1e-9)
    assert [s.name for s in beside.standings if s.kind == "same-sources"]
    folders = {f.name: Path(f.folder) for f in beside.selections}
    own = {name: json.loads((folder / "manifest.json").read_text()) for name, folder in folders.items()}
    assert own["tracin"]["data_files"]["pool"]["scored"] > own["bm25:2x+tracin"]["data_files"]["pool"]["scored"]


def test_without_held_out_rows_half_of_the_target_measures_and_the_other_half_selects(
    run: TinyRun, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    changes: dict[str, Any] = {"eval": (), "methods": ["bm25"], "seeds": 1, "steps": 1}
    result = compare(run, out, **changes)
    whole = [json.loads(line) for line in run.target.read_text().splitlines()]
    halves = [
        [json.loads(line) for line in (out / "halves" / "0" / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("target", "held-out")
    ]
    assert sorted((row for half in halves for row in half), key=whole.index) == whole
    assert [len(half) for half in halves] == [2, 2] and result.held_out_rows == 2
    (said,) = [warning for warning in result.conclusion.warnings if "No held-out rows were given" in warning]
    assert "'target': 2 rows selected, 2 rows measured" in said
    assert not any("The target has" in warning for warning in result.conclusion.warnings)
    before = records(out)
    again = tamis.compare(**{**result.manifest["settings"], "seeds": 2})  # as run.yaml has it
    assert isinstance(again, tamis.CompareResult)
    assert {key: record for key, record in records(out).items() if key in before} == before, "the halves have moved"


def test_a_target_of_one_row_cannot_be_divided(run: TinyRun, tmp_path: Path) -> None:
    lone = write_rows(tmp_path / "lone.jsonl", [chat("How much is 1 plus 1?", "2")])
    with pytest.raises(InvalidInput, match="'lone' has 1 row, of which none can be held out; pass --eval"):
        compare(run, tmp_path / "out", target=lone, eval=())


def test_training_lowers_the_loss_and_seeds_differ(whole: tamis.CompareResult) -> None:
    untouched, trained = whole.standing("untouched model"), whole.standing("tracin")
    assert untouched is not None and trained is not None
    assert trained.mean < untouched.mean - 0.01
    assert trained.values[0] != trained.values[1]


def test_updates_are_equal_but_for_full_at_equal_cost_which_spends_as_much(whole: tamis.CompareResult) -> None:
    kept = Records(whole.out / "records")
    for standing in whole.standings:
        if standing.kind not in ("equal-cost", "untouched"):
            assert standing.steps == 4, standing.name  # two passes over 8 rows in updates of 4
    method, matched = whole.standing("tracin"), whole.standing("full at tracin's cost")
    full = whole.standing("full")
    assert method is not None and matched is not None and full is not None
    assert method.select_tflops > 0 and matched.steps > 4
    one_update = full.train_tflops / full.steps
    for mine, theirs in zip(method.keys, matched.keys, strict=True):
        spent, other = kept.read(mine).tflops + method.select_tflops, kept.read(theirs).tflops
        assert abs(other - spent) < one_update  # the nearest whole number of updates: at most about half of one off
    differing = {d.against: d for d in whole.differences}
    assert differing["full at equal cost"].opponent == "full at tracin's cost"
    assert set(differing) == {"full at equal cost", "full", "uniform", "bm25", "same sources"}


def matched(result: tamis.CompareResult, name: str) -> Any:
    found = result.standing(f"full at {name}'s cost")
    assert found is not None
    return found


def test_baseline_draws_follow_the_rules(whole: tamis.CompareResult) -> None:
    folder = Path(next(f.folder for f in whole.selections if f.name == "tracin"))
    assert (folder / "report.html").is_file()
    uniform = [Records(whole.out / "records").read(key) for key in whole.standing("uniform").keys]  # type: ignore[union-attr]
    assert len({record.spec["rows"] for record in uniform}) == 4, "uniform draws its rows anew for every seed"
    chosen = [Records(whole.out / "records").read(key) for key in whole.standing("tracin").keys]  # type: ignore[union-attr]
    assert len({record.spec["rows"] for record in chosen}) == 1


def test_a_comparison_that_is_killed_goes_on_and_ends_with_the_same_records(
    run: TinyRun, whole: tamis.CompareResult, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = ["compare", "--model", str(run.model), "--pool", str(run.pool), "--target", str(run.target), "--quiet"]
    words += ["--eval", str(run.pool.with_name("eval.jsonl")), "--out", str(out)]
    for name, value in BASE.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([sys.executable, "-m", "tamis", *words], env=environment)
    while process.poll() is None and len(list((out / "records").glob("*.json"))) < 3:
        time.sleep(0.01)
    assert process.poll() is None, "the comparison ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (out / "records").glob("*.json")}
    assert not (out / "manifest.json").exists() and 0 < len(done) < len(records(whole.out))
    result = compare(run, out)
    assert records(out) == records(whole.out)
    assert all((out / "records" / name).stat().st_mtime_ns == at for name, at in done.items()), "a run was repeated"
    assert [s.values for s in result.standings] == [s.values for s in whole.standings]


class Interrupting:
    """Progress that presses Ctrl-C after a number of updates."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(units: int) -> None:
            if unit == "updates":
                self.left -= units
                if self.left == 0:
                    raise KeyboardInterrupt

        yield advance


def test_a_run_that_is_interrupted_goes_on_from_its_checkpoint(
    run: TinyRun, whole: tamis.CompareResult, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    changes = {"methods": ["bm25"], "seeds": 1, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        compare(run, out, progress=Interrupting(3), **changes)
    assert not list((out / "records").glob("*.json"))
    assert [path.parent.parent.name for path in out.glob("unfinished/*/step-000002")] == ["unfinished"]
    steps: list[int] = []
    compare(run, out, progress=Counting(steps), **changes)
    assert steps[:3] == [2, 1, 1], "the first run began anew"
    found = records(out)
    assert found and found == {key: record for key, record in records(whole.out).items() if key in found}
    assert not list((out / "unfinished").iterdir())


class Counting:
    """Progress that keeps what it is told of updates."""

    def __init__(self, heard: list[int]) -> None:
        self.heard = heard

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield self.heard.append if unit == "updates" else lambda units: None


def test_all_weights_several_tasks_and_a_token_budget(run: TinyRun, tmp_path: Path) -> None:
    held_out = run.pool.with_name("eval.jsonl")
    result = compare(
        run, tmp_path / "out", target={"a": run.target, "b": held_out}, eval={"sums": held_out, "own": run.target},
        methods=["bm25:3x+tracin"], seeds=1, budget="500-tokens", epochs=1, tune="full", lora_rank=None,
        learning_rate=1e-3,
    )  # fmt: skip
    assert result.tasks == ("sums", "own")
    method, matched = result.standing("bm25:3x+tracin"), result.standing("full at bm25:3x+tracin's cost")
    assert method is not None and matched is not None
    assert set(method.by_task) == {"sums", "own"} and method.select_tflops > 0
    assert matched.steps >= method.steps
    assert any("The target has" in warning for warning in result.conclusion.warnings)
    untouched = result.standing("untouched model")
    assert untouched is not None and method.mean < untouched.mean
    assert "one run cannot exclude chance" in result.conclusion.title
    assert "by task" in (result.out / "report.html").read_text()


def test_more_seeds_and_methods_add_runs_and_repeat_none(
    run: TinyRun, whole: tamis.CompareResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = records(whole.out)
    steps: list[int] = []
    from tamis.runs import compare_training as training

    train = training.fine_tune

    def counted(*args: Any, **more: Any) -> Any:
        steps.append(args[3].steps)
        return train(*args, **more)

    monkeypatch.setattr(training, "fine_tune", counted)
    result = compare(run, whole.out, methods=["tracin", "mid-ppl", "online:tilt"], set={"online:tilt.cold_start": 1})
    # mid-ppl and random rows of its sources twice each, and full at mid-ppl's cost and of the online method twice each.
    assert len(steps) == 4 + 4
    after = records(whole.out)
    assert {key: after[key] for key in before} == before
    online = result.standing("online:tilt")
    assert online is not None and online.steps == 4
    assert online.train_tflops > 0 and online.select_tflops > 0, "an online method pays for candidates, too"
    kept = Records(whole.out / "records")
    for key, other in zip(online.keys, matched(result, "online:tilt").keys, strict=True):
        run_of, full = kept.read(key), kept.read(other)
        assert 0 < run_of.choosing_tflops < run_of.tflops
        assert abs(full.tflops - run_of.tflops) < full.tflops / full.steps, "the cost that is matched is all of it"
    assert any(d.opponent == "full at online:tilt's cost" for d in result.differences)


def test_an_online_method_scores_its_candidates_as_told_and_may_look_at_more_of_them(
    run: TinyRun, whole: tamis.CompareResult
) -> None:
    label = "online:tracin@sources:2"
    chosen = {f"{label}.oversample": 5, f"{label}.source_rows": 1, f"{label}.target_rows": 2}
    result = compare(run, whole.out, methods=[label], set=chosen, seeds=1)
    online = result.standing(label)
    assert online is not None and online.select_tflops > 0
    record = Records(whole.out / "records").read(online.keys[0])
    assert record.spec["online"]["candidates"] == "sources:2"
    manifest = json.loads((whole.out / "online" / online.keys[0] / "manifest.json").read_text())
    assert manifest["training"]["candidates"] == 4 * 5 * online.steps
    assert manifest["libraries"] == whole.manifest["libraries"]  # the Trainer's accelerate too
    assert "accelerate" in manifest["libraries"]
    with pytest.raises(InvalidSettings, match="'greats' compares candidates with each other"):
        compare(run, whole.out, methods=["online:greats@sources:2"])


def test_layers_that_take_no_adapter_are_refused_before_anything_is_selected(run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="nope"):
        compare(run, tmp_path / "out", tune="lora", lora_targets=("nope",))
    assert not (tmp_path / "out" / "store").exists()


def test_budgets_that_come_to_the_same_rows_are_refused_before_anything_is_written(
    run: TinyRun, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSettings, match="the budgets 8 and 20% are both 8 of the pool's 40 rows; leave one out"):
        compare(run, tmp_path / "out", budgets=("10%", "20%", "500-tokens"))
    assert not (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "out" / "store").exists()


def test_a_folder_of_other_rows_is_refused(run: TinyRun, whole: tamis.CompareResult, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "pool.jsonl", [chat("Hello?", "No.")] * 9)
    with pytest.raises(InvalidSettings, match="holds another run"):
        compare(run, whole.out, pool=other)


def test_exact_match_reads_the_answers_that_the_model_writes(run: TinyRun, tmp_path: Path) -> None:
    result = compare(
        run, tmp_path / "out", methods=["bm25"], seeds=1, budget=4, epochs=1, metric="exact-match", answer_tokens=3,
        answer_pattern=r"= (\d+)",
    )  # fmt: skip
    assert result.metric == "exact-match"
    record = Records(result.out / "records").read(result.standings[0].keys[0])
    assert len(record.answers) == len(record.row_matches) == 6
    assert record.exact_match == np.mean(record.row_matches)
    assert result.conclusion.title.endswith("has the best mean of the baselines")


def test_random_parts_of_the_pool_ask_whether_scores_foretell_the_loss(
    run: TinyRun, whole: tamis.CompareResult
) -> None:
    before = records(whole.out)
    result = compare(run, whole.out, subsets=5, subset_share=0.3, steps=4)
    found = {foretold.name: foretold for foretold in result.foretold}
    assert set(found) == {"tracin", "bm25", "length"} and found["tracin"].parts == 5
    added = {key: record for key, record in records(whole.out).items() if key not in before}
    assert len(added) == 5 and {record["steps"] for record in added.values()} == {4}
    assert len({record["spec"]["rows"] for record in added.values()}) == 5
    assert [s.values for s in result.standings] == [s.values for s in whole.standings]


def test_rows_in_memory_and_held_out_rows_in_the_pool(run: TinyRun, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run.pool.read_text().splitlines()]
    held_out = [json.loads(line) for line in run.pool.with_name("eval.jsonl").read_text().splitlines()]
    result = compare(
        run, tmp_path / "out", pool=[*rows, held_out[0]], eval={"sums": held_out}, methods=["bm25"], seeds=1, budget=4,
        epochs=1,
    )  # fmt: skip
    assert result.tasks == ("sums",)
    assert any("1 row whose text or prompt is held out" in w for w in result.conclusion.warnings)


def test_planted_rows_are_found_and_counted_without_training(run: TinyRun, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pairs = [draw.integers(2, 99, size=2).tolist() for _ in range(16)]
    target = [chat(f"How much is {a} plus {b}?", f"{a} + {b} = {a + b}. #### {a + b}") for a, b in pairs]
    result = tamis.compare(
        model=run.model, pool=run.pool, target=write_rows(tmp_path / "target.jsonl", target), planted=True,
        relevant_sources=["sums"], methods=["tracin"], out=tmp_path / "out", device="cpu",
    )  # fmt: skip
    assert isinstance(result, tamis.PlantedResult)
    assert any("With 8 relevant rows, one more or less is 12% of precision" in said for said in result.warnings)
    assert result.relevant == 8 and result.counts["relevant"] == 8 and result.counts["wrong answer"] == 4
    assert result.counts["background"] + result.counts["background, wrong answer"] == 31  # the pool's talk
    by_name = {standing.name: standing for standing in result.standings}
    assert set(by_name) == {"tracin", "bm25", "length", *(f"uniform, draw {i}" for i in range(1, 5))}
    assert by_name["tracin"].score.of_the_task >= 0.9, "sums look like no other row of this pool"
    lines = (tmp_path / "out" / "planted" / "truth.csv").read_text().splitlines()
    assert len(lines) - 1 == sum(result.counts.values())
    assert not (tmp_path / "out" / "records").exists()
    with pytest.raises(InvalidSettings, match='check was "planted" there'):
        compare(run, tmp_path / "out")
    assert result.title in (tmp_path / "out" / "report.html").read_text()
