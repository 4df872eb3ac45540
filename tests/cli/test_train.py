"""What is typed after ``tamis train`` arrives as settings, and what comes back is printed."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest

import tamis
from tamis.cli.main import run
from tamis.settings import TrainRunSettings

ARGUMENTS = ["--model", "m", "--pool", "p.jsonl", "--target", "t.jsonl"]


@dataclass
class FakeResult:
    """What the library returns, as far as the command line looks at it."""

    def summary(self) -> dict[str, Any]:
        return {"steps": 7, "held_out_loss": {"before": 2.0, "after": 1.5}, "warnings": [], "model": "out/model"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[TrainRunSettings]:
    settings_seen: list[TrainRunSettings] = []

    def train_from_settings(settings: TrainRunSettings, *, progress: Any) -> FakeResult:
        settings_seen.append(settings)
        print("a trainer that prints")  # noqa: T201  # what the command line has to keep off standard output
        return FakeResult()

    module = types.ModuleType("tamis.api")
    module.train_from_settings = train_from_settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tamis.api", module)
    monkeypatch.setattr(tamis, "api", module, raising=False)
    return settings_seen


def test_flags_arrive_as_settings(seen: list[TrainRunSettings]) -> None:
    words = "--steps 7 --method tilt --set ridge=2.0 --keep 4 --lora-rank 8 --lora-targets q_proj v_proj --clip 0.5"
    more = "--eval e=a.jsonl b.jsonl --eval-steps 5 --patience 2 --report-to wandb --drop-leaks --batch-rows 2"
    assert run(["train", *ARGUMENTS, *words.split(), *more.split()]) == 0
    assert seen == [
        TrainRunSettings(
            model="m", pool=("p.jsonl",), target=("t.jsonl",), steps=7, method="tilt", set={"ridge": 2.0}, keep=4,
            lora_rank=8, lora_targets=("q_proj", "v_proj"), clip=0.5, eval=("e=a.jsonl", "b.jsonl"),
            eval_steps=5, patience=2, report_to=("wandb",), drop_leaks=True, batch_rows=2,
        )
    ]  # fmt: skip


def test_every_setting_has_a_flag(seen: list[TrainRunSettings]) -> None:
    import dataclasses
    import inspect

    from tamis.cli.train import train

    flags = {name.rstrip("_") for name in inspect.signature(train).parameters}
    assert flags - {"ctx", "config", "quiet", "as_json"} == {
        field.name for field in dataclasses.fields(TrainRunSettings)
    }


def test_the_summary_is_printed_or_given_as_json(
    seen: list[TrainRunSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *ARGUMENTS, "--steps", "7"]) == 0
    assert "before 2, after 1.5" in capsys.readouterr().out
    assert run(["train", *ARGUMENTS, "--steps", "7", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 7 and "a trainer that prints" in captured.err
    assert run(["train", *ARGUMENTS, "--steps", "7", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_epochs_in_a_file_do_not_go_with_steps_on_the_line(seen: list[TrainRunSettings], tmp_path: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: m\npool: p\ntarget: t\nepochs: 2\n")
    assert run(["train", "--config", str(config)]) == 0
    assert seen[0].epochs == 2.0
    assert run(["train", "--config", str(config), "--steps", "5"]) == 2
