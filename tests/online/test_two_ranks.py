"""Two gloo processes make one choice over all candidates, and the update of one process that sees them all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tamis
from online_case import moments, rows
from online_two_ranks import METHODS, main
from oracles import reference_loss
from tamis.online import Full
from tamis.online.fate import read_candidates
from tamis.online.measure import exact_interactions
from tamis.online.step import OnlineStep
from tiny_models import one_row, random_batch, tiny_model

TESTS = Path(__file__).parents[1]


def launch(script: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS), str(Path(tamis.__file__).parents[1])]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared.update(
        CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths)
    )
    running = [
        subprocess.Popen(
            [sys.executable, str(TESTS / script), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs


@pytest.mark.slow
def test_two_processes_train_as_one_that_sees_all_candidates(tmp_path: Path) -> None:
    for name in METHODS:
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "one" / name).mkdir(parents=True)
        main(tmp_path / "one" / name, name, 8)
    launch("online_two_ranks.py", tmp_path / "two")
    for name in METHODS:
        compare(tmp_path / "one" / name, tmp_path / "two" / name, measured=name != "full")


def test_processes_with_unequal_shares_measure_what_one_would(tmp_path: Path) -> None:
    launch("online_uneven_ranks.py", tmp_path)
    first, second = (torch.load(tmp_path / f"uneven-{rank}.pt") for rank in range(2))
    expected = exact_interactions("metric", rows(), moments(), gather=lambda x: x)
    for found in (first, second):
        torch.testing.assert_close(found["gram"], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found["squares"], expected.diagonal(), rtol=1e-12, atol=0)
        assert float(found["total"]) == pytest.approx(float(expected.sum()), rel=1e-6)  # the sum's copy is in float32
    # One process has no candidate of the choice, and one has no target row.
    model, batch = tiny_model("gpt2"), random_batch((6, 5), seed=1)
    for name in ("uniform", "tracin"):
        assert torch.equal(first[f"{name}-rows"], second[f"{name}-rows"])
        (chosen,) = first[f"{name}-rows"].tolist()
        one = one_row(batch, chosen)
        names = OnlineStep(model, Full()).params
        grads = torch.autograd.grad(reference_loss(model, one.input_ids[0], one.supervised[0]), list(names.values()))
        for found in (first, second):
            torch.testing.assert_close(found[name], torch.cat([g.flatten() for g in grads]), rtol=1e-9, atol=1e-12)


def compare(one: Path, two: Path, *, measured: bool) -> None:
    alone, first, second = (torch.load(path) for path in (one / "rank-0.pt", two / "rank-0.pt", two / "rank-1.pt"))
    for key, param in alone["params"].items():
        assert torch.equal(first["params"][key], second["params"][key]), key  # the same bits in every process
        torch.testing.assert_close(first["params"][key], param, rtol=0, atol=1e-8)
    rows = [read_candidates(folder / "candidates").to_pylist() for folder in (one, two)]
    kept = [sorted((row["choice"], row["row"], row["kept"]) for row in found) for found in rows]
    assert kept[0] == kept[1]
    weights = [{(row["choice"], row["row"]): row["weight"] for row in found} for found in rows]
    for key, weight in weights[0].items():
        assert weights[1][key] == pytest.approx(weight, abs=1e-7)
    for key in ("selection/target_loss", "selection/realised_drop", "selection/predicted_drop"):
        values = [[entry[key] for entry in found["log"] if key in entry] for found in (alone, first)]
        assert values[0] == pytest.approx(values[1], abs=1e-8)
        assert bool(values[0]) == measured
