"""The trainer seam: plain training where it should be plain training, exact resume, logs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

import tamis
from online_runs import IGNORED, arguments, collate, rows_of
from oracles import reference_loss
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.maths.clip import clip_factor
from tamis.online import Anchored, FilterThenWeight, Full, StepSettings, TargetOnly, Tilt, TracIn, Uniform
from tamis.online.adam_state import read_adam
from tamis.online.batches import to_batches
from tamis.online.fate import read_candidates
from tamis.online.target_turns import target_positions
from tamis.online.trainer import OnlineTrainer
from tiny_models import tiny_model

POOL, TARGET = rows_of(48, seed=1, sources=True), rows_of(7, seed=2)


def run(folder: Path, model: nn.Module, selection: Any, *, resume: Any = None, **changes: Any) -> OnlineTrainer:
    keys = ("step_settings", "target_rows", "forecast_every", "log_candidates", "callbacks")
    ours = {key: changes.pop(key) for key in keys if key in changes}
    trainer = OnlineTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=POOL, target_dataset=TARGET,
        data_collator=collate, selection=selection, **ours,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    """Of a log's entry; the last one's mean loss is of what its call of ``train`` has run."""
    return {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k and k != "train_loss"}


def plainly(folder: Path, model: nn.Module, **changes: Any) -> Trainer:
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=POOL, data_collator=collate)
    trainer.train()
    return trainer


def params(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def assert_close(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for (name, x), (_, y) in zip(params(a).items(), params(b).items(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("family", "tied", "lora"), [("gpt2", True, False), ("gpt2", False, True), ("qwen2", True, False)]
)
def test_keeping_all_with_weight_one_is_the_plain_trainer(
    tmp_path: Path, family: str, tied: bool, lora: bool, accumulation: int
) -> None:
    """Same data order, token mean over the whole update, clipping, decay, schedule: the parameters must agree."""
    ours, theirs = (tiny_model(family, tied=tied, lora=lora) for _ in range(2))
    shared = {"max_grad_norm": 0.05, "weight_decay": 0.1, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    run(
        tmp_path / "ours", ours, Full(keep=4, oversample=2),
        step_settings=StepSettings(reduction="tokens"), per_device_train_batch_size=3, **shared,
    )  # fmt: skip
    plainly(tmp_path / "theirs", theirs, per_device_train_batch_size=8, **shared)
    # The Trainer's loss is in float32 even for a float64 model; steps have the size of the rate, 1e-2.
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_loss_is_the_plain_trainers(tmp_path: Path, accumulation: int) -> None:
    shared = {"gradient_accumulation_steps": accumulation}
    ours = run(
        tmp_path / "a", tiny_model("gpt2"), Full(keep=4, oversample=2),
        step_settings=StepSettings(reduction="tokens"), **shared,
    )  # fmt: skip
    theirs = plainly(tmp_path / "b", tiny_model("gpt2"), per_device_train_batch_size=8, **shared)
    got, expected = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs))
    assert len(got) == len(expected) == 6
    # Accumulated, the mean of two means where the other is one over all tokens: equal up to the lengths' spread.
    np.testing.assert_allclose(got, expected, rtol=1e-5 if accumulation == 1 else 0.05)
    norms, others = ([e["grad_norm"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs))
    np.testing.assert_allclose(norms, others, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
def test_accumulated_updates_are_those_of_adamw_on_the_rows_that_were_logged(tmp_path: Path, reduction: Any) -> None:
    """Six choices an epoch in updates of four: every other one is of two. Repeated by PyTorch's, without clipping."""
    ours, plain = (tiny_model("gpt2", lora=True) for _ in range(2))
    constant = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    run(
        tmp_path, ours, Uniform(keep=2, oversample=4), step_settings=StepSettings(reduction=reduction),
        gradient_accumulation_steps=4, max_steps=4, **constant,
    )  # fmt: skip
    table = read_candidates(tmp_path / "candidates").to_pandas()
    assert table.groupby("step")["choice"].nunique().tolist() == [4, 2, 4, 2]
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _, update in table[table["kept"]].groupby("step"):
        losses, sizes = [], []
        for row in update["row"]:
            ids, supervised = torch.tensor(POOL[row]["input_ids"]), torch.tensor(POOL[row]["labels"]) != IGNORED
            losses.append(reference_loss(plain, ids, supervised))
            sizes.append(int(supervised[1:].sum()) if reduction == "tokens" else 1)
        optimizer.zero_grad()
        (torch.stack(losses) @ torch.tensor(sizes).double() / sum(sizes)).backward()
        optimizer.step()
    assert_close(ours, plain, 1e-10)


