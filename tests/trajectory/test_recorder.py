"""A recorded run replays to itself, whatever trained it; what cannot be replayed is refused by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

import tamis
from chat_tokenizers import tiny_tokenizer
from online_runs import arguments, collate, rows_of
from tamis.errors import InvalidInput, InvalidSettings, StoreMismatch, TamisError, Unsupported
from tamis.model.loss import per_sample_losses
from tamis.online import FilterThenWeight, StepSettings
from tamis.trajectory.causal import RecordedRun
from tamis.trajectory.log import LogReader, LogWriter, mark_finished, read_manifest
from tamis.trajectory.open_run import open_run
from tamis.trajectory.optimizer_state import live_optimizer
from tamis.trajectory.replay import play_segment, segments
from tiny_models import tiny_model

TOLERANCE = 1e-5  # float32 sums in another order, six steps of Adam


def record(
    folder: Path, model: nn.Module, *, callbacks: tuple[Any, ...] = (), resume: bool = False, **changes: Any
) -> Any:
    trainer = Trainer(
        model=model,
        args=arguments(folder / "trainer", **changes),
        train_dataset=rows_of(22, seed=1),
        data_collator=collate,
        callbacks=[tamis.TrajectoryRecorder(folder / "record", every=4), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def model_of(**options: Any) -> nn.Module:
    return tiny_model("llama", dtype=torch.float32, **options).train()


def assert_replays(run: RecordedRun, tolerance: float = TOLERANCE) -> None:
    for start, stop in segments(run):
        played = play_segment(run, start, stop, tolerance=tolerance)
        moved = (run.state(stop).theta - run.state(start).theta).norm()
        assert (played[-1].after.theta - run.state(stop).theta).norm() < 50 * tolerance * moved


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"lora": True}, {}),
        ({}, {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}),
        ({"dropout": 0.2}, {"lr_scheduler_type": "cosine", "max_grad_norm": 0.0}),
        ({"lora": True}, {"optim": "sgd", "learning_rate": 0.1}),
        ({"lora": True}, {"bf16": True}),
    ],
    ids=["LoRA", "accumulation, two groups and clipping", "dropout", "SGD", "bfloat16 autocast"],
)
def test_a_recorded_run_replays_to_itself(tmp_path: Path, options: Any, changes: Any) -> None:
    trainer = record(tmp_path, model_of(**options), **changes)
    run = open_run(tmp_path / "record", trainer.model)
    assert run.boundaries == [0, 4, 6]
    assert run.tolerance == (1e-2 if "bf16" in changes else 1e-3)
    assert_replays(run, tolerance=run.tolerance if "bf16" in changes else TOLERANCE)
    end = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(run.state(6).theta, run.problem.layout.flatten(end), rtol=0, atol=0)


def test_steps_are_in_the_effective_batch_and_rows_are_those_of_the_data(tmp_path: Path) -> None:
    trainer = record(tmp_path, model_of(lora=True), gradient_accumulation_steps=2)
    run = open_run(tmp_path / "record", trainer.model)
    data = rows_of(22, seed=1)
    tokens = [sum(label != -100 for label in row["labels"][1:]) for row in data]
    positions = run.reader.positions()
    assert sorted(set(positions.tolist())) == sorted(positions.tolist())
    for index in range(2):
        step = run.step(index)
        counts = torch.tensor([float(tokens[positions[row]]) for row in step.rows], dtype=torch.float64)
        torch.testing.assert_close(step.weights, counts / counts.sum())  # tokens of both micro-batches count alike
        assert [len(micro) for micro in step.micros] == [4, 4]
    for number, row in enumerate(run.rows):
        assert row.ids.tolist() == data[int(positions[number])]["input_ids"][: len(row.ids)]


def test_a_run_of_chosen_and_weighted_data_replays_to_itself(tmp_path: Path) -> None:
    trainer = tamis.OnlineTrainer(
        model=model_of(lora=True),
        args=arguments(tmp_path / "trainer", max_steps=5, gradient_accumulation_steps=2),
        train_dataset=rows_of(40, seed=1),
        target_dataset=rows_of(6, seed=2),
        data_collator=collate,
        selection=FilterThenWeight(keep=3, oversample=2, cold_start=1),
        step_settings=StepSettings(reduction="tokens"),
        callbacks=[tamis.TrajectoryRecorder(tmp_path / "record", every=4)],
    )
    trainer.train()
    run = open_run(tmp_path / "record", trainer.model)
    assert_replays(run)
    assert all(1 < len(run.step(index).rows) <= 6 for index in range(5))  # two choices of three, some weighted 0
    assert float(run.step(4).weights.sum()) == pytest.approx(1.0)


def test_a_run_of_trl_replays_to_itself(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl, one of the dev dependencies, is not installed")
    tokenizer = tiny_tokenizer()
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "trainer"), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        gradient_accumulation_steps=2, learning_rate=1e-2, disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
        gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    rows = [{"prompt": f"What is {i} + 1? ", "completion": f"{i + 1} of " + "course " * (i % 3)} for i in range(12)]
    torch.manual_seed(0)
    model = tiny_model("llama", dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[tamis.TrajectoryRecorder(tmp_path / "record")],
    )  # fmt: skip
    trainer.train()
    # Adam turns the rounding noise of a coordinate without gradient into a step of full length: one differs here.
    assert_replays(open_run(tmp_path / "record", trainer.model), tolerance=1e-3)


def killed(work: Callable[[], Any]) -> None:
    """Run ``work`` in a process of its own, which kills itself by SIGKILL on the way."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)  # not reached where the test means something
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


class DieAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_record_without_an_update_is_refused(tmp_path: Path) -> None:
    model = model_of(lora=True)
    record(tmp_path, model, max_steps=-1, num_train_epochs=0)
    with pytest.raises(InvalidInput, match="made no update; record one that trains"):
        open_run(tmp_path / "record", model)


def test_a_killed_recording_resumes_with_its_trainer_to_the_same_bytes(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    record(tmp_path / "whole", model_of(lora=True, dropout=0.1), **saves)
    killed(lambda: record(tmp_path / "cut", model_of(lora=True, dropout=0.1), callbacks=(DieAt(5),), **saves))
    with pytest.raises(InvalidInput, match=r"its log ends at update 4 of 8; wait .*, or resume it"):
        open_run(tmp_path / "cut/record", model_of(lora=True, dropout=0.1))
    with pytest.raises(StoreMismatch, match="its autocast differs; resume with the same model, optim"):
        record(tmp_path / "cut", model_of(lora=True, dropout=0.1), resume=True, bf16=True, **saves)
    state = tmp_path / "cut/record/states/00000003.safetensors"
    own, tensors = state.read_bytes(), load_file(state)
    save_file({**tensors, "theta": tensors["theta"] + 1}, state)
    with pytest.raises(StoreMismatch, match="has other parameters at update 3 than training goes on from"):
        record(tmp_path / "cut", model_of(lora=True, dropout=0.1), resume=True, **saves)
    state.write_bytes(own)
    record(tmp_path / "cut", model_of(lora=True, dropout=0.1), resume=True, **saves)
    assert files(tmp_path / "cut/record") == files(tmp_path / "whole/record")


def test_another_model_is_refused(tmp_path: Path) -> None:
    record(tmp_path, model_of(lora=True))
    with pytest.raises(StoreMismatch, match="other frozen weights"):
        open_run(tmp_path / "record", model_of(lora=True, seed=1))
    with pytest.raises(StoreMismatch, match="recorded from another model: its config differs; give the model"):
        open_run(tmp_path / "record", model_of(lora=True, blocks=1))
    with pytest.raises(InvalidInput, match="holds a recorded run already"):
        record(tmp_path, model_of(lora=True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights", lambda w: w.flip(0), "recorded a loss of .* and replaying it gives"),
        ("norms", lambda n: n * 2, r"was given a gradient of norm .* off by 0\.5 of it \(0\.01 is allowed\)"),
        (
            "rates",
            lambda r: torch.cat([r[:-1], r[-1:] * 3]),
            "end .* away from them; something that is not in",
        ),
    ],
)
def test_a_log_that_does_not_replay_is_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    model = model_of(lora=True)
    record(tmp_path, model)
    path = tmp_path / "record/segments/00000000-00000004.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path)
    run = open_run(tmp_path / "record", model)
    with pytest.raises(StoreMismatch, match=message):
        play_segment(run, 0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adafactor"}, "Adafactor cannot be replayed; record a run of optim='adamw_torch'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be recorded"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size cannot be recorded: .* find the size first"),
    ],
)
def test_runs_that_cannot_be_replayed_are_refused_when_they_begin(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        record(tmp_path, model_of(lora=True), **changes)
    assert not (tmp_path / "record/manifest.json").exists()


def test_optimizers_that_make_another_step_are_refused_by_name() -> None:
    class Mine(torch.optim.AdamW):
        pass

    model = nn.Linear(2, 2)
    for optimizer, message in (
        (torch.optim.AdamW(model.parameters(), amsgrad=True), "AdamW with amsgrad=True cannot be replayed"),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), "SGD with nesterov=True"),
        (torch.optim.NAdam(model.parameters()), "NAdam cannot be replayed; record a run of"),
        (Mine(model.parameters()), "Mine cannot be replayed"),
        (torch.optim.AdamW([model.weight]), "'bias' is trainable but not in the optimizer"),
    ):
        with pytest.raises(Unsupported, match=message):
            live_optimizer(optimizer, model)
    half = nn.Linear(2, 2).bfloat16()
    with pytest.raises(Unsupported, match=r"trained in torch\.bfloat16, whose rounding no replay repeats"):
        live_optimizer(torch.optim.AdamW(half.parameters()), half)


