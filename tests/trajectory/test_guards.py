"""Runs on which attribution must not go wrong in silence: it says what is the matter, or is right all the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

import tamis
from classifier import Classifier
from online_runs import arguments, collate, rows_of
from tamis.errors import InvalidSettings, NonFinite, StoreMismatch, Unsupported
from tamis.gradients.functional import products, weighted_gradient
from tamis.trajectory.fidelity import fidelity
from tamis.trajectory.leave_out import leave_out_effect
from tamis.trajectory.open_run import open_run
from tamis.trajectory.replay import play_segment, segments
from tamis.trajectory.run import HeldTrajectory, Step
from tamis.trajectory.sweep import SweepSettings, run_sweep
from tamis.trajectory.token_rows import rows_of_inputs
from tiny_models import tiny_model
from trajectory_case import REFERENCE_TARGET, ReferenceNet, reference_rows, reference_run

TARGET = [dict(row) for row in rows_of(3, seed=7)]


def model_of(**options: Any) -> nn.Module:
    return tiny_model("llama", dtype=torch.float32, lora=True, **options).train()


def record(
    folder: Path, model: nn.Module, *, resume: Any = None, collator: Any = collate, first: Any = (), **changes: Any
) -> Trainer:
    data = rows_of(22, seed=1)
    trainer = Trainer(
        model=model, args=arguments(folder / "trainer", **changes), train_dataset=data, eval_dataset=data.select([1]),
        data_collator=collator, callbacks=[*first, tamis.TrajectoryRecorder(folder / "record", every=4)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_replays(folder: Path, model: nn.Module, tolerance: float = 1e-5) -> None:
    run = open_run(folder / "record", model)
    for start, stop in segments(run):
        play_segment(run, start, stop, tolerance=tolerance)


def test_gradients_under_dropout_are_those_of_the_parameters_given_with_checkpointing_on_too(tmp_path: Path) -> None:
    model = record(tmp_path, model_of(dropout=0.3), max_steps=2).model
    run = open_run(tmp_path / "record", model)
    step, theta = run.step(0), run.state(0).theta  # not the model's own, which are those at the end
    without = weighted_gradient(run.problem, theta, step.micros, step.weights)[1]
    model.gradient_checkpointing_enable()
    found = weighted_gradient(run.problem, theta, step.micros, step.weights)[1]
    torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-8)
    assert model.is_gradient_checkpointing and model.training  # as it was


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_in_float64_whose_losses_transformers_takes_in_float32_replays(tmp_path: Path, lora: bool) -> None:
    model = record(tmp_path, tiny_model("gpt2", dtype=torch.float64, lora=lora).train()).model
    run = open_run(tmp_path / "record", model)
    assert run.state(0).theta.dtype == torch.float64 and run.tolerance == 1e-5
    for start, stop in segments(run):
        play_segment(run, start, stop)


def test_parameters_that_went_elsewhere_are_refused_after_a_run_in_16_bits_too(tmp_path: Path) -> None:
    model = record(tmp_path, model_of(), bf16=True).model
    run = open_run(tmp_path / "record", model)
    (start, stop), path = segments(run)[-1], sorted((tmp_path / "record/states").glob("*.safetensors"))[-1]
    play_segment(run, start, stop)
    tensors = load_file(path)
    moved = run.state(stop).theta - run.state(start).theta
    save_file({**tensors, "theta": tensors["theta"] + 0.4 * moved}, path)
    for tolerance in (None, 0.05):
        with pytest.raises(StoreMismatch, match="something that is not in the log changed them"):
            play_segment(open_run(tmp_path / "record", model), start, stop, tolerance=tolerance)


def collate_as_if_rows_ended_in_padding(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What ``mask = ids != pad`` makes of rows that end in the padding token: the last label has the mask 0."""
    batch = collate(rows)
    last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
    batch["labels"].scatter_(1, last, batch["input_ids"].gather(1, last))
    batch["attention_mask"].scatter_(1, last, 0)
    return batch


