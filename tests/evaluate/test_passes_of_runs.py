"""Every method is run on a tiny model, and its account is what the plan said, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from planned_runs import planned_by_stage, run_and_plan, spent_by_stage
from tamis.evaluate import distillation_passes
from tamis.score.distillation import choice
from tiny_run import TinyRun, chat, make_run, write_rows

TWO_VECTORS_GB = 2e-4  # of the tiny model's whole gradients (18,432 numbers); 13 of its factorized features fit
ONE_FEATURE_GB = 2e-5  # of features of 8192 or 3,584 numbers


@dataclass(frozen=True)
class Problem:
    """A pool with an unusable row, and two targets of three rows and of one."""

    run: TinyRun
    targets: dict[str, Path]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("run")
    run = make_run(folder, rows=24)
    with run.pool.open("a", encoding="utf-8") as file:
        file.write('{"id": "empty", "messages": [{"role": "user", "content": "Nobody answers."}]}\n')
    rows = [chat(f"How much is {n} and {n}?", f"{2 * n}" * n, id=f"sum-{n}") for n in (1, 2, 3)]
    return Problem(
        run=run,
        targets={
            "sums": write_rows(folder / "sums.jsonl", rows),
            "words": write_rows(folder / "words.jsonl", [chat("A word?", "lamp", id="lamp")]),
        },
    )


def check(
    problem: Problem, out: Path, method: str, chosen: dict[str, Any], *, drawn: bool = False, **settings: Any
) -> None:
    """Rows of every stage are as planned; of all rows of a corpus, not ``drawn`` ones, tokens and operations too."""
    manifest, plan = run_and_plan(
        out,
        method=method,
        chosen=chosen,
        model=problem.run.model,
        pool=problem.run.pool,
        target=problem.targets,
        on_bad_row="skip",
        **{"budget": 4, **settings},
    )
    assert planned_by_stage(plan, "rows") == spent_by_stage(manifest, "rows")
    if not drawn:
        assert planned_by_stage(plan, "tokens") == pytest.approx(spent_by_stage(manifest, "tokens"), rel=1e-9)
        assert planned_by_stage(plan, "tflops") == pytest.approx(spent_by_stage(manifest, "tflops"), rel=1e-9)


# What a run with these settings does; "drawn" where a random part of the pool decides the tokens.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a draw": ("uniform", {}, {}),
    "a draw without flagged rows": ("uniform", {}, {"drop_flagged": True}),
    "words": ("bm25", {}, {}),
    "losses": ("mid-ppl", {}, {"drop_flagged": True}),
    "states": ("rds+", {}, {"drop_flagged": True}),
    "a warm-up per target": ("loss-drop", {"warmup_steps": 3, "warmup_update_rows": 2}, {"drawn": True}),
    "features": ("tracin", {}, {"drop_flagged": True}),
    "features in float64, by the mean": ("tracin", {}, {"dtype": "float64", "aggregate": "mean"}),
    "features with the head": ("tracin", {"include_head": True}, {}),
    "features that pass": ("tracin", {"keep_features": False, "memory_gb": ONE_FEATURE_GB}, {}),
    "one row a pass": ("tracin", {}, {"batch_invariant": True}),
    "exact": ("tracin", {"memory_gb": TWO_VECTORS_GB}, {"projection": "none"}),
    "exact with the head": ("tracin", {"projection": "none", "memory_gb": TWO_VECTORS_GB, "include_head": True}, {}),
    "exact, by the mean": ("tracin", {"projection": "none"}, {"aggregate": "mean"}),
    "exact dot, by the mean": ("tracin", {"projection": "none", "normalize": "dot"}, {"aggregate": "mean"}),
    "adam": ("less", {"warmup_epochs": 1, "warmup_update_rows": 4}, {"drawn": True}),
    "adam that passes": ("less", {"warmup_epochs": 1, "keep_features": False, "memory_gb": ONE_FEATURE_GB}, {}),
    "exact adam": ("less", {"warmup_epochs": 2, "projection": "none"}, {"aggregate": "mean"}),
    "ekfac": ("influence-function", {"memory_gb": TWO_VECTORS_GB}, {}),
    "kfac, by the mean": (
        "influence-function",
        {"strategy": "kfac", "factor_rows": 7},
        {"aggregate": "mean", "drawn": True},
    ),
    "a recorded run": ("adamw-influence", {"epochs": 2, "curvature": "ggn"}, {}),
    "a shortlist by words": ("tracin", {}, {"shortlist": "bm25:2x", "drawn": True}),
    "a shortlist by losses": ("tracin", {}, {"shortlist": "mid-ppl:2x", "drawn": True, "drop_flagged": True}),
    "a shortlist by losses, which are known then": (
        "influence-distillation",
        {"warmup": "none"},
        {"shortlist": "mid-ppl:2x", "drawn": True, "drop_flagged": True},
    ),
    "a shortlist by states": ("less", {"warmup_epochs": 1}, {"shortlist": "rds+:2x", "drawn": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_makes_the_passes_that_were_planned(problem: Problem, tmp_path: Path, name: str) -> None:
    method, chosen, settings = RUNS[name]
    check(problem, tmp_path / "out", method, chosen, **settings)


@pytest.fixture
def few_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings are compared on 4 landmarks and kernels on 6, so that 8 landmarks are many."""
    for module in (choice, distillation_passes):
        monkeypatch.setattr(module, "COMPARED", 4)
        monkeypatch.setattr(module, "KERNELS_COMPARED", 6)


