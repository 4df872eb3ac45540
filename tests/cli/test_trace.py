"""What is typed after ``tamis attribute`` and ``tamis verify`` arrives as settings, and what comes back is printed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
from typing import Any

import pytest

import tamis
from tamis.cli.attribute import attribute
from tamis.cli.main import run
from tamis.cli.verify import verify
from tamis.settings import AttributeSettings, VerifySettings

ARGUMENTS = ["--run", "r", "--target", "t.jsonl"]
MISS = {"step": 1, "place": 3, "score": 0.447, "retrained": 0.0055}
VALUES = {
    "spearman": 0.912, "low": None, "high": None, "samples": 4, "relative_error": 0.3, "largest_miss": MISS
}  # fmt: skip


class FakeResult:
    def __init__(self, summary: dict[str, Any]) -> None:
        self._summary = summary

    def summary(self) -> dict[str, Any]:
        return self._summary


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def attribute_from_settings(settings: AttributeSettings, *, progress: Any) -> FakeResult:
        found.append(settings)
        return FakeResult(
            {
                "updates": 5,
                "target_rows": [{"target": "t", "id": "a"}, {"target": "t", "id": "b"}],
                "target_loss": 1.5,
                "outsized_updates": [1, 2],
                "warnings": ["Updates 1 and 2 have nearly all."],
                "curvature_advice": "use --curvature exact",
                "sources": [
                    {
                        "source": "maths\u202e",
                        "samples": 1200,
                        "uses": 1300,
                        "mean_score": 2.5e-3,
                        "mean_score_elsewhere": 1e-3,
                    },
                    {"source": "web", "samples": 7, "uses": 7, "mean_score": -1e-4, "mean_score_elsewhere": None},
                ],
                "best": [{"sample": "row-1", "uses": 2, "update": 3, "score": 0.25}],
                "worst": [{"sample": "row-9", "uses": 1, "update": 1, "score": -0.5}],
            }
        )

    def verify_from_settings(settings: VerifySettings, *, progress: Any) -> FakeResult:
        found.append(settings)
        return FakeResult(
            {"samples": 4, "methods": {"adamw-influence": VALUES, "tracin": VALUES | {"relative_error": 16.7}}}
        )

    module = types.ModuleType("tamis.api")
    module.attribute_from_settings = attribute_from_settings  # type: ignore[attr-defined]
    module.verify_from_settings = verify_from_settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tamis.api", module)
    monkeypatch.setattr(tamis, "api", module, raising=False)
    return found


def test_flags_arrive_as_settings(seen: list[Any]) -> None:
    words = "--method adamw-influence --curvature fisher --secant 10 --error proxy --per-row"
    assert run(["attribute", *ARGUMENTS, *words.split(), "--no-diagnose", "--model", "m"]) == 0
    assert (
        run(
            ["verify", *ARGUMENTS, "--samples", "9", "--methods", "tracin", "sgd-influence", "--removal", "renormalise"]
        )
        == 0
    )
    assert seen == [
        AttributeSettings(
            run="r", target=("t.jsonl",), curvature="fisher", secant=10, error="proxy", per_row=True,
            diagnose=False, model="m",
        ),
        VerifySettings(
            run="r", target=("t.jsonl",), samples=9, methods=("tracin", "sgd-influence"), removal="renormalise"
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("command", "settings"), [(attribute, AttributeSettings), (verify, VerifySettings)])
def test_every_setting_has_a_flag(command: Any, settings: Any) -> None:
    flags = set(inspect.signature(command).parameters) - {"ctx", "config", "quiet", "as_json"}
    assert flags == {field.name for field in dataclasses.fields(settings)}


def test_results_are_printed_or_given_as_json(seen: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attribute", *ARGUMENTS]) == 0
    printed, said = capsys.readouterr()
    assert "use --curvature exact" in printed and re.search("target rows +2\n", printed)
    assert "Updates 1 and 2 have nearly all." in said
    assert "mean per use" in printed and "without update 1, 2" in printed and "in nats" in printed
    assert re.search(r"maths⟦U\+202E⟧ +1,200 +1,300 +\+0\.0025 +\+0\.001\n", printed)
    assert re.search(r"web +7 +7 +-0\.0001 +–\n", printed)
    assert re.search(r"row-1 +2 +3 +\+0\.25", printed) and re.search(r"row-9 +1 +1 +-0\.5", printed)
    assert re.search("next +tamis verify --run r --target t.jsonl --out tamis-attribution-verified\n", printed)
    assert run(["attribute", *ARGUMENTS, "--curvature", "none", "--per-row", "--seed", "3", "--json"]) == 0
    following = json.loads(capsys.readouterr().out)["next"]
    assert following == (
        "tamis verify --run r --target t.jsonl --curvature none --per-row --out tamis-attribution-verified"
    )
    assert run(["verify", *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"0\.912 +│ +– +│ +0\.300", printed)  # no interval of four samples
    assert "tracin: sizes are wrong" in printed and "adamw-influence: sizes" not in printed
    assert "update 1, place 3, scored +0.447, retrained" in " ".join(printed.split())
    assert run(["verify", *ARGUMENTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"]["adamw-influence"]["low"] is None


def test_contradictions_are_answered_at_once(seen: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attribute", *ARGUMENTS, "--method", "adam-influence"]) == 2
    assert "did you mean" in capsys.readouterr().err.lower()
    assert run(["attribute", *ARGUMENTS, "--error", "proxy", "--error-samples", "9"]) == 2
    assert "error_samples: counts what --error exact computes" in capsys.readouterr().err
    assert run(["attribute", *ARGUMENTS, "--store", "s"]) == 2
    assert "store: keeps embeddings of --form matrix" in capsys.readouterr().err
    assert run(["verify", *ARGUMENTS, "--samples", "1"]) == 2
    assert "samples=1: expected at least 3" in capsys.readouterr().err
    assert seen == []
