"""The map over rows: what is lost when memory runs out or the process dies, and that neither changes a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from score_task import file_bytes, make_task, save_tiny
from tamis import collect
from tamis.collect import Collecting, Task
from tamis.errors import StoreCorrupted, Unsupported
from tamis.score.decisions import kept_once, kept_tensors
from tamis.store.writer import StageWriter
from tamis.types import Batch

POOL = [("count", "one two three four five six seven eight nine ten"[: 4 + 2 * n]) for n in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


class DiedError(Exception):
    """Stands for a kill: nothing that the run does afterwards reaches the disk."""


class Memory:
    """A function of batches whose bits depend on the batch, and a memory in which some sizes do not fit."""

    def __init__(self, most_tokens: Callable[[int], int], *, dies_after: int | None = None) -> None:
        self.most_tokens, self.dies_after = most_tokens, dies_after
        self.sizes: list[int] = []  # padded tokens of every batch that fitted
        self.failed: list[int] = []

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        size = batch.input_ids.numel()
        if size > self.most_tokens(int(batch.rows.max())):
            self.failed.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(self.sizes) == self.dies_after:
            raise DiedError
        self.sizes.append(size)
        return {"value": batch.input_ids.sum(dim=1).float() + size}  # as if rounding depended on the whole batch


def task_in(folder: Path, model: Path, *, batch_tokens: int = 300) -> Task:
    return make_task(folder, model, pool=POOL, collecting=Collecting(batch_tokens=batch_tokens, shard_rows=4))


def mapped(task: Task, compute: Memory) -> np.ndarray[Any, Any]:
    rows = np.arange(len(task.pool))
    return task.map_rows(task.pool, rows, name="sums", spec={}, start=lambda: compute).read("value")


def late(row: int) -> int:
    """Memory gets short in the third shard."""
    return 10_000 if row < 8 else 60


@pytest.mark.parametrize("dies_after", [3, 4, 5, 7])
def test_a_resume_with_more_memory_cuts_the_batches_of_the_run_that_was_killed(
    tmp_path: Path, model: Path, dies_after: int
) -> None:
    alone = Memory(late)
    whole = mapped(task_in(tmp_path / "whole", model), alone)
    assert alone.failed and max(alone.sizes) > 60, "memory runs out, and not at the start"
    with pytest.raises(DiedError):
        mapped(task_in(tmp_path / "killed", model), Memory(late, dies_after=dies_after))
    resumed = Memory(lambda row: 10_000)
    assert np.array_equal(mapped(task_in(tmp_path / "killed", model), resumed), whole)
    assert resumed.sizes == alone.sizes[-len(resumed.sizes) :]
    stages = [next((tmp_path / name / "store").glob("sums-pool-*")) for name in ("whole", "killed")]
    assert file_bytes(stages[0]) == file_bytes(stages[1])


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_killed_between_a_shard_and_its_cost_knows_the_cost_of_all_rows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Else the stage would seem cheaper by a shard for each such kill, and so would the method that it is of."""
    whole = task_in(tmp_path / "whole", model)
    mapped(whole, Memory(late))
    for module, name in ((StageWriter, "write_shard"), (collect, "record_cost")):
        real, calls = getattr(module, name), []

        def then_dies(*args: Any, real: Any = real, calls: list[int] = calls, **more: Any) -> None:
            real(*args, **more)
            calls.append(1)
            if len(calls) == count:
                raise DiedError

        folder = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(DiedError):
            task = task_in(folder, model)
            patch.setattr(module, name, then_dies)
            mapped(task, Memory(late))
        task = task_in(folder, model)
        mapped(task, Memory(late))
        (cost,), (other,) = task.costs(), whole.costs()
        assert replace(cost, elapsed_s=0.0) == replace(other, elapsed_s=0.0), name


@pytest.mark.parametrize("damage", ["half", "gone"])
def test_a_lost_record_of_cost_is_warned_of(tmp_path: Path, model: Path, damage: str) -> None:
    mapped(task_in(tmp_path, model), Memory(late))
    (stage,) = (tmp_path / "store").glob("sums-pool-*")
    (file,) = stage.glob("cost-*.jsonl")
    lines = [line for line in file.read_text().splitlines() if line]
    file.write_text("\n".join([*lines[:2], lines[2][:9]]))
    if damage == "gone":
        file.unlink()
    task = task_in(tmp_path, model)
    mapped(task, Memory(late))
    task.costs()
    (said,) = task.warnings
    assert f"what {len(lines) - (2 if damage == 'half' else 0)} of its shards cost is not known" in said


