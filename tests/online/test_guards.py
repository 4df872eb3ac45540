"""Nothing is silently done otherwise than asked: rows left out, masked labels, added losses, checkpoints of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, Trainer

from online_runs import IGNORED, arguments, collate, rows_of
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.online import Full, Greats, Lookahead, StepSettings, TargetOnly, Tilt, TracIn, Uniform
from tamis.online.batches import regrouped, to_batches
from tamis.online.checks import dropout_of, refuse_added_loss
from tamis.online.evidence import Measured
from tamis.online.fate import read_candidates
from tamis.online.trainer import OnlineTrainer
from tamis.online.window import Window
from tamis.trajectory.recorder import TrajectoryRecorder
from tiny_models import tiny_model

POOL, TARGET = rows_of(48, seed=1), rows_of(7, seed=2)
EOS = 2


def without_labels(rows: datasets.Dataset, places: Any) -> datasets.Dataset:
    found = rows.to_dict()
    for place in places:
        found["labels"][place] = [IGNORED] * len(found["labels"][place])
    return datasets.Dataset.from_dict(found)


def made(folder: Path, selection: Any, **changes: Any) -> OnlineTrainer:
    keys = ("step_settings", "target_rows", "train_dataset", "target_dataset", "data_collator", "callbacks", "model")
    ours = {key: changes.pop(key) for key in keys if key in changes}
    defaults = {
        "model": tiny_model("gpt2", lora=True), "train_dataset": POOL, "target_dataset": TARGET,
        "data_collator": collate, "forecast_every": 0,
    }  # fmt: skip
    return OnlineTrainer(args=arguments(folder, **changes), selection=selection, **{**defaults, **ours})


def test_a_window_with_too_few_usable_rows_for_its_choices_is_scored_anew(tmp_path: Path) -> None:
    """Of eight rows six or seven have labels: after three choices of two, none or one is left for the fourth."""
    pool = without_labels(rows_of(64, seed=1), range(0, 64, 5))
    method, settings = TracIn(keep=2, oversample=4), StepSettings(candidates="reuse:4")
    trainer = made(tmp_path, method, step_settings=settings, train_dataset=pool, max_steps=16)
    trainer.train()
    scored = [e["selection/scored"] for e in trainer.state.log_history if "selection/scored" in e]
    table = read_candidates(tmp_path / "candidates").to_pandas()
    fates = set()
    for window, part in table.groupby((table["step"] - 1) // 4):
        usable, first = part["row"].nunique(), 4 * window
        assert scored[first : first + 3] == [usable, 0, 0]
        assert scored[first + 3] == (usable if usable == 6 else 0)
        kept = part[part["kept"]].groupby("step")["row"].apply(list).tolist()
        assert [len(rows) for rows in kept] == [2, 2, 2, 2 if usable == 6 else 1]
        before_anew = [row for rows in kept[: 3 if usable == 6 else 4] for row in rows]
        assert len(set(before_anew)) == len(before_anew)
        fates.add(usable)
    assert fates == {6, 7}


def test_a_window_holds_as_long_as_a_row_with_a_finite_score_is_left() -> None:
    places, good = torch.arange(3), torch.tensor([True, False, True])
    window = Window(choices=3)
    window.open(places, Measured(losses=torch.ones(3), alignments=torch.ones(3), good=good))
    window.take(np.array([0]))
    assert window.holds(places)
    window.take(np.array([2]))
    assert not window.holds(places)


def ending_in_a_masked_label(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded by the end-of-text token, which the mask tells from nothing else."""
    inputs = collate([{name: [*row[name], EOS] for name in ("input_ids", "labels")} for row in rows])
    inputs["input_ids"][inputs["attention_mask"] == 0] = EOS
    inputs["attention_mask"] = (inputs["input_ids"] != EOS).long()
    return inputs