def test_packed_rows_are_refused(tmp_path: Path) -> None:
    def packed(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])}

    trainer = Trainer(
        model=model_of(lora=True), args=arguments(tmp_path / "t"), train_dataset=rows_of(8, seed=1),
        data_collator=packed, callbacks=[tamis.TrajectoryRecorder(tmp_path / "b")],
    )  # fmt: skip
    with pytest.raises(Unsupported, match="batches hold 'position_ids'"):
        trainer.train()


SAVES = {
    "none": {},
    "steps": {"save_strategy": "steps", "save_steps": 3},
    "a share of the run": {"save_strategy": "steps", "save_steps": 0.1},
    "epochs": {"save_strategy": "epoch"},
    "epochs, accumulated": {"save_strategy": "epoch", "gradient_accumulation_steps": 4},
    "the best, all of them": {
        "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "loss",
        "greater_is_better": False,
    },
    "the best, by epochs, loaded": {
        "save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss", "greater_is_better": False,
        "load_best_model_at_end": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAVES)
def test_the_states_that_are_announced_are_those_on_disk(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses = iter(range(100, 0, -1))
    monkeypatch.setattr(Trainer, "evaluate", lambda *_, **__: {"eval_loss": next(losses)})  # better every time
    args = arguments(tmp_path / "t", **{"max_steps": 20, "num_train_epochs": 50, **SAVES[name]})
    data = rows_of(22, seed=1)
    trainer = Trainer(
        model=model_of(lora=True), args=args, train_dataset=data, eval_dataset=data, data_collator=collate,
        callbacks=[tamis.TrajectoryRecorder(tmp_path / "record", every=8)],
    )  # fmt: skip
    with caplog.at_level("INFO", logger="tamis"):
        trainer.train()
    count = len(list((tmp_path / "record/states").iterdir()))
    assert f"recording 20 updates into {tmp_path / 'record'}: {count} states of 4176 numbers" in caplog.text


def test_the_size_may_be_limited_and_what_is_advised_fits(tmp_path: Path) -> None:
    def limited(folder: str, every: int, most_states: float, **changes: Any) -> None:
        Trainer(
            model=model_of(lora=True), args=arguments(tmp_path / "t", **changes), train_dataset=rows_of(8, seed=1),
            data_collator=collate,
            callbacks=[
                tamis.TrajectoryRecorder(tmp_path / folder, every=every, most_gb=most_states * 4176 * 4 / 1e9)
            ],
        ).train()  # fmt: skip

    with pytest.raises(InvalidSettings, match=r"would take 0\.000117 GB and most_gb=.*fewer states, every=3 or more"):
        limited("a", 1, 4.5)
    limited("a", 3, 4.5)
    with pytest.raises(InvalidSettings, match=r"the 4 states at the start, at the end and .* save fewer checkpoints"):
        limited("b", 1, 3.5, save_strategy="steps", save_steps=2)


def test_the_problem_s_losses_are_those_of_the_engine(tmp_path: Path) -> None:
    trainer = record(tmp_path, model_of(lora=True))
    run = open_run(tmp_path / "record", trainer.model)
    micro = run.step(0).micros[0]
    params = {name: param for name, param in trainer.model.named_parameters() if param.requires_grad}
    found = run.problem.predict(params, micro).losses()
    torch.testing.assert_close(found, per_sample_losses(trainer.model, micro.batch), rtol=1e-5, atol=0)
    assert issubclass(StoreMismatch, TamisError) and isinstance(run.reader, LogReader)
    assert np.isfinite(found.detach().numpy()).all()


def test_a_run_that_owns_its_record_begins_it_anew_or_ends_it(tmp_path: Path) -> None:
    def unfinished(**options: Any) -> None:
        trainer = Trainer(
            model=model_of(lora=True), args=arguments(tmp_path / "t"), train_dataset=rows_of(22, seed=1),
            data_collator=collate, callbacks=[tamis.TrajectoryRecorder(tmp_path / "record", every=4, **options)],
        )  # fmt: skip
        trainer.train()

    unfinished(owner="this")
    whole = files(tmp_path / "record")
    for name in ("end.json", "positions.safetensors", "segments/00000004-00000006.safetensors"):
        (tmp_path / "record" / name).unlink()
    with pytest.raises(InvalidInput, match="holds a recorded run already"):
        unfinished()
    with pytest.raises(InvalidInput, match="holds a recorded run already"):
        unfinished(owner="another")
    unfinished(owner="this")
    assert files(tmp_path / "record") == whole
    (tmp_path / "record/end.json").unlink()
    reader = LogReader(tmp_path / "record")
    places = {row.digest(): int(place) for row, place in zip(reader.rows(), reader.positions(), strict=True)}
    mark_finished(tmp_path / "record", places)
    assert files(tmp_path / "record") == whole


class Lazy(torch.utils.data.Dataset[Any]):
    """Rows that are made when they are asked for, which fails for some of them once training is over."""

    def __init__(self, *broken: int, error: type[BaseException] = OSError) -> None:
        self.rows, self.broken, self.error = rows_of(22, seed=1), broken, error
        self.over, self.read = False, list[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        if self.over:
            self.read.append(position)
            if position in self.broken:
                raise self.error(f"no connection for row {position}")
        return self.rows[position]


def record_lazily(folder: Path, data: Lazy) -> nn.Module:
    class Over(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            data.over = state.global_step == 2

    model = model_of(lora=True)
    Trainer(
        model=model, args=arguments(folder / "trainer", max_steps=2), train_dataset=data, data_collator=collate,
        callbacks=[Over(), tamis.TrajectoryRecorder(folder / "record")],
    ).train()  # fmt: skip
    return model


def test_rows_that_cannot_be_read_when_training_is_over_take_nothing_from_the_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Lazy()
    record_lazily(tmp_path / "a", data)
    places = LogReader(tmp_path / "a/record").positions().tolist()
    assert len(places) == 8 and -1 not in places
    assert data.read == list(range(max(places) + 1)) and len(data.read) < 22  # no further than it must
    unused = next(position for position in range(max(places)) if position not in places)
    record_lazily(tmp_path / "b", Lazy(unused))
    assert LogReader(tmp_path / "b/record").positions().tolist() == places
    assert "recorded rows are not found" not in caplog.text
    record_lazily(tmp_path / "c", Lazy(*sorted([unused, places[3]])))
    assert LogReader(tmp_path / "c/record").positions().tolist() == [*places[:3], -1, *places[4:]]
    [said] = [one.getMessage() for one in caplog.records if "recorded rows are not found" in one.getMessage()]
    assert said.startswith("1 of 8 recorded rows") and "2 rows of it cannot be read one by one" in said
    assert f"the first is row {min(unused, places[3])}: no connection" in said


def test_a_run_killed_while_its_rows_are_looked_for_is_whole_without_their_positions(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        record_lazily(tmp_path / "a", Lazy(0, error=KeyboardInterrupt))
    model = record_lazily(tmp_path / "b", Lazy())
    own = files(tmp_path / "b/record")
    assert own == {**files(tmp_path / "a/record"), "positions.safetensors": own["positions.safetensors"]}
    target = [dict(row) for row in rows_of(3, seed=7)]
    common: dict[str, Any] = {"target": target, "model": model}
    cut, whole = (tamis.attribute(run=tmp_path / n / "record", out=tmp_path / n / "out", **common) for n in "ab")
    assert cut.samples["position"].null_count == 8
    assert cut.samples.drop(["position"]).equals(whole.samples.drop(["position"]))
    reader = LogReader(tmp_path / "b/record")
    places = {row.digest(): int(place) for row, place in zip(reader.rows(), reader.positions(), strict=True)}
    mark_finished(tmp_path / "a/record", places)
    assert files(tmp_path / "a/record") == own


def hooks_of(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("positional", [True, False])
def test_after_an_exception_the_model_is_the_user_s_again(tmp_path: Path, event: str, positional: bool) -> None:
    class Stop(Exception):
        pass

    class Failing(TrainerCallback):  # type: ignore[misc]
        pass

    def fail(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            raise Stop

    setattr(Failing, event, fail)
    model, recorder = model_of(lora=True), tamis.TrajectoryRecorder(tmp_path / "record")
    trainer = Trainer(
        model=model, args=arguments(tmp_path / "t", gradient_accumulation_steps=2), train_dataset=rows_of(22, seed=1),
        data_collator=collate, callbacks=[recorder, Failing()],
    )  # fmt: skip
    before = hooks_of(model)
    with pytest.raises(Stop):
        trainer.train()
    model.train()
    batch = collate([dict(row) for row in rows_of(4, seed=3)])
    for _ in range(10):
        loss = model(batch["input_ids"], labels=batch["labels"]).loss if positional else model(**batch).loss
        loss.backward()
    assert len(recorder._passes) <= 2  # no more than the update might have had
    assert hooks_of(model) == before


def test_a_trainer_that_sends_a_batch_twice_is_refused_before_its_first_update(tmp_path: Path) -> None:
    class Twice(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            model(**inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = model_of(lora=True)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Twice(
        model=model, args=arguments(tmp_path / "t"), train_dataset=rows_of(8, seed=1), data_collator=collate,
        callbacks=[tamis.TrajectoryRecorder(tmp_path / "record")],
    )  # fmt: skip
    with pytest.raises(Unsupported, match="sends more batches through the model in an update than gradient_accumul"):
        trainer.train()
    assert all(torch.equal(p, own) for p, own in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["states/model.safetensors", "segments/mine.safetensors", "manifest.json"])
def test_what_is_of_no_record_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    record(tmp_path / "other", model_of(lora=True))
    manifest = read_manifest(tmp_path / "other/record")
    state = LogReader(tmp_path / "other/record").state(0)
    folder = tmp_path / "new"
    folder.mkdir()
    for one in (name, "states/00000000.safetensors", "states/.DS_Store"):
        (folder / one).parent.mkdir(exist_ok=True)
        (folder / one).write_bytes(b"mine")
    with pytest.raises(InvalidInput, match=f"{name} is not of a recorded run that could be replaced; record into an"):
        LogWriter.open_new(folder, manifest, state)
    assert (folder / name).read_bytes() == (folder / "states/00000000.safetensors").read_bytes() == b"mine"
    (folder / name).unlink()
    LogWriter.open_new(folder, manifest, state)  # what a killed run left of its beginning is no obstacle
    assert torch.equal(LogReader(folder).state(0).theta, state.theta)


@pytest.mark.parametrize("name", ["pool.jsonl", "end.json"])
def test_a_folder_with_files_of_the_user_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / ".hidden").write_bytes(b"mine")
    (tmp_path / "record" / name).write_bytes(b"mine")
    with pytest.raises(
        InvalidInput, match=f"is not empty and holds no recorded run \\(but {name}\\); record into a new"
    ):
        record(tmp_path, model_of(lora=True))
    assert sorted(path.name for path in (tmp_path / "record").iterdir()) == [".hidden", name]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"folder": None}, "folder: expected the name of a folder for the record, got None"),
        ({"folder": "f", "every": 0}, "every: expected a number of updates, at least 1, got 0"),
        ({"folder": "f", "every": 2.5}, "every: expected a number of updates"),
        ({"folder": "f", "most_gb": "20"}, "most_gb: expected a number of gigabytes above zero, got '20'"),
        ({"folder": "f", "most_gb": -1}, "most_gb: expected a number of gigabytes above zero, got -1"),
    ],
)
def test_a_recorder_that_cannot_be_is_refused_when_it_is_made(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        tamis.TrajectoryRecorder(**values)


@pytest.mark.parametrize("removals", range(6))
def test_a_resumption_killed_while_it_takes_back_updates_can_be_repeated(
    tmp_path: Path, removals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, model_of(lora=True), max_steps=12)
    folder = tmp_path / "record"
    manifest, unlink, done = read_manifest(folder), Path.unlink, list[Path]()

    def dying(path: Path, **options: Any) -> None:
        if len(done) == removals:
            raise KeyboardInterrupt
        done.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            LogWriter.open_again(folder, manifest, 4)
    LogWriter.open_again(folder, manifest, 4)
    assert LogReader(folder).bounds == [0, 4]
    names = ["manifest.json", "segments/00000000-00000004.safetensors"]
    assert sorted(files(folder)) == [*names, "states/00000000.safetensors", "states/00000004.safetensors"]
