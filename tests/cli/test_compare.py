"""What is typed after ``tamis compare`` arrives as settings, wrong input is refused, and the verdict is printed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tamis
from tamis.cli.compare import compare
from tamis.cli.main import run
from tamis.config import config_text, read_config
from tamis.errors import InvalidSettings
from tamis.settings.compare import CompareSettings, MethodText, method_parts
from tamis.values import from_dict

ARGUMENTS = ["--model", "m", "--pool", "p.jsonl", "--target", "t.jsonl", "--eval", "e.jsonl"]
STANDING = {
    "name": "tracin", "is_baseline": False, "budget": "5%", "mean": 1.25, "std": 0.1, "steps": 20.0, "tflops": 4.0,
    "select_tflops": 3.0,
}  # fmt: skip


@dataclass
class FakeResult:
    """What the library returns, as far as the command line looks at it."""

    def summary(self) -> dict[str, Any]:
        return {
            "verdict": "tracin wins", "details": "By far.", "metric": "loss", "standings": [STANDING],
            "next": ["Rest."], "warnings": ["one\x1b[31m source"],
            "report": "out/report.html", "results": "out/results.csv",
        }  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[CompareSettings]:
    settings_seen: list[CompareSettings] = []

    def compare_from_settings(settings: CompareSettings, *, progress: Any) -> FakeResult:
        settings_seen.append(settings)
        return FakeResult()

    module = types.ModuleType("tamis.api")
    module.compare_from_settings = compare_from_settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tamis.api", module)
    monkeypatch.setattr(tamis, "api", module, raising=False)
    return settings_seen


def test_flags_arrive_as_settings(seen: list[CompareSettings]) -> None:
    words = "--methods tracin dot=tracin bm25:5x+less online:tilt --set dot.normalize=dot --budget 2% --budgets 1% 40"
    more = (
        "--seeds 3 --metric exact-match --answer-pattern #(.+) --steps 9 --update-rows 2 --lora-targets q_proj v_proj"
    )
    assert run(["compare", *ARGUMENTS, *words.split(), *more.split()]) == 0
    assert seen == [
        CompareSettings(
            model="m", pool=("p.jsonl",), target=("t.jsonl",), eval=("e.jsonl",), budget="2%", budgets=("1%", "40"),
            methods=("tracin", "dot=tracin", "bm25:5x+less", "online:tilt"), set={"dot.normalize": "dot"}, seeds=3,
            metric="exact-match", answer_pattern="#(.+)", steps=9, update_rows=2, lora_targets=("q_proj", "v_proj"),
        )
    ]  # fmt: skip
    assert seen[0].all_budgets == ("2%", "1%", "40")


def test_every_setting_has_a_flag() -> None:
    flags = {name.rstrip("_") for name in inspect.signature(compare).parameters}
    assert flags - {"ctx", "config", "quiet", "as_json"} == {
        field.name for field in dataclasses.fields(CompareSettings)
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tracin", MethodText(label="tracin", method="tracin")),
        ("rds+", MethodText(label="rds+", method="rds+")),
        ("bm25:5x+rds+", MethodText(label="bm25:5x+rds+", method="rds+", shortlist="bm25:5x")),
        ("sources:8+tracin", MethodText(label="sources:8+tracin", method="tracin", shortlist="sources:8")),
        ("a=bm25:2x+less", MethodText(label="a", method="less", shortlist="bm25:2x")),
        ("online:tilt", MethodText(label="online:tilt", method="tilt", is_online=True)),
        (
            "online:less@sources:8",
            MethodText(label="online:less@sources:8", method="less", is_online=True, candidates="sources:8"),
        ),
    ],
)
def test_methods_are_taken_apart(text: str, parts: MethodText) -> None:
    assert method_parts(text) == parts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "tracn"], "did you mean 'tracin'"),
        (["--methods", "online:tracn"], "did you mean 'tracin'"),
        (["--methods", "online:less@source:8"], "expected 'exact', 'reuse:K'"),
        (["--methods", "tracin", "tracin"], "two are called 'tracin'"),
        (["--methods", "uniform=tracin"], "is a baseline's name"),
        (["--set", "normalize=dot"], "write LABEL.NAME=VALUE"),
        (["--set", "less.warmup_epochs=2"], "no method is called 'less'; there are tracin"),
        (["--methods", "a=online:less", "--set", "a.candidates=jvp"], "write online:METHOD@jvp"),
        (["--methods", "a=online:less", "--set", "a.source_rows=3"], "in a comparison online:METHOD@sources:K"),
        (["--seeds", "0"], "seeds=0: expected at least 1"),
        (["--budget", "200%"], "share above the whole pool"),
        (["--metric", "bleu"], "expected one of loss, exact-match"),
        (["--answer-pattern", "x"], "add --metric exact-match"),
        (["--metric", "exact-match", "--answer-pattern", "("], "answer_pattern='('"),
        (["--eval", "b=x.jsonl", "b=y.jsonl", "a=z.jsonl"], "eval: two are called 'b'; name them: --eval NAME=PATH"),
        (["--methods", "a=online:less", "--set", "a.keep=3"], "write --update-rows 3"),
        (["--subsets", "2"], "at least 3"),
        (["--subset-share", "1"], "above 0 and below 1"),
        (["--relevant", "r.jsonl"], "belong to --planted"),
        (["--planted", "--methods", "online:tilt"], "nothing is trained"),
        (["--planted", "--methods", "sources:8+tracin"], "planted rows are a source of their own"),
        (["--tune", "full", "--lora-rank", "4"], "trains no adapter"),
        (["--learning-rate", "0"], "expected a number above zero"),
    ],
)
def test_wrong_settings_end_in_one_line_and_code_2(
    words: list[str], said: str, seen: list[CompareSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", *ARGUMENTS, *words]) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split()) and "Traceback" not in error and error.count("\n") == 1
    assert seen == []


def test_a_check_by_planted_rows_names_the_settings_that_only_runs_read() -> None:
    given: dict[str, Any] = {"model": "m", "pool": ("p",), "target": ("t",), "planted": True}
    assert CompareSettings(**given).of_runs == ()
    of_both = CompareSettings(**given, planted_rows=20, max_length=64, seeds=3, eval=("e",), lora_targets=("q_proj",))
    assert of_both.of_runs == ("eval", "seeds", "lora_targets")


def test_budgets_of_a_file_are_a_list() -> None:
    given: dict[str, Any] = {"model": "m", "pool": ("p",), "target": ("t",)}
    assert CompareSettings(**given, budgets=0.1).budgets == ("10%",)
    with pytest.raises(InvalidSettings, match="budgets: expected a list of budgets, got null"):
        CompareSettings(**given, budgets=None)


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = CompareSettings(
        model="m", pool=("p",), target=("t",), eval=("e",), methods=("x=tracin",), set={"x.normalize": "dot"},
        budgets=("1%",),
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(config_text("compare", settings), encoding="utf-8")
    assert from_dict(CompareSettings, read_config(path)) == settings


def test_the_verdict_is_printed_or_given_as_json(
    seen: list[CompareSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", *ARGUMENTS]) == 0
    captured = capsys.readouterr()
    for said in ("tracin wins", "By far.", "1.25", "75%", "next: Rest.", "out/report.html"):
        assert said in captured.out
    assert "\x1b[31m source" not in captured.err and "source" in captured.err
    assert run(["compare", *ARGUMENTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "tracin wins"
    assert run(["compare", *ARGUMENTS, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
