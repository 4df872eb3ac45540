"""Cheaper candidates in the Trainer: windows through loaders and checkpoints, proxies, forecasts, what is refused."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.utils.data import DataLoader

from online_runs import arguments, collate, rows_of
from online_steps import calls_of
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.online import FilterThenWeight, StepSettings, TracIn
from tamis.online.checks import refuse_sharded
from tamis.online.fate import read_candidates
from tamis.online.loader import ShareSampler
from tamis.online.numbered import ROWS, NumberedCollator, NumberedRows, filler
from tamis.online.target_turns import target_positions
from tamis.online.trainer import OnlineTrainer
from tamis.online.window import WindowSampler
from tiny_models import tiny_model

POOL, TARGET = rows_of(40, seed=1), rows_of(7, seed=2)
METHOD = FilterThenWeight(keep=2, oversample=4, cold_start=2)


def made(folder: Path, model: Any, selection: Any, settings: StepSettings, **changes: Any) -> OnlineTrainer:
    ours = {key: changes.pop(key) for key in ("proxy_model", "forecast_every", "target_rows") if key in changes}
    return OnlineTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=POOL, target_dataset=TARGET,
        data_collator=collate, selection=selection, step_settings=settings, **ours,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "processes"), [(20, 1), (23, 2), (37, 3)])
def test_every_process_sees_its_own_part_of_every_window_again_and_again(rows: int, processes: int) -> None:
    windows = WindowSampler(range(rows), 4, times=3, processes=processes)
    assert len(windows) == len(list(windows)) == rows // (4 * processes) * processes * 3
    for rank in range(processes):
        own = list(BatchSamplerShard(windows, processes, rank))
        assert len(own) == len(windows) // processes
        for first in range(0, len(own), 3):
            start = (first // 3 * processes + rank) * 4
            assert own[first : first + 3] == [list(range(start, start + 4))] * 3
    loader = DataLoader(list(range(rows)), batch_sampler=windows)  # type: ignore[arg-type]
    rest = [batch.tolist() for batch in skip_first_batches(loader, 2)]
    assert rest == [batch.tolist() for batch in loader][2:]


@pytest.mark.parametrize(("rows", "processes"), [(24, 2), (21, 2), (37, 3), (2, 3), (13, 3)])
def test_processes_see_every_row_of_an_epoch_once_and_divide_what_its_last_choice_has(
    rows: int, processes: int
) -> None:
    shares = ShareSampler(range(rows), 4, processes=processes)
    assert len(shares) == len(list(shares)) == math.ceil(rows / (4 * processes)) * processes
    own = [list(BatchSamplerShard(shares, processes, rank)) for rank in range(processes)]
    for number, choice in enumerate(zip(*own, strict=True)):
        assert [len(share) for share in choice] == [4] * processes  # what launchers leave as it is
        real = [[place for place in share if place >= 0] for share in choice]
        first = number * 4 * processes
        assert [*chain(*real)] == list(range(first, min(rows, first + 4 * processes)))  # in the order of one process
        assert max(map(len, real)) - min(map(len, real)) <= 1
    batch = NumberedCollator(collate)([NumberedRows(POOL)[place] for place in (3, filler(2))])
    assert batch[ROWS].tolist() == [3, -3]
    assert bool((batch["labels"][0] >= 0).any()) and not bool((batch["labels"][1] >= 0).any())


def test_windows_are_scored_once_and_a_run_resumes_in_the_middle_of_one_bit_for_bit(tmp_path: Path) -> None:
    """Two epochs of five windows of eight rows; updates 1 and 2 are cold, so the first window is scored at update 3."""
    settings = StepSettings(candidates="reuse:3")
    whole, halves = tiny_model("gpt2", lora=True), [tiny_model("gpt2", lora=True) for _ in range(2)]
    trainer = made(tmp_path / "a", whole, METHOD, settings, max_steps=17, save_strategy="no", forecast_every=0)
    with calls_of(whole) as calls:
        trainer.train()
    seen = read_candidates(tmp_path / "a" / "candidates").to_pandas()
    rows_by_step = [set(part["row"]) for _, part in seen.groupby("step")]
    assert [rows_by_step[step] == rows_by_step[step - 1] for step in range(1, 17)] == [
        step % 3 != 0 for step in range(1, 17)
    ]
    kept = seen[seen["kept"] & ~seen["cold"]]
    for window, part in kept.groupby((kept["step"] - 1) // 3):
        assert part["row"].is_unique, window
    # Cold: the chosen. Scored: target rows (4 of 7) and eight candidates. Later in a window: the chosen.
    scored = [4, 4, 4]
    assert calls == [2, 2, *scored, *(([*scored, 2, 2]) * 5)][: len(calls)]
    assert calls.count(4) == 3 * 6

    first = made(
        tmp_path / "b", halves[0], METHOD, settings, max_steps=17, save_strategy="steps", save_steps=8, forecast_every=0
    )
    first.train()
    second = made(
        tmp_path / "b", halves[1], METHOD, settings, max_steps=17, save_strategy="steps", save_steps=8, forecast_every=0
    )
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-8"))
    for (name, a), b in zip(whole.named_parameters(), halves[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(second.work(), trainer.work())
    again = read_candidates(tmp_path / "b" / "candidates").to_pandas()
    assert again.equals(seen)
    logged = [entry for entry in second.state.log_history if "selection/score_age" in entry]
    assert {entry["selection/score_age"] for entry in logged} == {0.0, 1.0, 2.0}


def test_a_proxy_chooses_and_forecasts_are_the_trained_models(tmp_path: Path) -> None:
    proxy = tiny_model("gpt2", dtype=torch.float32, seed=1, blocks=1)
    model = tiny_model("gpt2", lora=True)
    method = TracIn(keep=2, oversample=3)
    trainer = made(
        tmp_path / "a", model, method, StepSettings(candidates="proxy"), proxy_model=proxy, max_steps=4,
        forecast_every=2,
    )  # fmt: skip
    with calls_of(model) as calls, calls_of(proxy) as by_proxy:
        trainer.train()
    # The chosen, every time; three target rows before every second update, and again after it.
    assert calls == [2, 2, 3, 3, 2, 2, 3, 3]
    assert by_proxy == [3, 4, 2] * 4
    entries = [entry for entry in trainer.state.log_history if "selection/predicted_drop" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(np.isfinite([e["selection/predicted_drop"], e["selection/realised_drop"]]).all() for e in entries)
    with pytest.raises(InvalidSettings, match="pass proxy_model="):
        made(tmp_path / "b", model, method, StepSettings(candidates="proxy"))
    with pytest.raises(InvalidSettings, match="a proxy model is given but candidates='exact'"):
        made(tmp_path / "b", model, method, StepSettings(), proxy_model=proxy)


def test_forward_only_scores_under_autocast_keep_bf16s_digits(tmp_path: Path) -> None:
    seen = []
    for candidates in ("exact", "jvp"):
        model = tiny_model("llama", lora=True, dtype=torch.float32)
        method = TracIn(keep=2, oversample=4)
        made(tmp_path / candidates, model, method, StepSettings(candidates=candidates), max_steps=1, bf16=True).train()
        seen.append(read_candidates(tmp_path / candidates / "candidates")["alignment"].to_numpy())
    assert np.abs(seen[0] - seen[1]).max() < 0.05 * np.abs(seen[0]).max()


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
def test_the_logged_loss_is_of_the_rows_that_were_run(tmp_path: Path, reduction: Any) -> None:
    """Their weighted mean, times their tokens if those count alike. Rows of weight zero are not run by the model."""
    proxy = tiny_model("gpt2", seed=1, blocks=1)
    method = FilterThenWeight(
        keep=6, oversample=1, alignment="raw", interactions="raw", filter="top", weights="nnls", cold_start=0
    )
    settings = StepSettings(candidates="proxy", reduction=reduction)
    trainer = made(tmp_path, tiny_model("gpt2", lora=True), method, settings, proxy_model=proxy, max_steps=5)
    trainer.train()
    seen = read_candidates(tmp_path / "candidates").to_pandas()
    assert (seen["weight"] == 0).any()
    for entry in trainer.state.log_history:
        if "selection/effective_size" in entry:
            own = seen[(seen["step"] == entry["step"]) & (seen["weight"] > 0)]
            weights = own["weight"] * (own["tokens"] if reduction == "tokens" else 1)
            assert entry["loss"] == pytest.approx(np.average(own["loss"], weights=weights), rel=1e-5)


def test_a_look_serves_two_choices_and_all_target_rows_have_their_turn(tmp_path: Path) -> None:
    model = tiny_model("gpt2", lora=True)
    settings = StepSettings(target_every=2)
    trainer = made(
        tmp_path, model, TracIn(keep=2, oversample=2), settings, max_steps=6, target_rows=3, forecast_every=0
    )
    with calls_of(model) as calls:
        trainer.train()
    assert calls == [3, 4, 4] * 3
    looked = {int(row) for look in range(3) for row in target_positions(look, count=3, total=7, seed=3)}
    assert looked == set(range(7))
    seen = [e["selection/target_rows_seen"] for e in trainer.state.log_history if "selection/target_rows_seen" in e]
    assert seen == [3.0, 6.0, 7.0]
    ages = [e["selection/target_age"] for e in trainer.state.log_history if "selection/target_age" in e]
    assert ages == [0.0, 1.0] * 3


def test_a_look_serves_as_many_choices_where_epochs_end_within_an_update(tmp_path: Path) -> None:
    """Ten choices an epoch in updates of four: the third update has two, and the numbers of choices skip two."""
    model = tiny_model("gpt2", lora=True)
    settings = StepSettings(target_every=5)
    trainer = made(
        tmp_path, model, TracIn(keep=2, oversample=2), settings, max_steps=6, gradient_accumulation_steps=4,
        target_rows=3, forecast_every=0, logging_steps=3,
    )  # fmt: skip
    with calls_of(model) as calls:
        trainer.train()
    assert calls == [3, *[4] * 5] * 4
    seen = [e["selection/target_rows_seen"] for e in trainer.state.log_history if "selection/target_rows_seen" in e]
    assert seen == [6.0, 7.0]  # the latest number, no mean over choices


def test_a_pool_smaller_than_a_window_is_refused(tmp_path: Path) -> None:
    model, settings = tiny_model("gpt2", lora=True), StepSettings(candidates="reuse:2")
    trainer = made(tmp_path, model, TracIn(keep=8, oversample=8), settings)
    with pytest.raises(InvalidInput, match="train_dataset has 40 rows, fewer than the 64 of one window"):
        trainer.train()


def test_a_checkpoint_that_is_incomplete_or_of_another_trainer_is_refused_by_name(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    made(tmp_path, tiny_model("gpt2", lora=True), METHOD, StepSettings(), **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    path = checkpoint / "tamis_selection.safetensors"
    with safe_open(path, framework="pt") as file:
        named = file.metadata()
    state = load_file(path)
    assert state.pop("target_seen").shape == (7,)
    save_file(state, path, metadata=named)
    trainer = made(tmp_path, tiny_model("gpt2", lora=True), METHOD, StepSettings(), **settings)
    with pytest.raises(InvalidInput, match="it does not say which target rows were looked at; resume from another"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    path.unlink()
    with pytest.raises(InvalidInput, match=r"has no tamis_selection.safetensors, so it is no checkpoint of an online"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_sharded_parameters_are_refused_at_the_start(tmp_path: Path) -> None:
    """As FSDP2 leaves them: ``DTensor`` parameters, here over one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny_model("gpt2")
        torch.distributed.fsdp.fully_shard(model)
        with pytest.raises(Unsupported, match=r"parameter 'transformer.wte.weight' is sharded.*plain DDP"):
            refuse_sharded(model)
        with pytest.raises(Unsupported, match="is sharded over processes"):
            made(tmp_path, model, METHOD, StepSettings())
        other = tiny_model("gpt2", lora=True)
        (name, param), *_ = [(n, p) for n, p in other.named_parameters() if p.requires_grad]
        module, _, leaf = name.rpartition(".")
        sharded = distribute_tensor(param.detach(), DeviceMesh("cpu", [0]))
        setattr(other.get_submodule(module), leaf, torch.nn.Parameter(sharded))
        with pytest.raises(Unsupported, match=f"parameter '{name}' is sharded"):
            refuse_sharded(other)
    finally:
        torch.distributed.destroy_process_group()