@pytest.mark.parametrize(
    ("selection", "settings"),
    [
        (Uniform(keep=6, oversample=2), StepSettings()),
        # So hot that draws by source are even, too, and differ by what is drawn alone.
        (TracIn(keep=6, oversample=2), StepSettings(candidates="sources:2", source_temperature=1e9)),
    ],
    ids=["uniform", "sources"],
)
def test_draws_are_the_seeds_of_the_run_and_new_at_every_choice(
    tmp_path: Path, selection: Any, settings: StepSettings
) -> None:
    """Runs that are given the same candidates in the same order draw others of them with another seed alone."""

    def drawn(name: str, seed: int) -> tuple[list[int], list[tuple[int, ...]]]:
        run(
            tmp_path / name, tiny_model("gpt2", lora=True, blocks=1), selection, step_settings=settings, seed=seed,
            data_seed=5, max_steps=2, gradient_accumulation_steps=2, forecast_every=0,
        )  # fmt: skip
        table = read_candidates(tmp_path / name / "candidates").to_pandas()
        choices = [tuple(np.flatnonzero(part["kept"])) for _, part in table.groupby("choice")]
        return table["row"].tolist(), choices

    (rows, first), again, (same, other) = drawn("first", 3), drawn("again", 3), drawn("other", 4)
    assert again == (rows, first) and same == rows
    assert len({*first, *other}) == len(first) + len(other) == 8  # of 924 that there are


@pytest.mark.parametrize(
    "selection",
    [
        FilterThenWeight(keep=4, oversample=2, cold_start=2),
        FilterThenWeight(keep=4, oversample=2, cold_start=1, alignment="projected", interactions="raw"),
        Tilt(keep=4, oversample=2, cold_start=1),
        Uniform(keep=4, oversample=2),
    ],
    ids=lambda method: f"{method.name}-{getattr(method, 'alignment', '')}",
)
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path, selection: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "gradient_accumulation_steps": 2}
    settings |= {"forecast_every": 1}  # update 2's is compared before it is logged and saved
    whole = tiny_model("llama", lora=True, dtype=torch.float32)
    alone = run(tmp_path / "whole", whole, selection, **settings)
    start = tiny_model("llama", lora=True, dtype=torch.float32)
    run(tmp_path / "parts", start, selection, **settings)
    # As if killed in update 4: the parts of the log from update 3 on are of work that is done again.
    resumed = tiny_model("llama", lora=True, dtype=torch.float32)
    with torch.no_grad():
        for param in resumed.parameters():
            if param.requires_grad:
                param.zero_()  # everything must come from the checkpoint
    torch.manual_seed(12345)
    again = run(tmp_path / "parts", resumed, selection, resume=str(tmp_path / "parts" / "checkpoint-2"), **settings)
    for name, param in params(whole).items():
        assert torch.equal(params(resumed)[name], param), name
    logged = [[without_times(entry) for entry in trainer.state.log_history] for trainer in (alone, again)]
    assert logged[0] == logged[1]
    forecast = [entry["step"] for entry in logged[0] if "selection/realised_drop" in entry]
    cold = 5 if selection.name == "uniform" else selection.cold_start
    assert forecast == list(range(cold + 1, 6))
    a, b = (read_candidates(tmp_path / which / "candidates") for which in ("whole", "parts"))
    assert a.equals(b)  # the repeated updates are there once


def test_candidates_are_logged_with_their_fate(tmp_path: Path) -> None:
    selection = FilterThenWeight(keep=3, oversample=2, cold_start=2)
    run(tmp_path, tiny_model("llama", lora=True), selection, logging_steps=4)
    table = read_candidates(tmp_path / "candidates").to_pylist()
    assert len(table) == 6 * 6
    for step in range(1, 7):
        rows = [row for row in table if row["step"] == step]
        assert sum(row["kept"] for row in rows) == 3
        assert sum(row["weight"] for row in rows) == pytest.approx(3)
        assert {row["cold"] for row in rows} == {step <= 2}
        assert all(row["source"] == ("even" if row["row"] % 2 == 0 else "odd") for row in rows)
        if step > 2:
            assert all(row["alignment"] is not None and row["loss"] is not None for row in rows)
            assert rows[0]["tokens"] == sum(label != -100 for label in POOL[rows[0]["row"]]["labels"][1:])
        else:
            assert all((row["loss"] is not None) == row["kept"] for row in rows)
    # Every row of the pool is a candidate once per epoch of eight choices.
    assert len({row["row"] for row in table}) == 36


