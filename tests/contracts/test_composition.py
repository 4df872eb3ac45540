"""Scorers, models, projections and selectors compose: the pairs that the documentation calls tested are run here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

import tamis
from composition_cases import CASES, MODELS, SELECTORS, Case, combines
from proxy_case import SETTINGS
from tamis.errors import InvalidSettings
from tamis.model.load import ModelSettings, load_model
from tamis.notation import PROJECTION_NAMES
from tiny_run import TinyRun, make_run

QUICK: dict[str, dict[str, Any]] = {
    "less": {"warmup_epochs": 1, "warmup_pool_share": 0.3, "warmup_update_rows": 2, "lora_rank": 2},
    "loss-drop": {"warmup_steps": 1, "lora_rank": 2},
    "influence-distillation": {"landmarks": 6, "warmup_epochs": 1, "warmup_update_rows": 2, "lora_rank": 2,
                               "embedding": "error"},
    "influence-function": {"factor_rows": 6},
    "adamw-influence": {"update_rows": 8, "lora_rank": 2, "curvature": "none"},
}  # fmt: skip
POOL_ROWS = 24


@dataclass(frozen=True)
class Bench:
    """A small pool with copies, its target, and one model of each kind."""

    run: TinyRun
    pool: Path
    models: dict[str, Path]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    run = make_run(folder / "run", rows=120)
    lines = run.pool.read_text(encoding="utf-8").splitlines()
    pool = folder / "pool.jsonl"
    pool.write_text("\n".join([*lines[: POOL_ROWS - 2], *lines[-2:]]) + "\n", encoding="utf-8")

    opened = load_model(ModelSettings(name=str(run.model), device="cpu"))
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(opened.model, config).save_pretrained(folder / "adapter")
    asked: dict[str, Any] = {"model": run.model, "pool": run.pool, "target": run.target, "report": False}
    tamis.proxy(**asked, **SETTINGS, out=folder / "proxy")
    measured = ("probe_rows", "held_out_rows", "projection_dim", "sweep", "device")
    blocks = {name: SETTINGS[name] for name in measured}  # blocks that are left out are neither factored nor aligned
    tamis.proxy(**asked, **blocks, preset="layer-extraction", out=folder / "blocks")
    places = (run.model, folder / "adapter", folder / "proxy", folder / "blocks")
    return Bench(run=run, pool=pool, models=dict(zip(MODELS, places, strict=True)))


def select(bench: Bench, case: Case, out: Path) -> tamis.Selection:
    settings = case.settings()
    if case.projection is None:
        settings.pop("projection", None)
    method = {"set": QUICK.get(case.method, {})}
    return tamis.select(
        model=bench.models[case.model], pool=bench.pool, target=bench.run.target, out=out, report=False, device="cpu",
        dtype="float32", **method, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, vars(case).values())).replace(" ", "_"))
def test_a_selection_of_these_parts_is_whole(case: Case, bench: Bench, tmp_path: Path) -> None:
    made = select(bench, case, tmp_path)
    table = made.table
    scored = table["score"].to_numpy()
    known = np.isfinite(scored)
    taken = table["selected"].to_numpy()
    assert set(made.order.tolist()) == set(np.flatnonzero(taken).tolist())
    if case.selector == "token budget":
        assert 0 < table["tokens"].to_numpy()[taken].sum() <= 500
    else:
        assert taken.sum() == 6
    expected = {"behind a shortlist": 18}.get(case.selector, POOL_ROWS)
    assert known.sum() == expected, "a row without a score, or with one that is no number"
    assert known[taken].all()
    if case.selector == "by source":
        assert table["landmark"].to_numpy().sum() <= 8, "four rows of each of the two sources"
    copies = table["duplicate_of"].to_numpy()
    assert not any(taken[row] and taken[copies[row]] for row in np.flatnonzero(copies >= 0)), "both copies were taken"
    assert made.manifest["method"]["name"] == case.method
    if case.projection is not None:
        assert made.manifest["method"]["projection"] == case.projection
    if case.selector == "without flagged rows":
        assert not (taken & table["flagged"].to_numpy()).any()


def test_every_pair_that_the_settings_accept_is_run() -> None:
    """The documentation's tables say tested wherever they say anything: a new part has to be added to the cases."""
    met = {(case.method, part) for case in CASES for part in (case.model, case.selector, case.projection)}
    for method in {case.method for case in CASES}:
        selectors = [name for name in SELECTORS if combines(method=method, selector=name)]
        assert {(method, part) for part in (*MODELS, *selectors)} <= met
        possible = {(method, name) for name in PROJECTION_NAMES if combines(method=method, projection=name)}
        assert possible <= met
    assert {(p, m) for p in PROJECTION_NAMES for m in MODELS} <= {(case.projection, case.model) for case in CASES}


@pytest.mark.parametrize("method", ["bm25", "influence-function"])
def test_a_projection_for_a_method_that_has_none_is_refused(method: str, bench: Bench, tmp_path: Path) -> None:
    assert not combines(method=method, projection="hadamard")
    with pytest.raises(
        InvalidSettings, match="projects nothing: it compares no gradients, or exact ones; leave it out"
    ):
        select(bench, Case(method=method, model=MODELS[0], selector="mean", projection="hadamard"), tmp_path)
