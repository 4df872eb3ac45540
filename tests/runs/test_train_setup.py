"""What the Trainer is told, and what is refused before it starts."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tamis.errors import InvalidSettings
from tamis.online.settings import StepSettings
from tamis.runs.train import _settings_identity
from tamis.runs.train_setup import check_device, method_and_step, training_arguments
from tamis.settings import TrainRunSettings


def settings(**changes: Any) -> TrainRunSettings:
    return TrainRunSettings(**{"model": "m", "pool": ("p",), "target": ("t",), "steps": 50, "device": "cpu", **changes})


def test_arguments_say_what_the_settings_say(tmp_path: Path) -> None:
    given = settings(warmup_share=0.1, beta2=0.98, clip=0.0, batch_rows=3, accumulation=4, weight_decay=0.2, seed=5)
    args = training_arguments(given, total=50, dtype="float32", out=tmp_path)
    assert (args.max_steps, args.warmup_steps, args.adam_beta2, args.max_grad_norm) == (50, 5, 0.98, 0.0)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.seed) == (3, 4, 5)
    assert (args.weight_decay, args.bf16, args.report_to, args.disable_tqdm) == (0.2, False, [], True)
    assert (args.learning_rate, args.save_steps, args.load_best_model_at_end) == (2e-4, 100, False)
    assert training_arguments(given, total=50, dtype="bfloat16", out=tmp_path).bf16


def test_a_step_has_the_same_defaults_from_the_command_line_as_from_the_library() -> None:
    common = {field.name for field in fields(StepSettings)} & {field.name for field in fields(TrainRunSettings)}
    assert len(common) > 5
    library, verb = StepSettings(), settings()
    assert {name: getattr(verb, name) for name in common} == {name: getattr(library, name) for name in common}
    assert method_and_step(verb)[1] == library


def test_full_fine_tuning_has_a_smaller_rate_and_a_constant_one_may_warm_up(tmp_path: Path) -> None:
    def args(**changes: Any) -> Any:
        return training_arguments(settings(**changes), total=50, dtype="float32", out=tmp_path)

    assert args(tune="full").learning_rate == 2e-5
    assert args(tune="full", learning_rate=1e-3).learning_rate == 1e-3
    assert args(scheduler="constant").lr_scheduler_type == "constant_with_warmup"
    assert args(scheduler="constant", warmup_share=0).lr_scheduler_type == "constant"
    stopping = args(eval_steps=7, patience=2)
    assert (stopping.eval_steps, stopping.save_steps, stopping.metric_for_best_model) == (7, 7, "eval_loss")
    assert stopping.load_best_model_at_end and not stopping.greater_is_better


def test_the_setting_says_the_precision_whatever_the_launcher_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = training_arguments(settings(), total=50, dtype="float32", out=tmp_path)
    assert not args.bf16 and os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert getattr(args, "mixed_precision", "no") == "no"


def test_one_process_with_several_gpus_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(InvalidSettings, match="one process sees 4 GPUs; start one for each: accelerate launch"):
        check_device(settings(device="cuda"))
    check_device(settings())


def test_settings_of_a_step_are_part_of_a_run() -> None:
    plain = replace(settings(), candidates="sources:3")
    known = _settings_identity(plain)["settings"]
    for changed in ({"target_rank": 4}, {"source_rows": 3}, {"source_temperature": 1.0}, {"source_memory": 0.0}):
        assert _settings_identity(replace(plain, **changed))["settings"] == {**known, **changed}


def test_a_record_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="record: a record needs a folder of its own"):
        settings(out=str(tmp_path / "run"), record=str(tmp_path / "other" / ".." / "run"))
    for part in ("model", "model/trace"):  # the trained model takes that place when the run ends
        with pytest.raises(InvalidSettings, match=r"beside --out or in it \(not in model\)"):
            settings(out=str(tmp_path / "run"), record=str(tmp_path / "run" / part))
    assert settings(out=str(tmp_path / "run"), record=str(tmp_path / "run" / "record")).record is not None
    assert settings(out=str(tmp_path / "run"), record=str(tmp_path / "model")).record is not None
