"""Oracle: a hand-written loop over rows with full logits. Interrupts at every update, and a real kill -9."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fake_task import random_tokens
from score_task import file_bytes
from tamis.errors import InvalidInput, InvalidSettings, NonFinite, StoreCorrupted, StoreMismatch, Unsupported
from tamis.model.loss import per_sample_losses
from tamis.seeds import child_seed, random_permutation
from tamis.training import loop
from tamis.training.checkpoints import complete_checkpoints, read_moments
from tamis.training.loop import Spent, TrainSettings, fine_tune, learning_rate_at, num_steps, rows_of_step, run_identity
from tamis.training.lora import add_lora
from tamis.types import Batch, IntArray, TokenizedExample
from tiny_models import tiny_model

TOKENS = random_tokens([9, 5, 12, 7, 4, 10, 6], seed=1)
ROWS = np.array([0, 1, 2, 4, 5, 6])  # row 3 is not trained on
# eps: with 1e-8 Adam makes whole steps of gradients that are zero but for rounding (GPT-2's key biases).
SETTINGS = TrainSettings(
    epochs=2, update_rows=4, learning_rate=5e-3, lr_warmup_share=0.4, clip=0.5, weight_decay=0.1, eps=1e-5
)

# Float32 gradients differ by about 1e-6 of their layer's norm; eps = 1e-5 turns that into at most a tenth of a step.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def lora_model(family: str = "llama", *, dtype: torch.dtype = torch.float32) -> nn.Module:
    return add_lora(tiny_model(family, dtype=dtype), rank=2, alpha=4, seed=7)


def full_model(family: str = "llama") -> nn.Module:
    return tiny_model(family, dtype=torch.float32)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def hand_written(model: nn.Module, rows_by_step: list[IntArray], rates: list[float]) -> None:
    """One row at a time, full logits, cross_entropy; the same optimizer."""
    params = list(trainable(model).values())
    matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=0, eps=1e-5
    )
    for rows, rate in zip(rows_by_step, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total = torch.zeros(())
        for row in rows:
            ids = torch.from_numpy(TOKENS[row].input_ids.astype(np.int64))
            labels = torch.where(torch.from_numpy(TOKENS[row].supervised), ids, -100)
            logits = model(input_ids=ids[None]).logits[0]
            total = total + nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
        (total / len(rows)).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in params))
        for param in params:
            param.grad *= min(1.0, 0.5 / (float(norm) + 1e-6))
        optimizer.step()


@pytest.mark.parametrize("make", [lora_model, full_model])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_fine_tuning_equals_a_hand_written_loop(make: Callable[[str], nn.Module], family: str) -> None:
    model, reference = make(family), make(family)
    fine_tune(model, TOKENS, ROWS, SETTINGS, seed=3)
    total = num_steps(SETTINGS, len(ROWS))
    hand_written(
        reference,
        [rows_of_step(SETTINGS, step, ROWS, seed=3) for step in range(total)],
        [learning_rate_at(SETTINGS, step, total) for step in range(total)],
    )
    for name, param in trainable(model).items():
        torch.testing.assert_close(param, trainable(reference)[name], **CLOSE)


def test_nothing_but_the_trainable_parameters_changes() -> None:
    model = lora_model()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in trainable(model).items()}
    fine_tune(model, TOKENS, ROWS, SETTINGS, seed=0)
    for name, param in model.named_parameters():
        assert torch.equal(param, frozen[name]) if name in frozen else not torch.equal(param, before[name])


def test_micro_batches_only_bound_memory() -> None:
    whole, small = lora_model(), lora_model()
    fine_tune(whole, TOKENS, ROWS, SETTINGS, seed=0)
    fine_tune(small, TOKENS, ROWS, replace(SETTINGS, batch_tokens=1), seed=0)
    for name, param in trainable(whole).items():
        torch.testing.assert_close(param, trainable(small)[name], **CLOSE)


def _out_of_memory_above(
    monkeypatch: pytest.MonkeyPatch, tokens: int | Callable[[], int], *, error: Exception
) -> list[int]:
    """Padded tokens of every forward pass; those above ``tokens`` fail in the backward pass, gradients half made."""
    sizes: list[int] = []
    original = torch.autograd.backward

    def backward(loss: torch.Tensor) -> None:
        original(loss)
        if sizes[-1] > (tokens if isinstance(tokens, int) else tokens()):
            raise error

    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        sizes.append(batch.input_ids.numel())
        return per_sample_losses(model, batch)

    monkeypatch.setattr(loop.torch.autograd, "backward", backward)
    monkeypatch.setattr(loop, "per_sample_losses", losses)
    return sizes


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_pass_that_does_not_fit_in_memory_is_halved_and_the_update_made_anew(
    monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    plain, starved = lora_model(), lora_model()
    fine_tune(plain, TOKENS, ROWS, SETTINGS, seed=0)
    sizes = _out_of_memory_above(monkeypatch, 20, error=error)
    fine_tune(starved, TOKENS, ROWS, SETTINGS, seed=0)
    for name, param in trainable(plain).items():
        torch.testing.assert_close(param, trainable(starved)[name], **CLOSE)
    failed = [size for size in sizes if size > 20]
    assert failed
    assert sizes.index(failed[-1]) < len(sizes) // 2  # the lower limit is kept: later updates do not fail again
    assert all(later < earlier for earlier, later in itertools.pairwise(failed))
    assert len([record for record in caplog.records if "out of memory" in record.message]) == len(failed)


@pytest.mark.parametrize("stop", [3, 4])  # right after the update whose pass did not fit, and a checkpoint later
def test_a_resume_with_more_memory_ends_in_the_bytes_of_the_run_that_had_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    settings = replace(SETTINGS, epochs=3, save_steps=2)

    def run(folder: Path, *, most_tokens: int, stop: int | None = None) -> list[int]:
        """Padded tokens of the passes that fitted, of which those of the first two updates always do."""
        updates = 0

        def after_update() -> None:
            nonlocal updates
            updates += 1
            if updates == stop:
                raise StopHereError

        with monkeypatch.context() as patch:
            sizes = _out_of_memory_above(
                patch, lambda: most_tokens if updates >= 2 else 1000, error=torch.OutOfMemoryError("out of memory")
            )
            with contextlib.suppress(StopHereError):
                fine_tune(lora_model(), TOKENS, ROWS, settings, seed=0, folder=folder, after_update=after_update)
        return sizes

    whole = run(tmp_path / "whole", most_tokens=20)
    assert max(whole[:2]) > 20, "the first two updates make larger passes than later ones"
    run(tmp_path / "killed", most_tokens=20, stop=stop)
    resumed = run(tmp_path / "killed", most_tokens=1000)
    assert resumed == whole[-len(resumed) :] and max(resumed) <= 20
    assert file_bytes(tmp_path / "killed") == file_bytes(tmp_path / "whole")


def test_a_single_row_that_does_not_fit_in_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _out_of_memory_above(monkeypatch, 3, error=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(Unsupported, match=r"row \d: its \d+ tokens alone do not fit in memory for training"):
        fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _out_of_memory_above(monkeypatch, 0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0)


def test_double_precision_trains(tmp_path: Path) -> None:
    single, double = full_model(), tiny_model("llama", dtype=torch.float64)
    fine_tune(single, TOKENS, ROWS, SETTINGS, seed=0)
    (*_, last) = fine_tune(double, TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path)
    for name, param in trainable(double).items():
        torch.testing.assert_close(trainable(single)[name].double(), param, **CLOSE)
    assert all(moment.dtype == torch.float32 for moment in read_moments(last.folder, double).exp_avg.values())
    again = tiny_model("llama", dtype=torch.float64, seed=1)
    fine_tune(again, TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path)
    assert all(torch.equal(param, trainable(double)[name]) for name, param in trainable(again).items())


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = lora_model(), lora_model()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for model in (plain, checkpointed):
        fine_tune(model, TOKENS, ROWS, SETTINGS, seed=0)
    for name, param in trainable(plain).items():
        torch.testing.assert_close(param, trainable(checkpointed)[name], **CLOSE)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=12, update_rows=6, learning_rate=1e-2)
    (*_, last) = fine_tune(full_model(), TOKENS, ROWS, settings, seed=0, folder=tmp_path)
    losses = [record.loss for record in last.history]
    assert losses[-1] < losses[0] - 1


def test_learning_rate_of_ten_updates_by_hand() -> None:
    settings = TrainSettings(learning_rate=1.0, lr_warmup_share=0.2)
    rates = [learning_rate_at(settings, step, 10) for step in range(10)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


@given(num_rows=st.integers(1, 40), update_rows=st.integers(1, 9), epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_epoch_has_every_row_once(num_rows: int, update_rows: int, epochs: int, seed: int) -> None:
    settings = TrainSettings(epochs=epochs, update_rows=update_rows)
    rows = np.arange(num_rows) * 3
    steps = [rows_of_step(settings, step, rows, seed=seed) for step in range(num_steps(settings, num_rows))]
    assert sum(len(step) for step in steps) == epochs * num_rows
    per_epoch = len(steps) // epochs
    for epoch in range(epochs):
        seen = np.concatenate(steps[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(seen.tolist()) == rows.tolist()


def test_a_checkpoint_lies_at_the_end_of_every_epoch_with_its_mean_learning_rate(tmp_path: Path) -> None:
    found = fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path)
    rates = [learning_rate_at(SETTINGS, step, 4) for step in range(4)]
    assert [point.step for point in found] == [2, 4]
    np.testing.assert_allclose([p.learning_rate for p in found], [np.mean(rates[:2]), np.mean(rates[2:])])
    every_three = fine_tune(
        lora_model(), TOKENS, ROWS, replace(SETTINGS, save_steps=3, steps=5), seed=0, folder=tmp_path / "b"
    )
    assert [point.step for point in every_three] == [3, 5]


def test_a_cost_is_told_before_its_checkpoint_is_there(tmp_path: Path) -> None:
    """A run that is killed between the two must make both again: the other way round, the cost would be lost."""
    seen: list[list[str]] = []

    def told(spent: Spent) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("step-*")))

    fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path, on_checkpoint=told)
    assert seen == [[], ["step-000002"]]


def test_costs_are_told_per_checkpoint(tmp_path: Path) -> None:
    spent: list[Spent] = []
    fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path, on_checkpoint=spent.append)
    lengths = [len(TOKENS[row].input_ids) for row in ROWS]
    assert [s.checkpoint for s in spent] == [0, 1]
    assert [s.tokens for s in spent] == [sum(lengths)] * 2
    assert [s.squared_tokens for s in spent] == [sum(n * n for n in lengths)] * 2
    assert [s.rows for s in spent] == [len(ROWS)] * 2


# --- resuming ------------------------------------------------------------------------------------------------------


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("make", [lora_model, full_model])
def test_a_run_stopped_at_any_update_ends_with_identical_bytes(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    settings = replace(SETTINGS, epochs=3)
    fine_tune(make(), TOKENS, ROWS, settings, seed=0, folder=tmp_path / "whole")
    whole = file_bytes(tmp_path / "whole")
    for stop_after in range(1, num_steps(settings, len(ROWS))):
        folder, done = tmp_path / f"stopped-{stop_after}", [0]

        def count(steps: int, done: list[int] = done, stop_after: int = stop_after) -> None:
            done[0] += steps
            if done[0] == stop_after:
                raise StopHereError

        with pytest.raises(StopHereError):
            fine_tune(make(), TOKENS, ROWS, settings, seed=0, folder=folder, advance=count)
        told: list[int] = []
        model = make()
        fine_tune(model, TOKENS, ROWS, settings, seed=0, folder=folder, advance=told.append)
        assert file_bytes(folder) == whole
        assert sum(told) == num_steps(settings, len(ROWS))


_SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from fake_task import random_tokens
from tamis.training.loop import TrainSettings, fine_tune
from tamis.training.lora import add_lora
from tiny_models import tiny_model

folder, pause = Path(sys.argv[1]), float(sys.argv[2])
model = add_lora(tiny_model("llama", dtype=torch.float32), rank=2, alpha=4, seed=7)
settings = TrainSettings(epochs=12, update_rows=4, learning_rate=5e-3)
fine_tune(
    model, random_tokens([9, 5, 12, 7, 4, 10, 6], seed=1), np.arange(7), settings, seed=0, folder=folder,
    advance=lambda steps: time.sleep(pause),
)
"""


