"""What is typed after ``tamis proxy`` arrives as settings, and what comes back is printed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

import tamis
from tamis.cli.main import run
from tamis.errors import InvalidSettings
from tamis.notation import PROXY_SUMMARIES
from tamis.settings.proxy import ProxySettings, Recipe, recipe_of

ARGUMENTS = ["--model", "m", "--pool", "p.jsonl", "q.jsonl"]


@dataclass
class FakeResult:
    """What the library returns, as far as the command line looks at it."""

    warnings: list[str] = field(default_factory=lambda: ["mind the gap"])
    was_finished: bool = True

    def summary(self) -> dict[str, Any]:
        return {"preset": "default", "loss": {"full": 2.0, "proxy": 2.5}, "left_out": [], "advice": "Score with it."}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ProxySettings]:
    settings_seen: list[ProxySettings] = []

    def proxy_from_settings(settings: ProxySettings, *, progress: Any) -> FakeResult:
        settings_seen.append(settings)
        return FakeResult()

    module = types.ModuleType("tamis.api")
    module.proxy_from_settings = proxy_from_settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tamis.api", module)
    monkeypatch.setattr(tamis, "api", module, raising=False)
    return settings_seen


def test_flags_arrive_as_settings(seen: list[ProxySettings]) -> None:
    words = "--sparsity 0.7 --preset ipsvd --allocation share --objective align --steps 9 --no-control --no-sweep"
    more = "--target a=t.jsonl u.jsonl --damping-output 0.5 --keep 0.8 --probe-gb 0.5 --dtype bfloat16"
    assert run(["proxy", *ARGUMENTS, *words.split(), *more.split()]) == 0
    assert seen == [
        ProxySettings(
            model="m", pool=("p.jsonl", "q.jsonl"), target=("a=t.jsonl", "u.jsonl"), sparsity=0.7, preset="ipsvd",
            allocation="share", objective="align", steps=9, control=False, sweep=False, damping_output=0.5, keep=0.8,
            probe_gb=0.5, dtype="bfloat16",
        )
    ]  # fmt: skip


def test_every_setting_has_a_flag() -> None:
    from tamis.cli.proxy import proxy

    flags = set(inspect.signature(proxy).parameters)
    assert flags - {"ctx", "config", "quiet", "as_json"} == {entry.name for entry in dataclasses.fields(ProxySettings)}


def test_the_summary_is_printed_or_given_as_json(seen: list[ProxySettings], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["proxy", *ARGUMENTS]) == 0
    captured = capsys.readouterr()
    assert "full 2, proxy 2.5" in captured.out and "mind the gap" in captured.err
    assert run(["proxy", *ARGUMENTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] == "Score with it."


def test_warnings_of_a_build_that_ran_are_not_printed_again(
    seen: list[ProxySettings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tamis.api, "proxy_from_settings", lambda settings, *, progress: FakeResult(was_finished=False))
    assert run(["proxy", *ARGUMENTS]) == 0
    assert "mind the gap" not in capsys.readouterr().err


def test_presets_are_recipes_that_single_settings_change() -> None:
    made = {
        name: recipe_of(settings)
        for name in PROXY_SUMMARIES
        if (settings := ProxySettings(model="m", pool=("p",), target=("t",), preset=name, **_needs(name))).is_low_rank
    }
    assert set(made) == {"default", "ipsvd", "activation", "svd", "paper"}
    assert made["default"] == Recipe() and not made["activation"].weigh_output and not made["svd"].weigh_input
    paper = made["paper"]
    assert (paper.form, paper.damping, paper.damping_input, paper.gauge) == ("core", "absolute", 1e-3, "weighted")
    assert (paper.space, paper.objective, paper.kl_weight) == ("factors", "align+kl", 0.1)
    changed = recipe_of(ProxySettings(model="m", pool=("p",), preset="paper", gauge="balanced", kl_weight=1))
    assert changed == dataclasses.replace(paper, gauge="balanced", kl_weight=1.0)


def test_the_inverse_weighting_is_damped_more_unless_told_otherwise() -> None:
    found = recipe_of(ProxySettings(model="m", pool=("p",), weighting="inverse"))
    assert (found.weighting, found.damping_input, found.damping_output) == ("inverse", 0.1, 0.1)
    told = recipe_of(ProxySettings(model="m", pool=("p",), weighting="inverse", damping_output=0.5))
    assert (told.damping_input, told.damping_output) == (0.1, 0.5)


def test_absolute_damping_takes_numbers_of_its_own_and_the_papers_has_them() -> None:
    own = {"damping": "absolute", "damping_input": 1e-2, "damping_output": 1e-8}
    found = recipe_of(ProxySettings(model="m", pool=("p",), **own))  # type: ignore[arg-type]
    assert (found.damping, found.damping_input, found.damping_output) == ("absolute", 1e-2, 1e-8)
    one = recipe_of(ProxySettings(model="m", pool=("p",), preset="activation", damping="absolute", damping_input=1.0))
    assert one.damping_input == 1.0 and not one.weigh_output
    assert recipe_of(ProxySettings(model="m", pool=("p",), preset="paper", damping="absolute")).damping_output == 1e-3


def test_what_a_preset_reads_may_be_set() -> None:
    common = {"model": "m", "pool": ("p",), "target": ("t",)}
    ProxySettings(**common, preset="layer-extraction", probe_rows=9, sparsity=0.7)  # type: ignore[arg-type]
    ProxySettings(**common, preset="influence-scorer", sibling="s", steps=300, update_rows=4)  # type: ignore[arg-type]
    svd = ProxySettings(**common, preset="svd", steps=300, learning_rate=0.1)  # type: ignore[arg-type]
    assert svd.aligns
    assert not ProxySettings(**common, objective="none").aligns  # type: ignore[arg-type]


def _needs(preset: str) -> dict[str, str]:
    return {"sibling": "s"} if preset in ("sibling", "influence-scorer") else {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pool": ()}, "pool: expected at least one file"),
        ({"target": ("a/x.jsonl", "b/x.jsonl")}, "target: two are called 'x'"),
        ({"keep": 0.0}, "keep=0.0: expected a rank correlation"),
        ({"damping_input": -1.0}, "damping_input=-1.0: expected at least 0"),
        ({"temperature": 0.0}, "temperature=0.0: expected a number above zero"),
        ({"held_out_rows": 5}, "held_out_rows=5: expected at least 20"),
        ({"form": "thin"}, "form='thin': expected one of probe, dense, core"),
        (
            {"preset": "activation", "damping_output": 0.1},
            "damping_output: the preset 'activation' does not weigh by it",
        ),
        ({"preset": "svd", "form": "core"}, "form: the preset 'svd' does not weigh by it"),
        ({"kl_weight": 0.5}, "only objective='align\\+kl' reads it, not 'kl'"),
        (
            {"damping": "absolute"},
            "damps relatively, and its numbers mean nothing.*pass damping_input and damping_output, too",
        ),
        ({"damping": "absolute", "damping_input": 1e-3}, "pass damping_output, too"),
        ({"weighting": "inverse", "damping_output": 0.0}, "damping_output=0 with weighting='inverse'"),
        ({"out": " "}, "out=' ': expected a text that is not empty"),
        ({"preset": "layer-extraction", "steps": 9}, "steps=9: the preset 'layer-extraction' does not read it"),
        ({"preset": "layer-extraction", "probe_tokens": 9}, "probe_tokens=9: the preset 'layer-extraction' does not"),
        ({"preset": "sibling", "sibling": "s", "sparsity": 0.7}, "sparsity=0.7: the preset 'sibling' does not read it"),
        ({"preset": "sibling", "sibling": "s", "learning_rate": 0.1}, "learning_rate=0.1: the preset 'sibling' does"),
        (
            {"preset": "influence-scorer", "sibling": "s", "target": ("t",), "patience": 3},
            "patience=3: the preset 'influence-scorer' does not read it",
        ),
        (
            {"preset": "influence-scorer", "sibling": "s", "target": ("t",), "steps": 0},
            "steps=0: the preset 'influence-scorer' fits its head to --steps times --update-rows rows",
        ),
        ({"preset": "svd", "probe_tokens": 9}, "probe_tokens: the preset 'svd' does not weigh by it"),
        ({"objective": "none", "steps": 300}, "steps=300: objective='none' trains nothing"),
        ({"steps": 0, "learning_rate": 0.1}, "learning_rate=0.1: steps=0 trains nothing"),
        ({"target": ("t",), "target_rows": 5}, "target_rows=5: counts pool rows that stand in for a target"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        ProxySettings(**{"model": "m", "pool": ("p",), **changes})