def padding_labelled(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the left, with labels on everything."""
    inputs = collate(rows)
    for name, values in inputs.items():
        for i, row in enumerate(rows):
            inputs[name][i] = values[i].roll(values.shape[1] - len(row["input_ids"]))
    return {**inputs, "labels": inputs["input_ids"].clone()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("collator", [ending_in_a_masked_label, padding_labelled])
@pytest.mark.parametrize(
    "method",
    # All keep all: unweighed, by gradients, and by tangents, after which the rows are put together anew.
    [
        (Full(keep=4, oversample=2), "exact"),
        (TracIn(keep=8, oversample=1), "exact"),
        (TracIn(keep=8, oversample=1), "jvp"),
    ],
    ids=["full", "tracin", "tracin-jvp"],
)
def test_labels_where_the_mask_is_zero_are_trained_on_as_by_the_plain_trainer(
    tmp_path: Path, family: str, collator: Any, method: tuple[Any, str]
) -> None:
    shared = {"max_steps": 3, "max_grad_norm": 0.05}
    ours, theirs = tiny_model(family), tiny_model(family)
    settings = StepSettings(reduction="tokens", candidates=method[1])
    made(
        tmp_path / "a", method[0], model=ours, data_collator=collator, step_settings=settings,
        per_device_train_batch_size=3, **shared,
    ).train()  # fmt: skip
    Trainer(
        model=theirs, args=arguments(tmp_path / "b", per_device_train_batch_size=8, **shared), train_dataset=POOL,
        data_collator=collator,
    ).train()  # fmt: skip
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_row_whose_only_label_is_masked_is_a_candidate_and_keeps_its_column() -> None:
    ids = torch.tensor([[5, 6, EOS, EOS], [7, 8, 9, EOS], [5, EOS, EOS, EOS]])
    labels = torch.tensor([[IGNORED, IGNORED, EOS, IGNORED], [IGNORED, 8, 9, EOS], [IGNORED] * 4])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": (ids != EOS).long()}
    batches = to_batches(inputs, torch.arange(3), most_rows=1)
    assert [batch.rows.tolist() for batch in batches] == [[0], [1]]
    assert [batch.supervised.tolist() for batch in batches] == [[[False, False, True]], [[False, True, True, True]]]
    ((joined, _, _),) = regrouped([to_batches(inputs, torch.arange(3), most_rows=2)[0]], np.array([1.0, 0.0]))
    assert joined.supervised.tolist() == [[False, False, True]]
    assert joined.attention_mask.tolist() == [[1, 1, 0]]


def test_a_record_takes_a_masked_label_at_the_end_and_refuses_a_mask_before_it(tmp_path: Path) -> None:
    for name, collator in (("end", ending_in_a_masked_label), ("left", padding_labelled)):
        recorder = TrajectoryRecorder(tmp_path / f"record-{name}")
        trainer = made(
            tmp_path / name, TracIn(keep=2, oversample=2), data_collator=collator, callbacks=[recorder], max_steps=2
        )
        if name == "end":
            trainer.train()
        else:
            with pytest.raises(Unsupported, match="attention_mask 0 before their last label"):
                trainer.train()


def routed(**changes: Any) -> nn.Module:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_a_loss_that_routers_add_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"output_router_logits=True.*set config.output_router_logits=False"):
        made(tmp_path, TracIn(keep=2, oversample=2), model=routed(output_router_logits=True))
    refuse_added_loss(routed())
    refuse_added_loss(tiny_model("gpt2", lora=True))


def test_dropout_that_only_classifiers_have_is_not_warned_of() -> None:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 4}
    assert GPT2Config().summary_first_dropout > 0
    model = GPT2LMHeadModel(GPT2Config(**sizes, **off, classifier_dropout=0.1))
    assert dropout_of(model) is None
    model.config.attn_pdrop = 0.2
    assert dropout_of(model) == "the model's configuration has attn_pdrop=0.2"


@pytest.mark.parametrize("method", [TracIn(keep=2, oversample=4), TargetOnly(keep=2, oversample=4)])
def test_target_rows_without_labels_are_left_out_and_the_others_take_turns(
    tmp_path: Path, method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    target = without_labels(TARGET, range(5))
    trainer = made(tmp_path, method, target_dataset=target, target_rows=2, max_steps=4)
    assert caplog.text.count("5 of 7 target rows have no supervised token and are left out") == 1
    for number in range(4):
        assert sorted(trainer._target_places(number, looks=True)) == [5, 6]
    trainer.train()
    seen = [e["selection/target_rows_seen"] for e in trainer.state.log_history if "selection/target_rows_seen" in e]
    assert seen == [2.0] * 4
    assert caplog.text.count("left out") == 1


def test_a_target_without_any_label_is_refused_at_the_start_by_methods_that_look_at_it(tmp_path: Path) -> None:
    target = without_labels(TARGET, range(7))
    with pytest.raises(InvalidInput, match="none of the 7 rows of target_dataset has a supervised token"):
        made(tmp_path, TracIn(keep=2, oversample=2), target_dataset=target)
    made(tmp_path, Uniform(keep=2, oversample=2), target_dataset=target, max_steps=1).train()


SIZES = {"keep": 2, "oversample": 4, "cold_start": 1}
REUSE = StepSettings(candidates="reuse:4")
OTHERS: list[tuple[Any, StepSettings, Any, StepSettings, dict[str, Any], str]] = [
    (TracIn(**SIZES), REUSE, Greats(**SIZES), REUSE, {}, "selection was 'tracin' there and is 'greats' now"),
    (
        TracIn(**SIZES), REUSE, TracIn(keep=4, oversample=2, cold_start=1), StepSettings(candidates="reuse:2"), {},
        "selection.keep was 2 there and is 4 now, selection.oversample was 4 there and is 2 now, "
        "step_settings.candidates was 'reuse:4' there and is 'reuse:2' now",
    ),
    (
        Tilt(**SIZES), StepSettings(target_ema=0.5), Tilt(**SIZES), StepSettings(), {},
        "step_settings.target_ema was 0.5 there and is 0.0 now",
    ),
    (
        Lookahead(**SIZES, horizon=3), StepSettings(), Lookahead(**SIZES, horizon=2), StepSettings(), {},
        "selection.horizon was 3 there and is 2 now",
    ),
    (
        TracIn(**SIZES), StepSettings(), TracIn(**SIZES), StepSettings(), {"gradient_accumulation_steps": 3},
        "gradient_accumulation_steps was 1 there and is 3 now",
    ),
    (
        TracIn(**SIZES), StepSettings(), TracIn(**SIZES), StepSettings(), {"target_rows": 2},
        "target_rows was 4 there and is 2 now",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("first", "as_first", "second", "as_second", "changes", "message"), OTHERS)
def test_a_run_that_chooses_otherwise_than_the_checkpoints_is_refused_by_what_differs(
    tmp_path: Path,
    first: Any,
    as_first: StepSettings,
    second: Any,
    as_second: StepSettings,
    changes: dict[str, Any],
    message: str,
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    made(tmp_path, first, step_settings=as_first, **saving).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(InvalidSettings) as refused:
        made(tmp_path, second, step_settings=as_second, **saving, **changes).train(checkpoint)
    assert f"checkpoint-2 is a checkpoint of another run: {message}; resume with" in str(refused.value)


def test_a_number_of_numpys_is_the_number_that_it_is(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    made(tmp_path, TracIn(keep=2, oversample=2, cold_start=np.int64(1)), **saving).train()  # type: ignore[arg-type]
    checkpoint = str(tmp_path / "checkpoint-2")
    made(tmp_path, TracIn(keep=2, oversample=2, cold_start=1), **saving).train(checkpoint)
    with pytest.raises(InvalidSettings, match=r"selection\.cold_start was 1 there and is 2 now"):
        made(tmp_path, TracIn(keep=2, oversample=2, cold_start=2), **saving).train(checkpoint)