def _start(folder: Path, pause: float) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(folder), str(pause)], env=environment)


def test_a_run_killed_for_real_ends_with_identical_bytes(tmp_path: Path) -> None:
    killed = _start(tmp_path / "killed", 0.05)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed").glob("step-*[0-9]")):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(float(np.random.default_rng().uniform(0, 0.4)))  # anywhere: between updates or inside a checkpoint
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    kept = len(list((tmp_path / "killed").glob("step-*[0-9]")))
    assert 0 < kept < 12
    resumed = _start(tmp_path / "killed", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: the order of sums may depend on it
    try:
        settings = TrainSettings(epochs=12, update_rows=4, learning_rate=5e-3)
        fine_tune(lora_model(), TOKENS, np.arange(7), settings, seed=0, folder=tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert resumed.wait() == 0
    assert file_bytes(tmp_path / "killed") == file_bytes(tmp_path / "whole")


def test_another_setting_is_refused_by_its_name(tmp_path: Path) -> None:
    fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path)
    for settings, rows, seed, field in (
        (replace(SETTINGS, learning_rate=1e-3), ROWS, 0, r"settings.learning_rate=0.005, this run has 0.001"),
        (SETTINGS, ROWS[::-1].copy(), 0, "data="),
        (SETTINGS, ROWS, 1, "seed=0, this run has 1"),
    ):
        with pytest.raises(StoreMismatch, match=field):
            fine_tune(lora_model(), TOKENS, rows, settings, seed=seed, folder=tmp_path)


def test_changed_tokens_are_another_run(tmp_path: Path) -> None:
    identity = run_identity(SETTINGS, TOKENS, ROWS, seed=0)
    changed = [*TOKENS]
    mask = TOKENS[0].supervised.copy()
    mask[2] = not mask[2]
    changed[0] = TokenizedExample(input_ids=TOKENS[0].input_ids, supervised=mask, truncated=0)
    assert run_identity(SETTINGS, changed, ROWS, seed=0) != identity


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json"])
def test_a_flipped_byte_is_found(tmp_path: Path, file: str) -> None:
    short = replace(SETTINGS, epochs=1)
    fine_tune(lora_model(), TOKENS, ROWS, short, seed=0, folder=tmp_path)
    path = tmp_path / "step-000002" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorrupted, match=f"{file} is not what was written"):
        fine_tune(lora_model(), TOKENS, ROWS, short, seed=0, folder=tmp_path)