def test_logs_say_how_the_choice_is_doing(tmp_path: Path) -> None:
    selection = FilterThenWeight(keep=3, oversample=2, cold_start=1)
    trainer = run(tmp_path, tiny_model("llama", lora=True), selection, forecast_every=2, max_steps=7)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = entries[-1]
    for name in ("effective_size", "weight_sum", "aligned_share", "scale", "overlap_with_top", "target_loss"):
        assert np.isfinite(last[f"selection/{name}"]), name
    shares = [value for key, value in last.items() if key.startswith("selection/share/")]
    assert sum(shares) == pytest.approx(1)
    assert last["selection/target_rows_seen"] == 7
    # The cold first choice looks at no target row.
    looked = np.stack([target_positions(k, count=3, total=7, seed=3) for k in range(1, 7)])
    expected = [len(np.unique(looked[: k + 1])) for k in range(6)]
    assert [entry.get("selection/target_rows_seen") for entry in entries] == [None, *expected]
    compared = [entry for entry in entries if "selection/realised_drop" in entry]
    assert [entry["step"] for entry in compared] == [2, 4, 6]
    for entry in compared:
        assert entry["selection/predicted_drop"] == pytest.approx(entry["selection/realised_drop"], abs=0.05)
    json.dumps(trainer.state.log_history)


def test_what_was_noted_after_the_last_loss_stands_in_the_last_entry(tmp_path: Path) -> None:
    trainer = run(tmp_path, tiny_model("gpt2", lora=True), TracIn(keep=2, oversample=2), logging_steps=4, max_steps=6)
    *_, loss, last = trainer.state.log_history
    assert loss["step"] == 4 and last["step"] == 6 and "train_loss" in last
    assert np.isfinite(last["selection/target_loss"]) and last["selection/target_rows_seen"] == 7
    assert sum(value for name, value in last.items() if name.startswith("selection/share/")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("clip", "kind"), [(0.0, torch.optim.AdamW), (0.01, torch.optim.AdamW), (0.01, torch.optim.Adam)]
)
def test_forecast_is_first_order_in_the_step_that_adam_takes(tmp_path: Path, clip: float, kind: Any) -> None:
    """Against the parameters before and after the real update."""
    model = tiny_model("gpt2", lora=True)
    trainer = OnlineTrainer(
        model=model, args=arguments(tmp_path, max_grad_norm=clip, weight_decay=0.3, max_steps=3), train_dataset=POOL,
        target_dataset=TARGET, data_collator=collate, selection=Anchored(keep=3, oversample=2, cold_start=1),
        forecast_every=1, optimizer_cls_and_kwargs=(kind, {"lr": 1e-2, "weight_decay": 0.3}),
    )  # fmt: skip
    seen: list[tuple[float, float]] = []
    finish = trainer._finish_update

    def watched(step: Any, proposal: Any, target: Any, number: int) -> None:
        finish(step, proposal, target, number)
        if trainer._forecasts._waiting is None:
            return
        inner, before = trainer.optimizer.optimizer, params(model)
        taken = inner.step

        def stepping(*args: Any, **kwargs: Any) -> Any:
            result = taken(*args, **kwargs)
            goal = proposal.target_gradient
            moved = sum(float((goal[name] * (before[name] - p.detach())).sum()) for name, p in step.params.items())
            seen.append((trainer._forecasts._waiting[2], moved))
            inner.step = taken
            return result

        inner.step = stepping

    trainer._finish_update = watched
    trainer.train()
    assert len(seen) == 2
    for predicted, moved in seen:
        assert predicted == pytest.approx(moved, rel=1e-9)


def test_forward_passes_of_an_update_are_those_of_candidates_and_target(tmp_path: Path) -> None:
    model = tiny_model("llama", lora=True)
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    selection = FilterThenWeight(keep=2, oversample=4, cold_start=1)
    run(tmp_path, model, selection, max_steps=3, per_device_train_batch_size=8, forecast_every=0, target_rows=3)
    # A cold update computes its two rows only; then one pass over the target and one over the eight candidates.
    assert calls == [2, 3, 8, 3, 8]


