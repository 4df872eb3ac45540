"""Attribution and verification of a recorded LoRA run: numbers against the pieces, files, interruption, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

import tamis
from online_runs import arguments, collate, rows_of
from tamis.cli.main import run as run_command
from tamis.errors import InvalidInput, InvalidSettings, StoreCorrupted
from tamis.maths.ranks import rank_correlation
from tamis.runs.verify import _shares, choose_uses
from tamis.trajectory import segment_store, sweep
from tamis.trajectory.adjoint import final_values
from tamis.trajectory.fidelity import fidelity
from tamis.trajectory.leave_out import leave_out_effect
from tamis.trajectory.log import LogReader
from tamis.trajectory.open_run import open_run
from tamis.trajectory.sweep import SweepSettings, run_sweep
from tamis.versions import releases
from tiny_models import tiny_model
from tiny_run import make_run

TARGET = [dict(row) for row in rows_of(5, seed=7)]


@dataclasses.dataclass
class Recorded:
    folder: Path
    model: nn.Module


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(
        model=tiny_model("llama", dtype=torch.float32, lora=True).train(),
        args=arguments(folder / "trainer", max_steps=7, learning_rate=3e-3, gradient_accumulation_steps=2),
        train_dataset=rows_of(24, seed=1),
        data_collator=collate,
        callbacks=[tamis.TrajectoryRecorder(folder / "record", every=3)],
    )
    trainer.train()
    return Recorded(folder / "record", trainer.model)


def attribute(recorded: Recorded, out: Path, **settings: Any) -> tamis.Attribution:
    return tamis.attribute(run=recorded.folder, target=TARGET, out=out, model=recorded.model, **settings)


def test_scores_are_those_of_the_sweep_by_use_and_summed_by_sample(recorded: Recorded, tmp_path: Path) -> None:
    found = attribute(recorded, tmp_path / "a", per_row=True, error="exact", error_samples=1)
    run = open_run(recorded.folder, recorded.model)
    micros = run.micros_of([_row(row) for row in TARGET], most=2)
    by_step = run_sweep(run, micros, SweepSettings(error=True), per_row=True)
    scores = torch.cat(by_step["scores"]).double().numpy()
    table = found.uses.to_pandas()
    np.testing.assert_allclose(np.stack(table["scores"]), scores, rtol=2e-3, atol=1e-6)  # batches of 16 and of 2
    np.testing.assert_allclose(table["score"], scores.mean(axis=1), rtol=2e-3, atol=1e-6)
    total = np.zeros(len(run.rows))
    np.add.at(total, table["row"], table["score"])
    np.testing.assert_allclose(found.samples["score"].to_numpy(), total)
    assert found.samples["uses"].to_pylist() == np.bincount(table["row"]).tolist()
    exact = table.dropna(subset=["error_exact"])
    assert len(exact) == 1 and (exact["error_exact"] > 0).all() and (table["error_proxy"] > 0).all()
    assert found.samples["position"].to_pylist() == run.reader.positions().tolist()
    assert json.loads((tmp_path / "a/manifest.json").read_text())["uses"] == len(table)
    with pytest.raises(InvalidSettings, match=r"holds another run: settings\.error_samples"):
        attribute(recorded, tmp_path / "a", per_row=True, error="exact", error_samples=2)


def test_what_is_said_of_the_target_its_loss_its_rows_and_those_that_were_trained_on(
    recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = dict(rows_of(24, seed=1)[3])
    target = {"fresh": [*TARGET, TARGET[0]], "seen": [seen]}
    found = tamis.attribute(run=recorded.folder, target=target, out=tmp_path / "a", model=recorded.model, per_row=True)
    rows = found.manifest["target_rows"]
    assert [row["target"] for row in rows] == ["fresh"] * 6 + ["seen"]
    assert len({row["id"] for row in rows}) == 7 == len(found.samples["scores"][0])
    assert found.manifest["target_trained_on"] == [rows[-1]["id"]]
    assert "1 of 7 target rows were trained on in this run" in caplog.text
    assert "1 of 7 target rows repeat another one; each counts" in caplog.text
    run = open_run(recorded.folder, recorded.model)
    micros = run.micros_of([_row(row) for row in (*TARGET, TARGET[0], seen)], most=1)
    losses = final_values(run.problem, run.state(run.num_steps).theta, micros)
    assert found.summary()["target_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    first = found.summary()["best"][0]
    own = found.uses.to_pandas().query("row == @found.samples.sort_by([('score', 'descending')])['row'][0].as_py()")
    assert first["update"] == own.loc[own["score"].abs().idxmax(), "step"]


def _row(row: dict[str, Any]) -> Any:
    from tamis.runs.trace_inputs import _of_tokens

    return _of_tokens(row, "row")


def padded(row: dict[str, Any], left: int, right: int) -> dict[str, Any]:
    """Plain lists, masked where they are padded."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    return {
        "input_ids": [0] * left + ids + [0] * right,
        "labels": [-100] * left + labels + [-100] * right,
        "attention_mask": [0] * left + [1] * len(ids) + [0] * right,
    }