def test_a_damaged_description_of_a_model_is_said_and_made_again(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_in(tmp_path, model)
    described = [task.loaded.description]
    (path,) = (tmp_path / "store").glob("model-*.json")
    path.write_text(path.read_text()[:40])
    assert task_in(tmp_path, model).model_descriptions() == described and f"{path} is damaged" in caplog.text
    assert task_in(tmp_path, model).model_descriptions() == described and caplog.text.count("is damaged") == 1


@pytest.mark.parametrize("content", ["", '{"a": [1,'])
def test_a_damaged_decision_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "size.json"
    assert kept_once(path, lambda: 7) == 7
    path.write_text(content)
    with pytest.raises(StoreCorrupted, match=r"size\.json cannot be read .*; delete this file and run again"):
        kept_once(path, lambda: 7)
    with pytest.raises(StoreCorrupted, match=r"size\.json cannot be read .*; delete this file and run again"):
        kept_tensors(path)


def test_a_size_that_failed_is_not_tried_again(tmp_path: Path, model: Path) -> None:
    memory = Memory(late)
    mapped(task_in(tmp_path, model), memory)
    assert len(set(memory.failed)) == len(memory.failed)
    assert memory.failed == sorted(memory.failed, reverse=True)


def test_progress_counts_every_row_once_though_a_shard_is_begun_again(tmp_path: Path, model: Path) -> None:
    task, told = task_in(tmp_path, model, batch_tokens=70), []
    task.progress = Told(told)
    memory = Memory(lambda row: 10_000 if row % 4 == 3 else 50)  # the first batch of a shard fits, the second does not
    mapped(task, memory)
    assert memory.failed and sum(told) == len(POOL) and min(told) >= 0


def test_a_row_that_does_not_fit_alone_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(Unsupported, match=r"pool.jsonl, row 3 \(0-based\): its \d+ tokens alone do not fit in memory"):
        mapped(task_in(tmp_path, model), Memory(lambda row: 5))


class Told:
    def __init__(self, told: list[int]) -> None:
        self._told = told

    def stage(self, name: str, total: int, unit: str) -> Told:
        return self

    def __enter__(self) -> Callable[[int], None]:
        return self._told.append

    def __exit__(self, *error: object) -> None:
        return None


def test_rows_of_a_pool_that_is_done_are_taken_from_it_and_charged_for(tmp_path: Path, model: Path) -> None:
    task, part = task_in(tmp_path, model), np.array([1, 4, 5, 11, 17, 18])

    def values(rows: np.ndarray[Any, Any], start: Callable[[], Any], **spec: Any) -> np.ndarray[Any, Any]:
        found = task.map_rows(
            task.pool, rows, name="sums", spec=spec, start=start, operations=lambda *sizes: 7.0 * sizes[1]
        )
        return found.read("value")

    def computed() -> Any:
        task.loaded  # noqa: B018  # as the functions of methods do
        return Memory(late)

    every = values(np.arange(len(task.pool)), computed)
    task.stages.clear()
    taken = values(part, lambda: pytest.fail("rows were computed again"))
    np.testing.assert_array_equal(taken, every[part])
    (cost,) = task.costs()
    assert (cost.rows, cost.tokens) == (len(part), task.pool.lengths[part].sum())
    assert cost.squared_tokens == (task.pool.lengths[part] ** 2).sum()
    assert cost.operations == pytest.approx(7.0 * cost.tokens, rel=1e-12) and cost.elapsed_s > 0
    with pytest.raises(AssertionError, match="asked for"):  # other numbers are another stage
        values(part, lambda: (_ for _ in ()).throw(AssertionError("asked for")), other=1)


def test_a_stage_over_all_rows_that_is_not_finished_lends_nothing(tmp_path: Path, model: Path) -> None:
    task, compute = task_in(tmp_path, model), Memory(late, dies_after=3)
    with pytest.raises(DiedError):
        mapped(task, compute)
    fresh = Memory(late)
    rows = np.arange(3)
    task.map_rows(task.pool, rows, name="sums", spec={}, start=lambda: fresh)
    assert fresh.sizes