def test_a_missing_earlier_checkpoint_is_found(tmp_path: Path) -> None:
    fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path)
    (tmp_path / "step-000002").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreCorrupted, match=r"checkpoints of updates \[4\] but the last one followed \[2\]"):
        complete_checkpoints(tmp_path, identity=run_identity(SETTINGS, TOKENS, ROWS, seed=0))


def test_a_manifest_that_is_no_json_is_found(tmp_path: Path) -> None:
    fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path)
    (tmp_path / "step-000004" / "training.json").write_text("{")
    with pytest.raises(StoreCorrupted, match=r"training\.json cannot be read"):
        complete_checkpoints(tmp_path, identity=run_identity(SETTINGS, TOKENS, ROWS, seed=0))


def test_the_manifest_is_written_last_and_names_every_file(tmp_path: Path) -> None:
    (point, *_) = fine_tune(lora_model(), TOKENS, ROWS, SETTINGS, seed=0, folder=tmp_path)
    manifest = json.loads((point.folder / "training.json").read_text())
    on_disk = {path.name for path in point.folder.iterdir()} - {"training.json"}
    assert (
        on_disk
        == set(manifest["files"])
        == {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"}
    )


# --- input that cannot be trained on -------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_update_and_row() -> None:
    model = full_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[int(TOKENS[2].input_ids[0])] = float("nan")  # type: ignore[operator]
    with pytest.raises(NonFinite, match=r"not finite in update 1 for .*the third row \(nan\)"):
        fine_tune(model, TOKENS, np.array([2, 2]), SETTINGS, seed=0, name_of=lambda row: ["", "", "the third row"][row])


def test_rows_that_cannot_be_trained_on_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no rows to train on"):
        fine_tune(lora_model(), TOKENS, np.array([], np.int64), SETTINGS, seed=0)
    silent = TokenizedExample(input_ids=np.array([1, 2], np.int32), supervised=np.array([True, False]), truncated=0)
    with pytest.raises(InvalidInput, match="row 0 has no supervised token"):
        fine_tune(lora_model(), [silent], np.array([0]), SETTINGS, seed=0)


def test_models_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"torch.bfloat16, in which small updates are lost"):
        fine_tune(tiny_model("llama", dtype=torch.bfloat16), TOKENS, ROWS, SETTINGS, seed=0)
    frozen = full_model()
    for param in frozen.parameters():
        param.requires_grad_(False)
    with pytest.raises(InvalidInput, match="nothing to train"):
        fine_tune(frozen, TOKENS, ROWS, SETTINGS, seed=0)