def test_a_masked_label_at_the_end_of_a_row_is_replayed_as_it_was_learned(tmp_path: Path) -> None:
    model = record(tmp_path, model_of(), collator=collate_as_if_rows_ended_in_padding).model
    assert_replays(tmp_path, model)

    def padding_learned_too(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate_as_if_rows_ended_in_padding(rows)
        return {**batch, "labels": torch.where(batch["attention_mask"] == 0, batch["input_ids"], batch["labels"])}

    with pytest.raises(Unsupported, match="labels behind a token with attention_mask 0"):
        record(tmp_path / "other", model_of(), collator=padding_learned_too)


def test_products_hold_what_squares_in_float32_cannot() -> None:
    rows = reference_rows(range(4))
    problem = Classifier(ReferenceNet().float())
    theta, one = problem.start().detach(), torch.ones(1, problem.layout.numel)
    micros, weights = (replace(rows, inputs=rows.inputs.float()),), torch.full((4,), 0.25)
    small, large = (products(problem, theta, micros, weights, one * size, "exact") for size in (1.0, 1e22))
    for mine, other in zip(small, large, strict=True):
        torch.testing.assert_close(mine, other / 1e22, rtol=1e-4, atol=1e-9)


def test_a_run_that_diverged_is_refused_by_the_update_where_it_did() -> None:
    run = reference_run(every=1)
    broken = replace(run.states[3], theta=run.states[3].theta * torch.nan)
    run = HeldTrajectory(problem=run.problem, rule=run.rule, steps=run.steps, states={**run.states, 3: broken})
    with pytest.raises(NonFinite, match="update 4: its loss or its gradient is NaN or infinite; a run that diverged"):
        run_sweep(run, REFERENCE_TARGET, SweepSettings())


def test_scores_that_overflow_on_the_way_back_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from tamis.trajectory import sweep

    real = sweep.sweep_step
    monkeypatch.setattr(sweep, "sweep_step", lambda *args, **kwargs: real(*args, **kwargs) * torch.inf)
    with pytest.raises(NonFinite, match="update 5: the numbers of its scores are not all finite"):
        run_sweep(reference_run(), REFERENCE_TARGET, SweepSettings())
    with pytest.raises(AssertionError, match="NaN has no rank"):
        fidelity(np.ones((3, 1)), np.array([[1.0], [np.nan], [2.0]]))


@pytest.mark.parametrize("settings", [{}, {"method": "tracin"}, {"secant": 2}])
def test_a_batch_of_one_has_no_rest_that_could_take_over(settings: Any) -> None:
    run = reference_run()
    last = Step(
        index=4, micros=(reference_rows([16]),), rows=np.array([16]), weights=torch.ones(1, dtype=torch.float64),
        rates=run.steps[4].rates,
    )  # fmt: skip
    run = HeldTrajectory(problem=run.problem, rule=run.rule, steps=[*run.steps[:4], last], states={0: run.states[0]})
    end = play_segment(HeldTrajectory(**{**vars(run), "states": {0: run.states[0]}}), 0, 5)[-1].after
    run = HeldTrajectory(problem=run.problem, rule=run.rule, steps=run.steps, states={0: run.states[0], 5: end})
    assert len(run_sweep(run, REFERENCE_TARGET, SweepSettings(**settings))["scores"]) == 5
    with pytest.raises(InvalidSettings, match=r"update 5 was made of one sample.*use removal=subtract"):
        run_sweep(run, REFERENCE_TARGET, SweepSettings(**settings, renormalise=True))


def test_frozen_weights_of_16_bits_make_a_replay_as_coarse_as_autocast_does(tmp_path: Path) -> None:
    model = model_of()
    for name, param in model.named_parameters():
        param.data = param.data if "lora" in name else param.data.bfloat16()
    trainer = record(tmp_path, model)
    assert open_run(tmp_path / "record", trainer.model).tolerance == 1e-2
    assert_replays(tmp_path, trainer.model, tolerance=1e-2)


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_the_record_ends_with_the_run_though_the_best_checkpoint_is_loaded(tmp_path: Path, strategy: str) -> None:
    trainer = record(
        tmp_path, model_of(), load_best_model_at_end=True, eval_strategy=strategy, save_strategy="best", eval_steps=2,
        metric_for_best_model="loss", greater_is_better=True, max_steps=10,
    )  # fmt: skip
    end = open_run(tmp_path / "record", trainer.model).state(10).theta
    best = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    assert not torch.equal(torch.sort(end).values, torch.sort(best).values)  # another checkpoint was the best
    assert_replays(tmp_path, trainer.model)


def test_a_checkpoint_without_the_optimizer_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    record(tmp_path, model_of(), save_strategy="steps", save_steps=3, save_only_model=True, max_steps=4)
    with pytest.raises(StoreMismatch, match=r"another state of the optimizer at update 4.*save_only_model"):
        record(
            tmp_path, model_of(), resume=True, save_strategy="steps", save_steps=3, save_only_model=True, max_steps=4
        )


def test_an_optimizer_made_anew_on_the_way_is_found_out(tmp_path: Path) -> None:
    trainer = record(tmp_path, model_of())
    path = tmp_path / "record/states/00000004.safetensors"
    save_file({**load_file(path), "count": torch.tensor(1)}, path)
    with pytest.raises(StoreMismatch, match="had taken 1 steps when they were done, and replaying gives 4"):
        play_segment(open_run(tmp_path / "record", trainer.model), 0, 4)


def test_a_micro_batch_without_labels_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    calls = []

    def sometimes(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        calls.append(1)
        batch = collate(rows)
        unlabelled = torch.full_like(batch["labels"], -100)
        return {**batch, "labels": unlabelled if len(calls) % 2 == 0 else batch["labels"]}

    trainer = record(tmp_path, model_of(), collator=sometimes, gradient_accumulation_steps=2, max_steps=3)
    run = open_run(tmp_path / "record", trainer.model)
    assert [len(run.step(index).micros) for index in range(3)] == [1, 1, 1]
    assert_replays(tmp_path, trainer.model)


def test_on_a_run_of_sgd_verification_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = record(tmp_path, model_of(), optim="sgd", learning_rate=0.1, max_steps=2)
    common: dict[str, Any] = {"run": tmp_path / "record", "target": TARGET, "model": trainer.model, "samples": 3}
    with pytest.raises(InvalidSettings, match="SGD, which has no second moments; compare methods sgd-influence"):
        tamis.verify(out=tmp_path / "a", methods=("adamw-influence",), secant=2, **common)
    assert not list((tmp_path / "a/truth").iterdir())  # before anything is retrained
    found = tamis.verify(out=tmp_path / "b", **common)
    assert set(found.methods) == {"sgd-influence", "tracin"} and found.manifest["left_out"] == ["adamw-influence"]
    assert "of which adamw-influence says nothing" in caplog.text


def test_the_exact_error_takes_the_tolerance_that_the_sweep_took(tmp_path: Path) -> None:
    trainer = record(tmp_path, model_of(), max_steps=2)
    path = next((tmp_path / "record/segments").iterdir())
    tensors = load_file(path)
    save_file({**tensors, "losses": tensors["losses"] * 1.01}, path)
    found = tamis.attribute(
        run=tmp_path / "record", target=TARGET, model=trainer.model, out=tmp_path / "a", error="exact", error_samples=1,
        tolerance=0.05,
    )  # fmt: skip
    assert np.isfinite(found.uses["error_exact"].to_pandas().dropna()).sum() == 1


def test_looking_ahead_needs_adam(tmp_path: Path) -> None:
    trainer = tamis.OnlineTrainer(
        model=model_of(), args=arguments(tmp_path, optim="sgd", max_steps=3), train_dataset=rows_of(24, seed=1),
        target_dataset=rows_of(4, seed=2), data_collator=collate,
        selection=tamis.online.Lookahead(keep=2, oversample=2),
    )  # fmt: skip
    with pytest.raises(Unsupported, match="Adam's moments, which SGD has not"):
        trainer.train()


def test_the_frozen_form_looks_no_further_than_training_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tamis.online import rehearsal

    ahead, real = list[int](), rehearsal._repeat

    def counted(problem: Any, rule: Any, first: Any, channel: Any, rates: Any) -> None:
        ahead.append(1 + len(rates))
        real(problem, rule, first, channel, rates)

    monkeypatch.setattr(rehearsal, "_repeat", counted)
    trainer = tamis.OnlineTrainer(
        model=model_of(), args=arguments(tmp_path, max_steps=4), train_dataset=rows_of(24, seed=1),
        target_dataset=rows_of(4, seed=2), data_collator=collate,
        selection=tamis.online.Lookahead(keep=2, oversample=2, horizon=3, form="frozen"),
    )  # fmt: skip
    trainer.train()
    assert ahead == [3, 2, 1]  # of updates 2, 3 and 4; the first is cold


@pytest.mark.parametrize("kind", ["autocast", "frozen weights"])
def test_what_removing_a_sample_does_is_measured_without_16_bit_rounding(tmp_path: Path, kind: str) -> None:
    model, changes = model_of(), {"bf16": True} if kind == "autocast" else {}
    if kind == "frozen weights":
        for name, param in model.named_parameters():
            param.data = param.data if "lora" in name else param.data.bfloat16()
    trained = record(tmp_path, model, max_steps=6, learning_rate=1e-3, **changes).model
    run = open_run(tmp_path / "record", trained)
    target = run.micros_of(rows_of_inputs(collate(TARGET)), most=3)
    scores = run_sweep(run, target, SweepSettings(secant=6, tolerance=1e-1), per_row=False)["scores"]
    uses = [(step, place) for step in range(6) for place in range(2)]
    truth = [leave_out_effect(run, step, place, target).mean() for step, place in uses]
    found = fidelity(
        np.array([[scores[step][place].item()] for step, place in uses]), np.array([[float(t)] for t in truth]), seed=0
    )
    assert found.spearman > 0.97 and found.relative_error < 0.2


class Restart(TrainerCallback):
    """Sets the optimizer's moments to zero after some update and keeps its count, as restarts of LoRA do."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for own in kwargs["optimizer"].state.values() if state.global_step == self.after else ():
            own["exp_avg"].zero_()
            own["exp_avg_sq"].zero_()


@pytest.mark.parametrize(("after", "said"), [(4, "moments of the optimizer"), (7, "the replayed ones end")])
def test_an_optimizer_that_was_reset_on_the_way_is_refused(tmp_path: Path, after: int, said: str) -> None:
    trainer = record(tmp_path, model_of(), first=[Restart(after)], max_steps=8, learning_rate=1e-2)
    run = open_run(tmp_path / "record", trainer.model)
    with pytest.raises(StoreMismatch, match=said):
        for start, stop in segments(run):
            play_segment(run, start, stop)


def test_sgd_without_momentum_has_no_moments_to_compare(tmp_path: Path) -> None:
    trainer = record(tmp_path, model_of(), optim="sgd", learning_rate=1e-2, max_steps=8)
    run = open_run(tmp_path / "record", trainer.model)
    assert not run.rule.has_moments
    assert_replays(tmp_path, trainer.model)


def test_dora_whose_gradients_are_no_derivatives_is_refused_when_recorded_and_when_opened(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama", dtype=torch.float32), config).train()
    with pytest.raises(Unsupported, match="DoRA's gradients hold the norm of the adapted weights fixed"):
        record(tmp_path, model)
    trained = record(tmp_path / "plain", model_of(), max_steps=2).model
    path = tmp_path / "plain/record/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["adapter"]["use_dora"] = True
    path.write_text(json.dumps(manifest))
    with pytest.raises(Unsupported, match="DoRA"):
        open_run(tmp_path / "plain/record", trained)
