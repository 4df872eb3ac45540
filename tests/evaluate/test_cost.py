"""A plan of a real folder and pool, measured and assumed, held against the manifest of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tamis
from tamis.errors import InvalidInput, InvalidSettings
from tamis.evaluate.cost import PlanResult, compare_with_run, estimate_plan
from tamis.settings import PlanSettings
from tiny_run import TinyRun, make_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


def plan_of(tiny: TinyRun, **settings: Any) -> PlanResult:
    values: dict[str, Any] = {"model": str(tiny.model), "pool": str(tiny.pool), "target": str(tiny.target)}
    return estimate_plan(PlanSettings(**{**values, **settings}))


def test_a_plan_holds_every_method_and_a_cascade_for_the_dear_ones(tiny: TinyRun) -> None:
    plan = plan_of(tiny, budget="5%")
    found = [(m.method, m.shortlist) for m in plan.methods]
    assert found == [
        *(("uniform", None), ("length", None), ("bm25", None), ("loss-drop", None), ("mid-ppl", None), ("rds+", None)),
        *(("tracin", None), ("tracin", "bm25:5x"), ("less", None), ("less", "bm25:5x")),
        *(("influence-function", None), ("influence-function", "bm25:5x"), ("influence-distillation", None)),
        ("adamw-influence", None),
    ]
    assert plan.pool.rows == 60 and plan.target.rows == 4 and plan.budget_rows == 3
    cascade = plan.methods[7]
    assert cascade.scored_rows == 15
    assert cascade.tflops < plan.methods[6].tflops


def test_no_cascade_is_shown_where_it_would_keep_everything(tiny: TinyRun) -> None:
    assert all(m.shortlist is None for m in plan_of(tiny, budget="50%").methods)


@pytest.mark.parametrize("shortlist", [None, "bm25:2x", "sources:5"])
@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        ("tracin", {}),
        ("mid-ppl", {}),
        ("rds+", {}),
        ("influence-function", {}),
        ("adamw-influence", {}),
    ],
)
def test_the_plan_agrees_with_what_a_run_has_spent(
    tiny: TinyRun, tmp_path: Path, method: str, chosen: dict[str, Any], shortlist: str | None
) -> None:
    if shortlist and method != "tracin":
        pytest.skip("plans show cascades in front of gradient methods")
    out = tmp_path / "out"
    tamis.select(
        model=tiny.model,
        pool=tiny.pool,
        target=tiny.target,
        method=method,
        set=chosen,
        budget=12,
        shortlist=shortlist,
        out=out,
        report=False,
    )
    plan = plan_of(tiny, budget=12, shortlist=shortlist or "bm25:5x", sample=0, compare=str(out))
    assert not any("different jobs" in note for note in plan.notes)
    ratios = {c.quantity: c.ratio for c in plan.comparisons}
    work = "gradient" if method in ("tracin", "influence-function", "adamw-influence") else "forward"
    assert ratios[f"{work} rows"] == pytest.approx(1, abs=1e-9)
    # A shortlist's own lengths are known only when it has run; the plan takes the pool's mix.
    near = 1e-6 if shortlist is None else 0.5
    assert ratios[f"{work} tokens"] == pytest.approx(1, abs=near)
    if method != "rds+":  # whose stage counts logits that it does not form
        assert ratios[f"{work} TFLOP"] == pytest.approx(1, abs=near)
    assert ratios["seconds of model work"] is not None


def test_a_warmup_is_planned_too(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = {"warmup_epochs": 2, "warmup_share": 0.3, "warmup_batch_rows": 4}
    tamis.select(
        model=tiny.model,
        pool=tiny.pool,
        target=tiny.target,
        method="less",
        set=chosen,
        budget=12,
        out=out,
        report=False,
    )
    plan = plan_of(tiny, budget=12, sample=0, compare=str(out), set={f"less.{k}": v for k, v in chosen.items()})
    ratios = {c.quantity: c.ratio for c in plan.comparisons}
    # The warm-up's rows are a random draw with other lengths than the mean.
    assert ratios["gradient rows"] == pytest.approx(1, abs=0.02)
    assert ratios["gradient tokens"] == pytest.approx(1, abs=0.1)


def test_a_run_over_other_data_is_named_beside_its_ratios(tiny: TinyRun, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    other.write_text("".join(Path(tiny.pool).read_text(encoding="utf-8").splitlines(keepends=True)[:30]))
    tamis.select(
        model=tiny.model, pool=other, target=tiny.target, method="length", budget=12, out=out, report=False
    )  # fmt: skip
    notes = [note for note in plan_of(tiny, compare=str(out)).notes if "different jobs" in note]
    assert len(notes) == 1 and "the run had pool" in notes[0] and "other.jsonl" in notes[0]


def test_a_measured_plan_names_this_machine(tiny: TinyRun) -> None:
    plan = plan_of(tiny, measure=True, device="cpu")
    assert plan.dtype == "float32"
    assert "measured on" in plan.rate.origin and plan.rate.device.startswith("cpu")
    assert 1e6 < plan.rate.forward < 1e14 and 1e6 < plan.rate.gradient < 1e14


def test_a_sample_is_scaled_to_the_whole_pool(tiny: TinyRun) -> None:
    sampled, whole = plan_of(tiny, sample=20), plan_of(tiny, sample=0)
    assert sampled.sampled_rows == 20 and whole.sampled_rows == 60
    assert sampled.pool.rows == whole.pool.rows == 60
    assert sampled.pool.tokens == pytest.approx(whole.pool.tokens, rel=0.25)


def test_a_plan_without_a_target_says_what_it_assumed(tiny: TinyRun) -> None:
    plan = plan_of(tiny, target=())
    assert any("target rows like the pool's are assumed" in note for note in plan.notes)


def test_a_manifest_that_does_not_fit_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    plan = plan_of(tiny)
    with pytest.raises(InvalidInput, match="holds no settings and costs"):
        compare_with_run(plan, {"cost": {}})
    with pytest.raises(InvalidInput, match="the run used tracin after bm25:7x, which this plan does not hold"):
        compare_with_run(plan, {"settings": {"method": "tracin", "shortlist": "bm25:7x"}, "cost": {"stages": []}})
    with pytest.raises(InvalidInput, match="cannot be read"):
        plan_of(tiny, compare=str(tmp_path / "none"))
    (tmp_path / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(InvalidInput, match="is not a manifest"):
        plan_of(tiny, compare=str(tmp_path))


def test_wrong_method_settings_are_refused_by_the_method(tiny: TinyRun) -> None:
    with pytest.raises(InvalidSettings, match=r"settings of method 'less': unknown setting 'lora_rnk', did you mean"):
        plan_of(tiny, set={"less.lora_rnk": 4})
    with pytest.raises(InvalidSettings, match="lora_rank must be at least 1"):
        plan_of(tiny, set={"less.lora_rank": 0})