def test_selection_prefers_the_rows_that_the_target_is_made_of(tmp_path: Path) -> None:
    """Half of the pool repeats the target's rows, the other half asks for the opposite answers."""
    import datasets

    good = {"input_ids": [[5, 6, 7, 8]] * 24, "labels": [[-100, -100, 7, 8]] * 24, "source": ["good"] * 24}
    bad = {"input_ids": [[5, 6, 9, 3]] * 24, "labels": [[-100, -100, 9, 3]] * 24, "source": ["bad"] * 24}
    pool = datasets.concatenate_datasets([datasets.Dataset.from_dict(part) for part in (good, bad)])
    target = datasets.Dataset.from_dict({"input_ids": good["input_ids"][:4], "labels": good["labels"][:4]})
    shares = {}
    for selection in (
        FilterThenWeight(keep=3, oversample=4, cold_start=2),
        Tilt(keep=3, oversample=4, cold_start=2, ridge=0.5),
        TracIn(keep=3, oversample=4),
        Uniform(keep=3, oversample=4),
    ):
        folder = tmp_path / selection.name
        trainer = OnlineTrainer(
            model=tiny_model("llama", dtype=torch.float32), args=arguments(folder, max_steps=8), train_dataset=pool,
            target_dataset=target, data_collator=collate, selection=selection,
        )  # fmt: skip
        trainer.train()
        rows = [row for row in read_candidates(folder / "candidates").to_pylist() if not row["cold"]]
        shares[selection.name] = sum(r["weight"] for r in rows if r["source"] == "good") / sum(
            r["weight"] for r in rows
        )
    assert shares["filter-then-weight"] > 0.95 and shares["tracin"] > 0.95
    assert 0.55 < shares["tilt"] < 1.0
    assert 0.2 < shares["uniform"] < 0.8


def test_gradient_checkpointing_gives_the_same_run(tmp_path: Path) -> None:
    models = [tiny_model("llama", lora=True, dtype=torch.float32) for _ in range(2)]
    selection = Tilt(keep=4, oversample=2, cold_start=1)
    run(tmp_path / "plain", models[0], selection, max_steps=3)
    run(tmp_path / "changed", models[1], selection, max_steps=3, gradient_checkpointing=True)
    assert_close(models[0], models[1], 1e-5)


def test_bf16_autocast_gives_the_gradient_to_bf16s_digits_and_leaves_parameters_in_float32(tmp_path: Path) -> None:
    gradients = {}
    for bf16 in (False, True):
        model = tiny_model("llama", lora=True, dtype=torch.float32)
        trainer = OnlineTrainer(
            model=model, args=arguments(tmp_path / str(bf16), max_steps=2, bf16=bf16, max_grad_norm=0.0),
            train_dataset=POOL, target_dataset=TARGET, data_collator=collate, callbacks=[],
            selection=Full(keep=4, oversample=2),
        )  # fmt: skip
        finish, seen = trainer._finish_update, []

        def watched(*args: Any, finish: Any = finish, seen: Any = seen) -> None:
            finish(*args)
            seen.append(torch.cat([param.grad.flatten() for param in args[0].params.values()]).clone())

        trainer._finish_update = watched
        trainer.train()
        gradients[bf16] = seen[0]
        assert all(param.dtype == torch.float32 for param in model.parameters())
    error = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert 0 < error < 0.05  # bf16 keeps three digits of every number on the way