def test_a_target_of_tokens_is_what_its_mask_and_labels_say_or_refused_by_row(
    recorded: Recorded, tmp_path: Path
) -> None:
    def scores(name: str, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
        found = tamis.attribute(run=recorded.folder, target=rows, out=tmp_path / name, model=recorded.model)
        return found.uses["score"].to_numpy()

    plain = scores("plain", TARGET)
    np.testing.assert_array_equal(scores("padded", [padded(row, 0, 3) for row in TARGET]), plain)
    first, *others = TARGET
    for bad, message in (
        (padded(first, 3, 0), "padded on the left"),
        ({**first, "labels": [label + 1 if label >= 0 else label for label in first["labels"]]}, "labels differ"),
        ({**first, "labels": first["labels"][:-1]}, "equally long, got input_ids"),
        (
            {**first, "input_ids": [float(token) for token in first["input_ids"]]},
            r"got input_ids \[\d+\] of torch.float",
        ),
        ({"messages": []}, "no input_ids; rows of tokens need both"),
        ({"input_ids": first["input_ids"]}, "no labels; rows of tokens need both"),
        ({**first, "input_ids": [["a"]]}, "expected lists of token ids"),
        (
            {key: [10_000 + v if v >= 0 else v for v in first[key]] for key in ("input_ids", "labels")},
            "holds token ids",
        ),
    ):
        with pytest.raises(InvalidInput, match=message) as refused:
            scores("bad", [*others, bad])
        assert f"(in memory):{len(others)}" in str(refused.value)


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def killed_at(count: int, module: Any, work: Callable[[], Any]) -> None:
    """Run ``work`` in another process, which dies at its ``count``-th write of ``module``."""
    child = os.fork()
    if child == 0:
        left, write = [count], module.replace_atomically

        def dying(*args: Any) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*args)

        module.replace_atomically = dying
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_attribution_goes_on_and_ends_in_the_same_bytes(recorded: Recorded, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"secant": 2, "error": "proxy", "diagnose": True}
    whole = attribute(recorded, tmp_path / "whole", **settings)
    # The fifth write: the second segment's scores are there, its state and its mark are not.
    killed_at(5, segment_store, lambda: attribute(recorded, tmp_path / "cut", **settings))
    assert json.loads((tmp_path / "cut/store/sweep/reached.json").read_text()) == {"step": 6}
    resumed = attribute(recorded, tmp_path / "cut", **settings)
    for name in ("uses.parquet", "samples.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert resumed.manifest["curvature_agreement"] == whole.manifest["curvature_agreement"]
    assert "curvature" in whole.manifest["curvature_advice"]
    with pytest.raises(InvalidSettings, match=r"holds another run: settings\.curvature"):
        attribute(recorded, tmp_path / "cut", curvature="none", **settings)
    (tmp_path / "cut/samples.parquet").unlink()
    with pytest.raises(StoreCorrupted, match=r"samples\.parquet is missing or was changed since it was written"):
        attribute(recorded, tmp_path / "cut", **settings)
    (tmp_path / "cut/manifest.json").write_text('{"files": {')
    with pytest.raises(
        StoreCorrupted, match=r"cut/manifest\.json cannot be read .*; remove .*manifest\.json and attribute"
    ):
        attribute(recorded, tmp_path / "cut", **settings)
    (tmp_path / "cut/manifest.json").unlink()
    attribute(recorded, tmp_path / "cut", **settings)
    assert (tmp_path / "whole/samples.parquet").read_bytes() == (tmp_path / "cut/samples.parquet").read_bytes()


def test_a_killed_pass_that_has_no_state_goes_on(recorded: Recorded, tmp_path: Path) -> None:
    whole = attribute(recorded, tmp_path / "whole", method="tracin")
    killed_at(4, segment_store, lambda: attribute(recorded, tmp_path / "cut", method="tracin"))
    assert (tmp_path / "cut/store/sweep/reached.json").is_file()
    assert attribute(recorded, tmp_path / "cut", method="tracin").uses.equals(whole.uses)


def under_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = releases("torch")["torch"]
    monkeypatch.setattr("tamis.runs.manifest.releases", lambda *names: {**releases(*names), "torch": f"{now}.post1"})


def test_a_run_is_not_resumed_under_another_release(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attributed() -> tamis.Attribution:
        return attribute(recorded, tmp_path / "a", method="tracin", diagnose=False)

    def verified() -> tamis.Verification:
        return tamis.verify(
            run=recorded.folder, target=TARGET, out=tmp_path / "v", model=recorded.model, samples=3, methods=["tracin"]
        )

    assert attributed().manifest["libraries"] == releases("torch", "transformers", "peft", "tokenizers")
    assert verified().manifest["tamis"] == tamis.__version__
    for again in (attributed, verified):
        with monkeypatch.context() as patch:
            under_another_torch(patch)
            with pytest.raises(
                InvalidSettings, match=r'holds another run: libraries\.torch was ".*" there and is ".*post1'
            ):
                again()
        with monkeypatch.context() as patch:
            patch.setattr("tamis.runs.manifest.__version__", "99.0")
            with pytest.raises(InvalidSettings, match=r'holds another run: tamis was ".*" there and is "99\.0" now'):
                again()
        again()


def test_embeddings_serve_a_target_that_comes_later(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"form": "matrix", "curvature": "fisher", "masks": 8, "store": tmp_path / "store"}
    first = attribute(recorded, tmp_path / "a", **shared)
    adjoint = attribute(recorded, tmp_path / "b", curvature="fisher", diagnose=False)
    agree = rank_correlation(first.uses["score"].to_numpy(), adjoint.uses["score"].to_numpy())
    assert agree is not None and agree > 0.95  # all but curvature between the masks
    last = first.uses["step"].to_numpy() == 7  # where there is none
    np.testing.assert_allclose(
        first.uses["score"].to_numpy()[last], adjoint.uses["score"].to_numpy()[last], rtol=1e-3, atol=1e-7
    )
    drawn = attribute(recorded, tmp_path / "e", **{**shared, "masks": 6, "mask_share": 0.5, "rescale": True})
    agree = rank_correlation(drawn.uses["score"].to_numpy(), adjoint.uses["score"].to_numpy())
    assert agree is not None and agree > 0.9
    assert not np.allclose(drawn.uses["score"], first.uses["score"], rtol=1e-3)
    monkeypatch.setattr("tamis.trajectory.embeddings.play_segment", lambda *a, **k: pytest.fail("replayed again"))
    other = tamis.attribute(
        run=recorded.folder,
        target=TARGET[:2],
        out=tmp_path / "c",
        model=recorded.model,
        **shared,  # type: ignore[arg-type]
    )
    assert len(other.uses) == len(first.uses)
    under_another_torch(monkeypatch)  # the store is shared, and these embeddings are another torch's
    with pytest.raises(pytest.fail.Exception, match="replayed again"):
        attribute(recorded, tmp_path / "d", **shared)


@pytest.mark.parametrize("form", ["adjoint", "matrix"])
def test_renormalised_removal_gives_the_rest_of_an_update_the_weight(
    recorded: Recorded, tmp_path: Path, form: str
) -> None:
    shared = {"form": form, "curvature": "fisher", "diagnose": False}
    shared |= {"store": tmp_path / "store"} if form == "matrix" else {}
    plain, found = (
        attribute(recorded, tmp_path / removal, removal=removal, **shared).uses.to_pandas()
        for removal in ("subtract", "renormalise")
    )
    assert (plain["row"] == found["row"]).all() and plain.groupby("step")["weight"].nunique().max() > 1
    expected = np.zeros(len(plain))
    for use, (step, weight, score) in enumerate(zip(plain["step"], plain["weight"], plain["score"], strict=True)):
        others = plain[(plain["step"] == step) & (plain.index != use)]
        # Every other row grows by this share of itself, and so does what it does.
        expected[use] = score - weight / others["weight"].sum() * others["score"].sum()
    # Scores are float32, and the two terms of one may cancel.
    np.testing.assert_allclose(found["score"], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_killed_verification_goes_on_and_tells_the_methods_apart(recorded: Recorded, tmp_path: Path) -> None:
    import tamis.runs.verify as module

    def verify(out: Path) -> tamis.Verification:
        return tamis.verify(
            run=recorded.folder, target=TARGET, out=out, model=recorded.model, samples=10, secant=7, seed=1
        )

    killed_at(4, module, lambda: verify(tmp_path / "cut"))
    assert len(list((tmp_path / "cut/truth").iterdir())) == 3
    found = verify(tmp_path / "cut")
    truth = sorted((tmp_path / "cut/truth").iterdir())
    run = open_run(recorded.folder, recorded.model)
    micros = run.micros_of([_row(row) for row in TARGET], most=16)
    for path in truth[::9]:
        said = json.loads(path.read_text())
        assert path.stem == f"update-{said['step']:08d}-place-{said['place']:05d}"
        effect = leave_out_effect(run, said["step"] - 1, said["place"], micros)  # counted from 1, as in uses.parquet
        np.testing.assert_array_equal(said["effect"], effect.double().numpy())
    pairs = pq.read_table(tmp_path / "cut/pairs.parquet").to_pandas()
    effects = [np.mean(json.loads(path.read_text())["effect"]) for path in truth]
    np.testing.assert_allclose(pairs["retrained"], effects, rtol=1e-12)
    worst = (pairs["tracin"] - pairs["retrained"]).abs().idxmax()
    expected = {"step": "step", "place": "place", "score": "tracin", "retrained": "retrained"}
    miss = found.methods["tracin"]["largest_miss"]
    assert miss == {name: pairs.loc[worst, column] for name, column in expected.items()}
    best = found.methods["adamw-influence, finite removal over 7 steps"]
    assert best["spearman"] > 0.95 and best["relative_error"] < 0.1
    assert best["spearman"] >= found.methods["adamw-influence"]["spearman"] > found.methods["tracin"]["spearman"]
    assert found.methods["adamw-influence"]["low"] <= found.methods["adamw-influence"]["spearman"]


@pytest.mark.parametrize("counts", [(1, 3), (4, 9), (9, 18), (17, 18)])
def test_more_samples_contain_fewer_also_beyond_half_of_all_uses(recorded: Recorded, counts: tuple[int, int]) -> None:
    run = open_run(recorded.folder, recorded.model)
    total = sum(len(run.step(index).rows) for index in range(run.num_steps))
    few, many = (choose_uses(run, count * total // 18, 5) for count in counts)
    assert set(few) < set(many) and len(many) == len(set(many)) == counts[1] * total // 18
    assert few == sorted(few)
    assert len(choose_uses(run, 2 * total, 5)) == total


def test_a_verification_grows_with_samples_and_takes_other_scores(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrained: list[tuple[int, int]] = []

    def counted(run: Any, step: int, place: int, *more: Any, **settings: Any) -> torch.Tensor:
        retrained.append((step, place))
        return leave_out_effect(run, step, place, *more, **settings)

    monkeypatch.setattr("tamis.runs.verify.leave_out_effect", counted)

    def verify(out: str, **settings: Any) -> tamis.Verification:
        return tamis.verify(run=recorded.folder, target=TARGET, out=tmp_path / out, model=recorded.model, **settings)

    few = verify("v", samples=4)
    assert len(retrained) == 4
    more = verify("v", samples=6)
    assert len(retrained) == len(set(retrained)) == 6 and more.manifest["samples"] == 6
    assert verify("v", samples=4).methods == few.methods
    rows = verify("v", samples=4, per_row=True, curvature="none", methods=["tracin"])
    assert len(retrained) == 6
    afresh = verify("w", samples=4, per_row=True, curvature="none", methods=["tracin"])
    assert rows.methods == afresh.methods != {"tracin": few.methods["tracin"]}


def test_what_others_damaged_is_said_and_made_again(
    recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def verify() -> tamis.Verification:
        return tamis.verify(run=recorded.folder, target=TARGET, out=tmp_path / "v", model=recorded.model, samples=3)

    whole = verify()
    path = min((tmp_path / "v/truth").iterdir())
    own = path.read_bytes()
    path.write_bytes(own[:20])
    assert verify().methods == whole.methods and path.read_bytes() == own
    assert f"{path} cannot be read" in caplog.text
    store = tmp_path / "v/store/scores-adamw-influence-exact-0-mean"
    for name in (min(store.glob("scores-*")).name, "reached.json"):
        content = (store / name).read_bytes()
        (store / name).write_bytes(content[:9])
        with pytest.raises(StoreCorrupted, match=f"{name} cannot be read .* delete the folder"):
            verify()
        (store / name).write_bytes(content)
    assert verify().methods == whole.methods


def test_the_summary_names_the_samples_at_either_end(recorded: Recorded, tmp_path: Path) -> None:
    found = attribute(recorded, tmp_path / "a")
    table = found.samples.to_pandas().sort_values("score")
    best, worst = found.summary()["best"], found.summary()["worst"]
    assert [one["score"] for one in worst] == table["score"].head(5).tolist()
    assert [one["score"] for one in best] == table["score"].tail(5).tolist()[::-1]
    assert best[0]["sample"] == f"position {table['position'].iloc[-1]}" and found.summary()["sources"] == []
    names = pa.array(["a", None] + ["b"] * (len(table) - 2))
    named = found.samples.append_column("source", names).append_column("id", names)
    one, two = dataclasses.replace(found, samples=named).summary()["sources"]
    assert {one["source"], two["source"]} == {"a", "b"} and one["mean_score"] > two["mean_score"]
    of_b = named.filter(pc.equal(named["source"], "b")).to_pandas()
    b = one if one["source"] == "b" else two
    assert b["samples"] == len(of_b) and b["uses"] == of_b["uses"].sum()
    np.testing.assert_allclose(b["mean_score"], of_b["score"].sum() / of_b["uses"].sum())


def test_a_record_with_a_damaged_end_or_a_strange_state_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    folder = tmp_path / "record"
    shutil.copytree(recorded.folder, folder)
    state = max((folder / "states").iterdir())
    tensors = load_file(state)
    save_file({name: tensor[:-1] if tensor.ndim else tensor for name, tensor in tensors.items()}, state)
    copy = Recorded(folder, recorded.model)
    with pytest.raises(StoreCorrupted, match="it is another run's: record the run again"):
        attribute(copy, tmp_path / "a")
    state.unlink()
    with pytest.raises(StoreCorrupted, match=f"{state.name} cannot be read .No such file"):
        attribute(copy, tmp_path / "c")
    (folder / "end.json").write_text('{"steps"')
    with pytest.raises(StoreCorrupted, match=r"end\.json cannot be read"):
        attribute(copy, tmp_path / "b")


def test_a_folder_of_others_is_left_as_it_is(recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for verb in (tamis.attribute, tamis.verify):
        with pytest.raises(InvalidSettings, match="was not written by tamis"):
            verb(run=recorded.folder, target=TARGET, out=tmp_path, model=recorded.model)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_target_rows_that_are_left_out_are_named(
    recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = {**TARGET[0], "labels": [-100] * len(TARGET[0]["labels"])}
    found = tamis.attribute(
        run=recorded.folder, target=[*TARGET[:2], silent], out=tmp_path / "a", model=recorded.model, method="tracin"
    )
    assert len(found.manifest["target_rows"]) == 2
    assert found.manifest["target_left_out"] == ["target (in memory):2"]
    # Rows of tokens are never cut: nothing is said of a length.
    assert "left out of the target (1), for want of a supervised token: target (in memory):2" in caplog.text


def test_summary_matrices_that_cannot_fit_are_refused_with_what_would(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(open_run(recorded.folder, recorded.model).state(0).theta)
    matrix: dict[str, Any] = {"form": "matrix", "curvature": "fisher", "store": tmp_path / "store"}
    with monkeypatch.context() as patch:
        patch.setattr("tamis.runs.attribute.free_memory", lambda device: 3 * count**2 * 4 / 2.5)
        with pytest.raises(InvalidSettings, match="pass --masks 3 or more"):
            attribute(recorded, tmp_path / "a", **matrix)
        with pytest.raises(InvalidSettings, match="pass a smaller --mask-share"):
            attribute(recorded, tmp_path / "b", **matrix, masks=4, mask_share=0.9)
        attribute(recorded, tmp_path / "c", **matrix, masks=3)
        patch.setattr("tamis.runs.attribute.free_memory", lambda device: 1)  # what is stored needs none
        attribute(recorded, tmp_path / "d", **matrix, masks=3)


@pytest.mark.parametrize("start", [0, 4])
def test_a_state_that_a_killed_pass_no_longer_needed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    folder = tmp_path / "sweep"
    store, steps = segment_store.SegmentStore(folder), [{"scores": torch.zeros(1)} for _ in range(2)]
    store.write(6, 8, steps, {"adjoint": torch.zeros(1)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "glob", killed)
        store.write(start, 6, steps, {"adjoint": torch.ones(1)} if start else {})
    assert segment_store.SegmentStore(folder).reached == start
    assert [path.name for path in folder.glob("state-*")] == ["state-00000004.safetensors"] * bool(start)


def test_a_pass_whose_state_is_gone_says_what_to_do(tmp_path: Path) -> None:
    store = segment_store.SegmentStore(tmp_path / "sweep")
    store.write(4, 6, [{"scores": torch.zeros(1)} for _ in range(2)], {"adjoint": torch.zeros(1)})
    (tmp_path / "sweep/state-00000004.safetensors").unlink()
    again = segment_store.SegmentStore(tmp_path / "sweep")
    assert again.reached == 4
    with pytest.raises(StoreCorrupted, match="two processes may have written there at once: delete the folder"):
        again.tensors(torch.zeros(1))


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    code = """
import multiprocessing, os, signal, sys, threading, time
def wait(number, folder):
    from tamis.runs.verify import _end_with_parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    open(f"{folder}/{os.getpid()}", "w").close()
    time.sleep(600)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=wait, args=(0, sys.argv[1])).start()
    while not os.listdir(sys.argv[1]):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script, folder = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(code)
    folder.mkdir()
    assert subprocess.run([sys.executable, str(script), str(folder)], check=False).returncode == -signal.SIGKILL
    [pid] = [int(path.name) for path in folder.iterdir()]
    until = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(pid, 0)  # asks only whether it is there
            time.sleep(0.05)


def test_samples_that_start_from_one_state_are_retrained_by_one_process_unless_others_idle() -> None:
    uses = [(0, 1), (2, 0), (3, 4), (3, 5), (9, 0)]
    assert _shares(uses, [0, 3, 6, 10], 1) == [[(0, 1), (2, 0)], [(3, 4), (3, 5)], [(9, 0)]]
    assert _shares(uses, [0, 10], 1) == [[(0, 1), (2, 0)], [(3, 4), (3, 5)], [(9, 0)]]
    assert _shares(uses, [0, 10], 4) == [[use] for use in uses]


def test_the_interval_of_an_agreement_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(40):
        truth = rng.standard_normal((60, 1))
        scores = truth + rng.standard_normal((60, 1))
        found = fidelity(scores, truth, seed=seed)
        inside.append(found.low <= 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2) <= found.high)  # Spearman of Gaussians
    assert sum(inside) >= 33  # 38 expected; 33 or fewer of 40 at 95 % has probability 0.3 %, and this seed is fixed
    assert fidelity(np.zeros((5, 1)), np.ones((5, 1))).spearman is None


def test_no_interval_is_given_below_eight_samples() -> None:
    truth = np.arange(8.0)[:, None]
    for count in (3, 7):
        found = fidelity(truth[:count], truth[:count])
        assert found.spearman == 1 and (found.low, found.high, found.samples) == (None, None, count)
    turned = np.concatenate([truth[1::-1], truth[2:]])
    eight = fidelity(turned, truth)
    assert eight.low is not None and eight.high is not None and eight.low < eight.high
    perfect = fidelity(truth, truth)  # every draw has the same order
    assert (perfect.spearman, perfect.low, perfect.high) == (1, None, None)


def test_several_processes_are_refused_before_they_write_over_each_other(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tamis.runs.trace_inputs.world_size", lambda: 3)
    with pytest.raises(InvalidSettings, match=r"`tamis attribute` works in one process, and 3 were started; run it wi"):
        attribute(recorded, tmp_path / "never")
    with pytest.raises(InvalidSettings, match=r"`tamis verify` .* without a launcher \(--processes shares out"):
        tamis.verify(run=recorded.folder, target=TARGET, model=recorded.model, out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_settings_that_contradict_each_other_are_refused(recorded: Recorded, tmp_path: Path) -> None:
    for settings, message in (
        ({"method": "dvemb"}, "expected one of adamw-influence"),
        ({"form": "matrix"}, "the matrix form is of the empirical Fisher"),
        ({"method": "tracin", "secant": 3}, "secant: is of adamw-influence"),
        ({"method": "tracin", "diagnose": True}, "diagnose: tracin knows no curvature"),
        ({"method": "tracin", "curvature": "none"}, "curvature: tracin knows no curvature"),
        ({"masks": 3}, "masks: the adjoint form needs no masks"),
        ({"rescale": True}, "rescale: the adjoint form needs no masks"),
        ({"mask_share": 0.5}, "mask_share: the adjoint form needs no masks"),
        ({"form": "matrix", "curvature": "fisher", "rescale": True}, "leaves no curvature out"),
        ({"form": "matrix", "curvature": "fisher", "mask_share": 1.0}, "mask_share=1.0: expected a share above 0"),
        ({"error": "proxy", "removal": "renormalise"}, "error: is that of --removal subtract"),
    ):
        with pytest.raises(InvalidSettings, match=message):
            attribute(recorded, tmp_path / "never", **settings)
    chats = [{"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]}]
    with pytest.raises(InvalidInput, match=r"text cannot be made tokens: pass the model as a name or folder"):
        tamis.attribute(run=recorded.folder, target=chats, model=recorded.model, out=tmp_path / "never")
    with pytest.raises(InvalidSettings, match="a model object cannot be given to several"):
        tamis.verify(run=recorded.folder, target=TARGET, model=recorded.model, processes=2, out=tmp_path / "v")
    with pytest.raises(InvalidInput, match="holds no recorded run"):
        tamis.attribute(run=tmp_path / "nothing", target=TARGET, out=tmp_path / "o", model=recorded.model)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"command": "tamis train --config run.yaml"}')
    with pytest.raises(InvalidInput, match=r"run holds no recorded run: .*give the folder that `tamis train` was"):
        tamis.attribute(run=tmp_path / "run", target=TARGET, out=tmp_path / "o", model=recorded.model)
    assert not list(tmp_path.glob("never*"))
    assert tuple(tamis.settings.trace.TRACE_METHODS) == sweep.METHODS  # type: ignore[attr-defined]


def test_the_three_verbs_work_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_run(tmp_path, rows=24)
    common = ["--json", "--quiet"]
    train = [
        "train",
        "--model",
        str(tiny.model),
        "--pool",
        str(tiny.pool),
        "--target",
        str(tiny.target),
        "--steps",
        "4",
    ]
    more = ["--method", "full", "--keep", "4", "--oversample", "1", "--lora-rank", "2", "--max-length", "64"]
    record = ["--record", str(tmp_path / "record"), "--record-every", "2", "--out", str(tmp_path / "t")]
    assert run_command([*train, *more, *record, *common]) == 0
    following = json.loads(capsys.readouterr().out)["next"]
    target = ["--target", str(tiny.target)]
    run_and_out = ["--out", f"{tmp_path / 'record'}-scores", "--run", str(tmp_path / "record")]
    assert following == shlex.join(["tamis", "attribute", "--max-length", "64", *target, *run_and_out])
    template = LogReader(tmp_path / "record").manifest["chat_template"]
    assert template == json.loads((tiny.model / "tokenizer_config.json").read_text()).get("chat_template", template)
    trace = ["--run", str(tmp_path / "record"), "--target", str(tiny.target), "--max-length", "64", *common]
    assert run_command(["attribute", *trace, "--out", str(tmp_path / "a")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["updates"] == 4 and summary["uses"] == 16

    samples = pq.read_table(summary["scores_by_sample"])
    pool = [json.loads(line) for line in tiny.pool.read_text().splitlines()]
    for sample in samples.to_pylist():
        assert sample["id"] == pool[sample["file_row"]].get("id", sample["id"])
    assert run_command(["verify", *trace, "--samples", "4", "--out", str(tmp_path / "v")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["methods"]) == {"adamw-influence", "sgd-influence", "tracin"} and summary["samples"] == 4
    spread = ["verify", *trace, "--samples", "4", "--processes", "2", "--out"]
    assert run_command([*spread, str(tmp_path / "w")]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == summary["methods"]
    with monkeypatch.context() as patch:  # as if the system had killed one of them
        patch.setattr("tamis.runs.verify.as_completed", raising(BrokenProcessPool()))
        assert run_command([*spread, str(tmp_path / "x")]) == 2
    assert "2 processes was killed" in " ".join(capsys.readouterr().err.split())
    # Several processes check no replay of their own: it is done before they start.
    monkeypatch.setattr("tamis.runs.verify.ProcessPoolExecutor", lambda *a, **k: pytest.fail("retrained unchecked"))
    path, lost = tmp_path / "record/segments/00000000-00000002.safetensors", next((tmp_path / "v/truth").iterdir())
    own, tensors = path.read_bytes(), load_file(path)
    save_file({**tensors, "losses": tensors["losses"] * 2}, path)
    lost.unlink()
    assert run_command(["verify", *trace, "--samples", "4", "--processes", "2", "--out", str(tmp_path / "v")]) == 2
    assert "and replaying it gives" in " ".join(capsys.readouterr().err.split())
    path.write_bytes(own)
    assert run_command(["attribute", *trace, "--max-length", "5", "--out", str(tmp_path / "never")]) == 2
    assert "carries a supervised token among its first 5 (--max-length)" in " ".join(capsys.readouterr().err.split())
    # The record keeps its own names when another run asks for its folder; a finished run is not recorded later.
    names = (tmp_path / "record/examples.parquet").read_bytes()
    assert run_command([*train, *more, *record[:-1], str(tmp_path / "u"), "--seed", "1", *common]) == 2
    assert "holds a recorded run already" in capsys.readouterr().err
    assert (tmp_path / "record/examples.parquet").read_bytes() == names
    assert run_command([*train, *more, *record, *common]) == 0
    record[1] = str(tmp_path / "elsewhere")
    assert run_command([*train, *more, *record, *common]) == 2
    assert "finished, and its record is not in" in " ".join(capsys.readouterr().err.split())


def test_a_training_run_killed_while_its_rows_are_looked_for_names_them_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    tiny, record = make_run(tmp_path, rows=24), tmp_path / "record"
    train = ["train", "--model", str(tiny.model), "--pool", str(tiny.pool), "--target", str(tiny.target), "--json"]
    train += ["--method", "full", "--keep", "4", "--oversample", "1", "--lora-rank", "2", "--max-length", "64"]
    train += ["--steps", "2", "--record", str(record), "--out", str(tmp_path / "t"), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(tamis.TrajectoryRecorder, "_positions", killed)
        assert run_command(train) != 0
    assert LogReader(record).end is not None and not (record / "positions.safetensors").exists()
    assert run_command(train) == 0
    positions = LogReader(record).positions()
    assert len(positions) == 8 and positions.min() >= 0


def test_a_target_is_made_rows_by_the_template_of_the_run(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, rows=16)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    shared: dict[str, Any] = {"model": tiny.model, "pool": tiny.pool, "target": tiny.target}
    options: dict[str, Any] = {"method": "full", "keep": 4, "oversample": 1, "steps": 2, "lora_rank": 2}
    tamis.train(**shared, **options, chat_template=template, record=tmp_path / "record", out=tmp_path / "t")
    assert LogReader(tmp_path / "record").manifest["chat_template"] == template
    trace: dict[str, Any] = {"run": tmp_path / "record", "target": tiny.target}
    plain = tamis.attribute(**trace, out=tmp_path / "a")
    given = tamis.attribute(**trace, chat_template=template, out=tmp_path / "b")
    other = tamis.attribute(**trace, chat_template=template.replace("</s>", "</s></s>"), out=tmp_path / "c")
    assert plain.uses.equals(given.uses) and not plain.uses.equals(other.uses)
