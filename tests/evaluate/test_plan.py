"""A plan of a real folder and pool, measured and assumed, held against the manifest of a finished run."""

from __future__ import annotations

import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tamis
from tamis.cli.plan import print_plan
from tamis.errors import InvalidInput, InvalidSettings
from tamis.evaluate.plan import PlanResult, compare_with_run, estimate_plan
from tamis.settings import PlanSettings, SelectSettings
from tiny_run import TinyRun, chat, make_run, write_rows


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


def test_a_budget_of_more_tokens_than_the_pool_has_is_refused_as_in_a_run(tiny: TinyRun) -> None:
    whole = int(plan_of(tiny).pool.tokens)
    assert plan_of(tiny, budget=f"{whole}-tokens").budget_rows == 60
    with pytest.raises(InvalidSettings, match=f"but the pool has {whole}; give at most {whole}-tokens"):
        plan_of(tiny, budget=f"{whole + 1}-tokens")
    assert plan_of(tiny, budget="1m-tokens", sample=10).budget_rows == 60  # of a sample the total is an estimate


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
    assert ratios[f"{work} TFLOP"] == pytest.approx(1, abs=near)


def test_a_warmup_is_planned_too(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = {"warmup_epochs": 2, "warmup_pool_share": 0.3, "warmup_update_rows": 4}
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


def test_another_job_than_the_run_s_is_named_setting_by_setting(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"pool": tiny.pool, "target": tiny.target, "method": "tracin", "aggregate": "mean", "shortlist": "bm25:2x"}
    tamis.select(model=tiny.model, set={"memory_gb": 1}, budget=12, out=out, report=False, **asked)
    same = {"aggregate": "mean", "shortlist": "bm25:2x", "budget": 12, "set": {"tracin.memory_gb": 1.0}}
    assert not any("different jobs" in note for note in plan_of(tiny, compare=str(out), **same).notes)
    others = {"aggregate": "round-robin", "budget": 13, "set": {"tracin.memory_gb": 2.0}, "projection": "mask"}
    notes = [n for n in plan_of(tiny, compare=str(out), **{**same, **others}).notes if "different jobs" in n]
    assert [note.split("compare: the run had ")[1].split(";")[0] for note in notes] == [
        "aggregate 'mean', this plan has 'round-robin'",
        "budget '12', this plan has '13'",
        "tracin.memory_gb 1.0, this plan has 2.0",
        "tracin.projection 'factorized', this plan has 'mask'",
    ]


def test_a_run_of_any_method_behind_a_shortlist_can_be_compared(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tamis.select(
        model=tiny.model, pool=tiny.pool, target=tiny.target, method="mid-ppl", shortlist="bm25:2x", budget=12, out=out,
        report=False,
    )  # fmt: skip
    plan = plan_of(tiny, budget=12, shortlist="bm25:2x", compare=str(out))
    assert {c.quantity: (c.planned, c.measured) for c in plan.comparisons}["forward rows"] == (24, 24)


def test_the_passes_of_the_method_in_front_are_part_of_a_cascade(tiny: TinyRun) -> None:
    plan = plan_of(tiny, shortlist="mid-ppl:5x")
    cascades = [m for m in plan.methods if m.shortlist]
    assert [m.method for m in cascades] == ["tracin", "less", "influence-function"]
    assert all(m.passes[0].name == "losses (pool)" and m.passes[0].size.rows == 60 for m in cascades)
    assert all(m.method != "tracin" for m in plan_of(tiny, shortlist="tracin:5x").methods if m.shortlist)


def test_a_share_is_of_all_rows_that_were_read_usable_or_not(tiny: TinyRun, tmp_path: Path) -> None:
    # 40 more rows lose their answers to the length limit: a share is of 100 rows, a shortlist of the 60 usable ones.
    lost = [chat("word " * 150, "An answer.", id=f"lost-{n}") for n in range(40)]
    pool = write_rows(tmp_path / "pool.jsonl", lost)
    pool.write_text(tiny.pool.read_text(encoding="utf-8") + pool.read_text(encoding="utf-8"), encoding="utf-8")
    asked: dict[str, Any] = {"budget": "5%", "shortlist": "bm25:2x", "max_length": 256, "on_bad_row": "skip"}
    plan = plan_of(tiny, pool=str(pool), sample=0, **asked)
    assert (plan.pool.rows, plan.budget_rows) == (60, 5)
    assert {m.scored_rows for m in plan.methods if m.shortlist} == {10}
    run = tamis.select(
        model=tiny.model, pool=pool, target=tiny.target, method="tracin", out=tmp_path / "out", report=False, **asked
    )
    assert (len(run), run.summary()["pool"]["usable"], run.summary()["pool"]["scored"]) == (5, 60, 10)


def test_a_run_without_a_model_was_on_no_other_device(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tamis.select(model=tiny.model, pool=tiny.pool, target=tiny.target, method="bm25", out=out, report=False)
    plan = plan_of(tiny, device="cpu", measure=True, compare=str(out))
    assert not any("the run was on" in note for note in plan.notes)


def spent_on(device: str | None) -> dict[str, Any]:
    """The manifest of a run of tracin on a device."""
    stages = [{"work": "gradient", "rows": 64, "tokens": 1, "tflops": 1, "seconds": 100.0}]
    return {
        "settings": {"method": "tracin", "shortlist": None},
        "cost": {"stages": stages},
        **({} if device is None else {"models": [{"device": device}]}),
    }


def test_seconds_of_an_assumed_device_do_not_stand_beside_those_of_a_cpu(tiny: TinyRun) -> None:
    plan = plan_of(tiny)
    seconds = {d: compare_with_run(plan, spent_on(d))[-1] for d in ("cpu", "cuda:0", None)}
    assert (seconds["cpu"].planned, seconds["cpu"].measured, seconds["cpu"].ratio) == (None, 100.0, None)
    for device in ("cuda:0", None):
        assert seconds[device].quantity == "seconds of model work (planned for an assumed NVIDIA H100 SXM)"
        assert seconds[device].planned == plan.methods[6].seconds and seconds[device].ratio
    measured = replace(plan, rate=replace(plan.rate, is_assumed=False))
    assert compare_with_run(measured, spent_on("cpu"))[-1].quantity == "seconds of model work"
    assert compare_with_run(measured, spent_on("cpu"))[-1].planned == plan.methods[6].seconds


def test_the_console_says_that_assumed_times_are_not_those_of_this_cpu(tiny: TinyRun, tmp_path: Path) -> None:
    def printed(plan: PlanResult) -> str:
        console = Console(width=200, file=io.StringIO())
        print_plan(console, plan)
        return console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO

    out = tmp_path / "out"
    tamis.select(model=tiny.model, pool=tiny.pool, target=tiny.target, method="mid-ppl", out=out, report=False)
    plan = plan_of(tiny, device="cpu", compare=str(out))
    said = printed(plan)
    assert "times are those of that NVIDIA H100 SXM, not of this machine, where a run would be on the CPU" in said
    assert "assumed" in next(line for line in said.splitlines() if "rows" in line and "paper's" in line)
    (row,) = [line for line in said.splitlines() if "seconds of model work" in line]
    assert row.split()[4] == row.split()[6] == "–"
    assert any("the run was on a CPU, and without --measure" in note for note in plan.notes)
    here = replace(plan, device="cuda:0")
    assert "not of this machine" not in printed(here)
    measured = replace(plan, rate=replace(plan.rate, is_assumed=False))
    assert "not of this machine" not in printed(measured) and "assumed\n" not in printed(measured)


def test_every_setting_of_a_selection_is_planned_or_costs_nothing() -> None:
    free = {
        "method": "a plan has all of them",
        "share": "which rows are taken, of those that are scored",
        "seed": "which rows are drawn, not how many",
        "duplicates": "text work; what a shortlist may take of copies",
        "near_threshold": "text work",
        "drop_leaks": "which rows are taken, of those that are scored",
        "store": "where features lie; a plan is of a run that finds none",
        "shard_rows": "how often is written",
        "report": "no pass",
        "write_messages": "no pass",
    }
    asked, planned = ({f.name for f in fields(kind)} for kind in (SelectSettings, PlanSettings))
    assert asked - planned == free.keys()


def test_a_measured_plan_names_this_machine(tiny: TinyRun) -> None:
    single = plan_of(tiny, measure=True, device="cpu", batch_invariant=True, sample=10)
    assert "batches of one row" in single.rate.origin
    plan = plan_of(tiny, measure=True, device="cpu")
    assert plan.dtype == "float32"
    assert "measured on" in plan.rate.origin and plan.rate.device.startswith("cpu")
    assert 1e6 < plan.rate.forward < 1e14 and 1e6 < plan.rate.gradient < 1e14


def test_a_sample_is_scaled_to_the_whole_pool(tiny: TinyRun) -> None:
    sampled, whole = plan_of(tiny, sample=20), plan_of(tiny, sample=0)
    assert sampled.sampled_rows == 20 and whole.sampled_rows == 60
    assert sampled.pool.rows == whole.pool.rows == 60
    assert sampled.pool.tokens == pytest.approx(whole.pool.tokens, rel=0.25)


def test_rows_that_pass_one_at_a_time_hold_one_row_and_are_said_to_be_slow(tiny: TinyRun) -> None:
    plan, single = plan_of(tiny), plan_of(tiny, batch_invariant=True)
    assert single.methods[6].memory_bytes < plan.methods[6].memory_bytes / 10
    assert single.methods[6].tflops == plan.methods[6].tflops
    assert any("--batch-invariant passes one row at a time" in note for note in single.notes)
    assert not any("--batch-invariant" in note for note in plan.notes)


def test_sampled_targets_are_scaled_each_by_its_own_rows(tiny: TinyRun, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [chat("Count.", "one two three " * 9, id=f"l{n}") for n in range(30)])
    targets = (str(tiny.target), str(long))
    sampled = plan_of(tiny, target=targets, sample=17)
    assert (sampled.targets, sampled.target.rows) == (2, 34)
    one = plan_of(tiny, target=targets, sample=1)  # nothing was seen of the second target: it is like the first
    assert one.target.rows == 34 and one.target.tokens < sampled.target.tokens / 1.5


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