def test_oversampling_does_not_hang_on_an_attribute_that_the_trainer_sets_anew(tmp_path: Path) -> None:
    """Some versions set ``_train_batch_size`` to the rows of one forward pass when training starts."""

    class Older(OnlineTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self._train_batch_size = self.args.train_batch_size
            return super().train(*args, **kwargs)

        def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
            self._flush = None  # those versions have no such method, so nothing may depend on it
            return super()._finalize_training(*args, **kwargs)

    trainer = Older(
        model=tiny_model("llama", lora=True), train_dataset=POOL, target_dataset=TARGET, data_collator=collate,
        args=arguments(tmp_path, max_steps=4, per_device_train_batch_size=2, logging_strategy="no"),
        selection=TracIn(keep=4, oversample=5),
    )  # fmt: skip
    trainer.train()
    steps = read_candidates(tmp_path / "candidates")["step"].to_pylist()
    # 48 rows by 20: the third choice has what is left of the epoch. All is written although nothing was logged.
    assert [steps.count(step) for step in range(1, 5)] == [20, 20, 8, 20]
    assert trainer.get_total_train_batch_size(trainer.args) == 20


@pytest.mark.parametrize("size", [3, 40])
def test_another_number_of_candidates_than_asked_for_is_refused(tmp_path: Path, size: int) -> None:
    trainer = OnlineTrainer(
        model=tiny_model("llama", lora=True), args=arguments(tmp_path), train_dataset=POOL, target_dataset=TARGET,
        data_collator=collate, selection=TracIn(keep=4, oversample=5),
    )  # fmt: skip
    loader = trainer.get_train_dataloader

    def wrong() -> Any:
        trainer._share, asked = size, trainer._share
        found = loader()
        trainer._share = asked
        return found

    trainer.get_train_dataloader = wrong
    with pytest.raises(InvalidInput, match=f"given {size} candidates where keep x oversample = 20"):
        trainer.train()


def test_a_new_run_leaves_the_candidates_of_an_earlier_one_alone(tmp_path: Path) -> None:
    selection = Uniform(keep=2, oversample=2)
    run(tmp_path, tiny_model("llama", lora=True), selection, max_steps=2)
    before = read_candidates(tmp_path / "candidates")
    with pytest.raises(InvalidInput, match="holds the candidates of an earlier run"):
        run(tmp_path, tiny_model("llama", lora=True), selection, max_steps=1)
    assert read_candidates(tmp_path / "candidates").equals(before)
    run(tmp_path, tiny_model("llama", lora=True), selection, max_steps=1, log_candidates=False)


def test_a_row_without_source_has_none_in_the_log(tmp_path: Path) -> None:
    sources = [None, "a"] * 24
    pool = POOL.remove_columns("source").add_column("source", sources)
    trainer = OnlineTrainer(
        model=tiny_model("llama", lora=True), args=arguments(tmp_path, max_steps=2), train_dataset=pool,
        target_dataset=TARGET, data_collator=collate, selection=Uniform(keep=2, oversample=4),
    )  # fmt: skip
    trainer.train()
    for row in read_candidates(tmp_path / "candidates").to_pylist():
        assert row["source"] == sources[row["row"]]
    assert trainer._source_of_row == sources  # read once


def test_what_is_done_in_another_way_than_asked_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("gpt2", dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = OnlineTrainer(
        model=model, args=arguments(tmp_path, max_steps=3, warmup_steps=0), train_dataset=POOL,
        target_dataset=TARGET, data_collator=collate, selection=TracIn(keep=2, oversample=2), forecast_every=1,
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    assert caplog.text.count("dropout rate of 0.1, but dropout is off") == 1
    assert caplog.text.count("no forecast of the target loss: SGD is not an Adam") == 1
    assert not any("selection/predicted_drop" in entry for entry in trainer.state.log_history)


def test_fallbacks_are_said_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = OnlineTrainer(
        model=tiny_model("llama", lora=True), args=arguments(tmp_path, max_steps=3), train_dataset=POOL,
        target_dataset=TARGET, data_collator=collate, selection=_Opposed(),
    )  # fmt: skip
    trainer.train()
    assert caplog.text.count("nothing to match, so weights were equal, first in update 1") == 1
    assert [e["selection/fallback"] for e in trainer.state.log_history if "loss" in e] == [1.0, 1.0, 1.0]


class _Opposed(TracIn):
    """Never finds anything."""

    def choose(self, evidence: Any) -> Any:
        return dataclasses.replace(super().choose(evidence), fallback="nothing to match")


def test_a_call_of_train_begins_with_no_rest_of_the_last_one(tmp_path: Path) -> None:
    trainer = run(tmp_path, tiny_model("llama", lora=True), Uniform(keep=2, oversample=2), max_steps=1)
    trainer._micro, trainer._divisor = 1, 5.0  # as if stopped in the middle of an update
    trainer._meter.note("loss_of_the_last_call", 1.0)
    trainer._log_candidates = False
    trainer.train()
    assert (trainer._micro, trainer._divisor) == (0, 0.0)
    assert not any("selection/loss_of_the_last_call" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_projected_moments_see_the_gradient_that_adam_sees(tmp_path: Path, clip: float) -> None:
    selection = FilterThenWeight.paper(keep=2, oversample=2)  # 256 numbers a side: nothing of this model is projected
    trainer = run(tmp_path, tiny_model("gpt2", lora=True), selection, max_steps=3, max_grad_norm=clip)
    step = trainer._online_step()
    moments = read_adam(trainer.optimizer, step.params)
    for matrix in step.matrices:
        own = matrix.joined({name: moments[name].exp_avg_sq for name, _ in matrix.params})
        torch.testing.assert_close(step.shadow.moments[matrix.name].view_as(own), own, rtol=1e-4, atol=1e-30)


def test_projected_moments_that_a_checkpoint_lacks_are_missed_by_name(tmp_path: Path) -> None:
    selection = FilterThenWeight.paper(keep=2, oversample=2)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    run(tmp_path, tiny_model("gpt2", lora=True), selection, **settings)
    path = tmp_path / "checkpoint-2" / "tamis_selection.safetensors"
    with safe_open(path, framework="pt") as file:
        named = file.metadata()
    state = load_file(path)
    save_file({name: state[name] for name in ("target_seen", "work")}, path, metadata=named)
    with pytest.raises(InvalidInput, match="without its second moments"):
        run(tmp_path, tiny_model("gpt2", lora=True), selection, resume=str(tmp_path / "checkpoint-2"), **settings)


def test_clipping_is_pytorchs() -> None:
    grads = {name: torch.randn(3, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    params = [nn.Parameter(torch.zeros(3)) for _ in grads]
    for param, grad in zip(params, grads.values(), strict=True):
        param.grad = grad.clone()
    nn.utils.clip_grad_norm_(params, 0.1)
    factor = clip_factor(grads, 0.1)
    for param, grad in zip(params, grads.values(), strict=True):
        torch.testing.assert_close(param.grad, grad * factor)
    assert clip_factor(grads, None) == clip_factor(grads, 0.0) == clip_factor(grads, 1e9) == 1.0


def test_training_on_the_target_itself_is_said_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, tiny_model("llama", lora=True), TargetOnly(keep=3, oversample=2), max_steps=2)
    assert "memorises small targets" in caplog.text
    assert np.isfinite([e["loss"] for e in trainer.state.log_history if "loss" in e]).all()


def test_optimizers_moments_after_a_run_are_read_by_name(tmp_path: Path) -> None:
    trainer = run(tmp_path, tiny_model("llama", lora=True), Full(keep=2, oversample=2), max_steps=3)
    moments = read_adam(trainer.optimizer, trainer._online_step().params)
    assert {state.step for state in moments.values()} == {3}


def test_public_names() -> None:
    assert tamis.OnlineTrainer is OnlineTrainer
    assert tamis.online.FilterThenWeight is FilterThenWeight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor does not go with online selection"),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha does not go"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size does not go"),
    ],
)
def test_settings_that_would_change_the_gradient_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        run(tmp_path, tiny_model("llama", lora=True), TracIn(keep=2, oversample=2), **changes)


def test_a_target_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="target_dataset must hold at least one row"):
        OnlineTrainer(
            model=tiny_model("llama"), args=arguments(tmp_path), train_dataset=POOL, target_dataset=[],
            data_collator=collate, selection=TracIn(),
        )  # fmt: skip
    for count in (0, -1):
        with pytest.raises(InvalidSettings, match=f"target_rows must be at least 1, got {count}"):
            run(tmp_path, tiny_model("llama", lora=True), TracIn(), target_rows=count)


def test_target_rows_are_fresh_until_all_had_their_turn() -> None:
    drawn = np.concatenate([target_positions(k, count=3, total=7, seed=1) for k in range(7)])
    for turn in range(3):
        assert sorted(drawn[7 * turn : 7 * turn + 7]) == list(range(7))
    assert drawn[:7].tolist() != drawn[7:14].tolist()
    assert target_positions(4, count=3, total=7, seed=1).tolist() == drawn[12:15].tolist()


def test_batches_leave_out_rows_without_labels_and_cut_padding() -> None:
    inputs = collate([POOL[i] for i in range(5)])
    inputs["labels"][2] = -100
    batches = to_batches(inputs, torch.arange(10, 15), most_rows=2)
    assert [batch.rows.tolist() for batch in batches] == [[10, 11], [13, 14]]
    for batch in batches:
        assert batch.attention_mask.any(dim=0).all()
        assert (batch.supervised & (batch.attention_mask == 0)).sum() == 0
    for changed, message in (
        ({"position_ids": inputs["input_ids"]}, "'position_ids' beside"),
        ({"labels": inputs["labels"].roll(1, dims=1)}, "labels differ from the input ids"),
    ):
        with pytest.raises(Unsupported, match=message):
            to_batches({**inputs, **changed}, torch.arange(5), most_rows=2)
    with pytest.raises(Unsupported, match="hold no 'labels'"):
        to_batches({"input_ids": inputs["input_ids"]}, torch.arange(5), most_rows=2)
