import errno
import os
from pathlib import Path

import pytest
import torch

from stage_folders import NUM_ROWS, SPEC, columns, contents, finished_stage, open_writer, write_missing
from tamis.errors import InvalidInput, StoreCorrupted, StoreMismatch
from tamis.store.reader import StageReader
from tamis.store.writer import StageWriter


def test_interrupting_after_any_shard_and_resuming_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = contents(finished_stage(tmp_path / "whole", num_rows=70))
    for stop_after in range(5):
        root = tmp_path / f"stopped-{stop_after}"
        first = open_writer(root, num_rows=70)
        for shard in range(stop_after):
            first.write_shard(shard, columns(*first.shard_range(shard)))
        second = open_writer(root, num_rows=70)
        assert second.missing_shards() == list(range(stop_after, 5))
        write_missing(second)
        second.finish()
        assert contents(second.path) == whole


def test_failing_inside_any_write_loses_only_that_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(finished_stage(tmp_path / "whole", num_rows=70))
    real = os.fsync
    for failing_call in range(14):  # file and folder: of the plan, of five shards, of the manifest
        root, calls = tmp_path / f"failing-{failing_call}", iter(range(100))

        def fsync(descriptor: int, calls=calls, failing_call=failing_call) -> None:  # type: ignore[no-untyped-def]
            if next(calls) == failing_call:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(InvalidInput, match="free some space and run the same command again"):
            finished_stage(root, num_rows=70)
        monkeypatch.setattr(os, "fsync", real)
        again = open_writer(root, num_rows=70)
        assert len(again.missing_shards()) <= 5 - max(0, (failing_call - 2) // 2)
        write_missing(again)
        again.finish()
        assert contents(again.path) == whole


def test_a_resume_takes_shard_size_and_fixed_values_from_disk(tmp_path: Path) -> None:
    open_writer(tmp_path)
    again = StageWriter(tmp_path, "features", SPEC, num_rows=NUM_ROWS, shard_rows=99, fixed={"batch": 1234, "new": 1})
    assert again.fixed == {"batch": 7}
    assert again.num_shards == 15 and again.shard_range(14) == (224, 230)


def test_another_spec_goes_to_another_folder(tmp_path: Path) -> None:
    assert open_writer(tmp_path).path != open_writer(tmp_path, spec={**SPEC, "seed": 4}).path


def test_a_folder_of_another_spec_is_refused_naming_the_field(tmp_path: Path) -> None:
    other = open_writer(tmp_path, spec={**SPEC, "model": {"dtype": "bfloat16", "name": "none"}})
    expected = tmp_path / "moved" / open_writer(tmp_path).path.name
    expected.parent.mkdir()
    other.path.rename(expected)
    with pytest.raises(StoreMismatch, match=r'made with model\.dtype="bfloat16", now model\.dtype="float32" is asked'):
        open_writer(tmp_path / "moved")


@pytest.mark.parametrize(
    ("num_rows", "rows_digest", "sentence"),
    [(9, "a", "num_rows=8, now num_rows=9"), (8, "b", 'rows_digest="a", now rows_digest="b"')],
)
def test_the_same_spec_over_other_rows_is_refused(
    tmp_path: Path, num_rows: int, rows_digest: str, sentence: str
) -> None:
    StageWriter(tmp_path, "x", {}, num_rows=8, shard_rows=4, rows_digest="a")
    with pytest.raises(StoreMismatch, match=sentence):
        StageWriter(tmp_path, "x", {}, num_rows=num_rows, shard_rows=4, rows_digest=rows_digest)


def test_a_shard_of_another_stage_is_refused(tmp_path: Path) -> None:
    stranger = open_writer(tmp_path, spec={"other": 1})
    stranger.write_shard(0, columns(0, 16))
    writer = open_writer(tmp_path)
    (stranger.path / "shard-00000.safetensors").rename(writer.path / "shard-00000.safetensors")
    with pytest.raises(StoreMismatch, match="delete this file and run again"):
        writer.missing_shards()


def test_a_shard_under_another_number_is_refused(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write_shard(0, columns(0, 16))
    (writer.path / "shard-00000.safetensors").rename(writer.path / "shard-00001.safetensors")
    with pytest.raises(StoreMismatch, match="holds rows 0 to 16"):
        writer.missing_shards()


def test_finishing_with_missing_shards_is_refused_and_leaves_no_manifest(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write_shard(1, columns(16, 32))
    with pytest.raises(ValueError, match="lacks 14 of 15 shards, the first is 0"):
        writer.finish()
    assert not (writer.path / "manifest.json").exists()


def test_shards_that_disagree_on_their_columns_cannot_become_a_stage(tmp_path: Path) -> None:
    writer = StageWriter(tmp_path, "x", {}, num_rows=4, shard_rows=2)
    writer.write_shard(0, {"a": torch.zeros(2, 3)})
    writer.write_shard(1, {"a": torch.zeros(2, 4)})
    with pytest.raises(StoreMismatch, match=r'holds \{"a":\["F32",\[4\],false\]\}'):
        writer.finish()


def test_shards_may_be_written_in_any_order(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a")
    for shard in reversed(writer.missing_shards()):
        writer.write_shard(shard, columns(*writer.shard_range(shard)))
    writer.finish()
    assert contents(writer.path) == contents(finished_stage(tmp_path / "b"))


def test_left_over_files_of_killed_runs_are_ignored_and_removed_but_nothing_else(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    leftovers = [".shard-00003.safetensors.0-99999.tmp", ".plan.json.1-12.tmp", ".manifest.json.0-1.tmp"]
    for name in leftovers:
        (writer.path / name).write_bytes(b"half a fi")
    (writer.path / "cost-0.jsonl").write_text("{}\n")
    assert len(writer.missing_shards()) == 15
    write_missing(writer)
    assert not (writer.path / leftovers[0]).exists()
    writer.finish()
    names = {path.name for path in writer.path.iterdir()}
    assert not names & set(leftovers) and "cost-0.jsonl" in names


def test_a_deleted_shard_is_written_again_and_the_manifest_stays(tmp_path: Path) -> None:
    folder = finished_stage(tmp_path)
    whole = contents(folder)
    (folder / "shard-00002.safetensors").unlink()
    writer = open_writer(tmp_path)
    assert writer.missing_shards() == [2]
    write_missing(writer)
    writer.finish()
    assert contents(folder) == whole


def test_a_shard_that_comes_back_different_gets_a_new_manifest(tmp_path: Path) -> None:
    writer = StageWriter(tmp_path, "x", {}, num_rows=2, shard_rows=2)
    for value in (1.0, 2.0):
        writer.write_shard(0, {"a": torch.full((2,), value)})
        writer.finish()
        assert StageReader(writer.path).read("a").tolist() == [value, value]


def test_a_damaged_header_stops_a_resume(tmp_path: Path) -> None:
    folder = finished_stage(tmp_path)
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[30] ^= 4
    path.write_bytes(content)
    with pytest.raises(StoreCorrupted, match=r"shard-00001\.safetensors is not what was written"):
        open_writer(tmp_path).missing_shards()


def test_a_stage_of_no_rows_is_complete_at_once(tmp_path: Path) -> None:
    writer = StageWriter(tmp_path, "x", {}, num_rows=0, shard_rows=4)
    assert writer.missing_shards() == []
    writer.finish()
    reader = StageReader(writer.path)
    assert reader.num_rows == 0 and reader.names == ()


@pytest.mark.parametrize("shard", [-1, 15])
def test_a_shard_that_does_not_exist_is_refused(tmp_path: Path, shard: int) -> None:
    with pytest.raises(ValueError, match="there are 15"):
        open_writer(tmp_path).write_shard(shard, {})


def test_a_read_only_store_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as a user whom no permission stops
    with pytest.raises(InvalidInput, match=r"cannot create folder .*: Permission denied; make the folder writable"):
        open_writer(tmp_path / "store")


def test_a_file_in_place_of_the_store_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(InvalidInput, match="a file is in the way of a folder"):
        open_writer(tmp_path / "store")