def test_lora_on_a_half_precision_base_trains() -> None:
    model = lora_model(dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in trainable(model).items()}
    fine_tune(model, TOKENS, ROWS, SETTINGS, seed=0)
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in trainable(model).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"update_rows": 0}, "update_rows must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        TrainSettings(**settings)


@given(
    count=st.integers(1, 20), update_rows=st.integers(1, 7), seed=st.integers(0, 3), steps=st.permutations(range(12))
)
def test_rows_of_an_update_are_those_of_the_epochs_permutation_drawn_anew(
    count: int, update_rows: int, seed: int, steps: list[int]
) -> None:
    """Asked for in any order, and of several seeds in between, so that whatever is kept is not another's."""
    settings, rows = TrainSettings(steps=1, update_rows=update_rows), 100 + np.arange(count)[::-1]
    per_epoch = -(-count // update_rows)
    for step in steps:
        for own in (seed, seed + 1, seed + 2):
            epoch, place = divmod(step, per_epoch)
            order = random_permutation(child_seed(own, "row order", epoch), count)
            wanted = rows[order][place * update_rows : (place + 1) * update_rows]
            assert rows_of_step(settings, step, rows, seed=own).tolist() == wanted.tolist()


def test_rows_of_an_update_can_be_changed_without_changing_the_next_callers() -> None:
    settings, rows = TrainSettings(steps=1, update_rows=8), np.arange(8)
    first = rows_of_step(settings, 0, rows, seed=5)
    before = first.tolist()
    first[:] = -1
    rows_of_step(settings, 0, np.arange(8) * 3, seed=5).sort()
    assert rows_of_step(settings, 0, rows, seed=5).tolist() == before != sorted(before)
    kept = loop._order_of_epoch(5, 0, 8)
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 0
