"""Only checkpoints that were written to the end count, and a log goes back to where its checkpoint stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tamis.errors import StoreCorrupted
from tamis.online.resume import append_log, cut_log, mark_whole, read_log, remove_after, whole_checkpoints


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1234")
    (folder / "inner" / "more.bin").write_bytes(b"12")
    return folder


def test_a_checkpoint_is_whole_with_its_mark_and_every_file_at_its_size(tmp_path: Path) -> None:
    for step in (2, 10, 4, 6, 8):
        mark_whole(checkpoint(tmp_path, step), step=step, seconds=step / 2)
    (tmp_path / "checkpoint-4" / "tamis_whole.json").unlink()
    (tmp_path / "checkpoint-6" / "inner" / "more.bin").write_bytes(b"1")
    (tmp_path / "checkpoint-8" / "model.safetensors").unlink()
    found = whole_checkpoints(tmp_path)
    assert [(c.step, c.seconds, c.folder.name) for c in found] == [(2, 1.0, "checkpoint-2"), (10, 5.0, "checkpoint-10")]
    assert whole_checkpoints(tmp_path / "absent") == []


def test_marking_again_vouches_for_the_files_that_are_there_now(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 2)
    mark_whole(folder, step=2, seconds=1.0)
    (folder / "model.safetensors").write_bytes(b"123456")
    assert whole_checkpoints(tmp_path) == []
    mark_whole(folder, step=2, seconds=3.0)
    assert [c.seconds for c in whole_checkpoints(tmp_path)] == [3.0]


def test_later_checkpoints_are_removed_whole_or_not(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-notes").mkdir()
    remove_after(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-notes"}


def test_a_log_loses_what_is_done_again_and_what_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    entries = [{"step": 0, "eval_loss": 2.0}, {"step": 3, "loss": 1.5}, {"step": 5, "loss": 1.0}]
    ends = [{"step": 5, "train_runtime": 3.0}, {"step": 5, "final_eval_loss": 0.9}]
    for entry in [*entries, *ends, {"step": 6, "loss": 0.5}]:
        append_log(path, entry)
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    assert read_log(path)[-1] == {"step": 6, "loss": 0.5}
    cut_log(path, 5)
    assert read_log(path) == entries
    cut_log(path, -1)
    assert path.read_text() == ""


@pytest.mark.parametrize("damage", ['{"step": 3, "lo', '["step"]', '{"loss": 1.5}', "\x00\x00"])
def test_a_log_that_is_damaged_before_its_end_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "log.jsonl"
    append_log(path, {"step": 0, "eval_loss": 2.0})
    with path.open("a") as file:
        file.write(f"{damage}\n")
    append_log(path, {"step": 5, "loss": 1.0})
    with pytest.raises(StoreCorrupted, match=r"line 2 of .*log\.jsonl is damaged; only a run from the start"):
        read_log(path)