HIDDEN: dict[str, Any] = {"warmup": "none", "landmarks": 8, "embedding": "hidden-error"}
SECOND: dict[str, Any] = {"weights": "second-order", "eta": 0.1}
SMALL_WARMUP: dict[str, Any] = {"warmup": "lora", "warmup_epochs": 1, "warmup_update_rows": 2, "lora_rank": 2}

DISTILLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all rows by default": ({"warmup": "none"}, {}),
    "all rows, after a warm-up of LoRA": ({**SMALL_WARMUP, "landmarks": "all"}, {}),
    "after a warm-up of all weights": ({**SMALL_WARMUP, "warmup": "full", "lora_rank": 8}, {}),
    "carried": (HIDDEN, {}),
    "carried after a warm-up, by the mean": ({**HIDDEN, **SMALL_WARMUP}, {"aggregate": "mean"}),
    "carried without the target's embedding, not kept": ({**HIDDEN, "residual": False, "keep_embeddings": False}, {}),
    "carried in float64": (HIDDEN, {"dtype": "float64"}),
    "carried by words": ({**HIDDEN, "embedding": "tfidf"}, {}),
    "carried by several directions": (
        {**HIDDEN, "embedding": "jvp", "directions": 2, "combine": "concat"},
        {},
    ),
    "landmarks chosen by embeddings": ({**HIDDEN, "landmark_rule": "k-means++"}, {}),
    "landmarks chosen by embeddings that are not kept": (
        {**HIDDEN, "landmark_rule": "leverage", "keep_embeddings": False},
        {},
    ),
    "landmarks chosen by embeddings of a shortlist": (
        {**HIDDEN, "landmark_rule": "k-means++"},
        {"shortlist": "bm25:4x"},
    ),
    "the size of the second order": ({**HIDDEN, "hessian_ratio": True, "eta": 0.1}, {}),
    "the size of the second order, of all rows, by the mean": (
        {"warmup": "none", "hessian_ratio": True, "eta": 0.1, "hessian_landmarks": 5},
        {"aggregate": "mean"},
    ),
    "second order": ({**HIDDEN, **SECOND, "hessian_landmarks": 5}, {}),
    "second order on all landmarks, by the mean": ({**HIDDEN, **SECOND}, {"aggregate": "mean"}),
    "second order in little memory": ({**HIDDEN, **SECOND, "memory_gb": 1.5e-3}, {}),
    "second order, embeddings not kept": (
        {**HIDDEN, **SECOND, "hessian_landmarks": 5, "keep_embeddings": False},
        {},
    ),
    "second order of a shortlist": ({**HIDDEN, **SECOND, "hessian_landmarks": 5}, {"shortlist": "bm25:4x"}),
    "only the second order is carried": (
        {"warmup": "none", **SECOND, "hessian_landmarks": 7, "embedding": "hidden-error"},
        {},
    ),
    "nothing is carried": ({"warmup": "none", **SECOND}, {}),
    "second order in Adam's form": (
        {**HIDDEN, **SMALL_WARMUP, **SECOND, "form": "adam", "hessian_landmarks": 5},
        {},
    ),
    "second order in Adam's form, by the mean, all landmarks": (
        {**HIDDEN, **SMALL_WARMUP, **SECOND, "form": "adam"},
        {"aggregate": "mean"},
    ),
    "as published": (
        {"preset": "paper", "landmarks": 8, "warmup_rows": 6, "warmup_update_rows": 3, "projection_dim": 512},
        {},
    ),
}


@pytest.mark.parametrize("name", DISTILLATIONS)
@pytest.mark.usefixtures("few_compared")
def test_influence_distillation_makes_the_passes_that_were_planned(problem: Problem, tmp_path: Path, name: str) -> None:
    chosen, settings = DISTILLATIONS[name]
    check(problem, tmp_path / "out", "influence-distillation", chosen, drawn=True, **settings)
