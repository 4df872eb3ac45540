import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_folders import NUM_ROWS, columns, finished_stage, open_writer
from tamis.errors import InvalidInput, StoreCorrupted
from tamis.store.reader import StageReader
from tamis.store.writer import StageWriter


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_stage(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def reader(stage: Path) -> StageReader:
    return StageReader(stage)


EXPECTED = columns(0, NUM_ROWS)


def expected(name: str) -> Any:
    return EXPECTED[name].float().numpy() if name == "half" else EXPECTED[name].numpy()


def test_whole_columns_come_back_with_their_element_types(reader: StageReader) -> None:
    assert reader.names == ("feature", "flag", "half", "loss", "tokens")
    for name, dtype in {"feature": np.float32, "half": np.float32, "loss": np.float64, "flag": np.bool_}.items():
        column = reader.read(name)
        assert column.dtype == dtype
        np.testing.assert_array_equal(column, expected(name))


@given(rows=st.integers(1, 300), start=st.integers(0, NUM_ROWS), stop=st.integers(0, NUM_ROWS + 9) | st.none())
@settings(max_examples=60)
def test_blocks_are_the_column_cut_into_equal_pieces(
    reader: StageReader, rows: int, start: int, stop: int | None
) -> None:
    blocks = list(reader.blocks("half", rows, start=start, stop=stop))
    wanted = expected("half")[start : NUM_ROWS if stop is None else stop]
    assert [first for first, _ in blocks] == list(range(start, start + len(wanted), rows))
    assert all(len(block) == rows for _, block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate([b for _, b in blocks] or [wanted[:0]]), wanted)


@given(st.lists(st.integers(0, NUM_ROWS - 1), max_size=40))
def test_numbers_of_rows_are_taken_in_the_order_asked_for(reader: StageReader, positions: list[int]) -> None:
    for name in ("feature", "half", "loss", "flag"):
        taken = reader.take(name, np.array(positions, dtype=np.int64))
        np.testing.assert_array_equal(taken, expected(name)[positions])
        assert taken.dtype == reader.read(name).dtype


@given(st.lists(st.integers(0, NUM_ROWS - 1), max_size=40))
def test_rows_are_taken_in_the_order_asked_for(reader: StageReader, positions: list[int]) -> None:
    for got, position in zip(reader.take_ragged("tokens", positions), positions, strict=True):
        np.testing.assert_array_equal(got, EXPECTED["tokens"][position])


def test_what_is_read_may_be_changed_without_changing_the_store(reader: StageReader) -> None:
    for read in (
        lambda: reader.read("feature"),
        lambda: next(reader.blocks("feature", 4))[1],
        lambda: reader.take("feature", [4]),
        lambda: reader.take_ragged("tokens", [4])[0],
    ):
        first = read()
        first += 1
        assert not np.array_equal(read(), first)


@pytest.mark.parametrize("position", [-1, NUM_ROWS])
def test_a_position_outside_is_refused(reader: StageReader, position: int) -> None:
    with pytest.raises(IndexError, match=f"position {position} lies outside the 230 rows"):
        reader.take_ragged("tokens", [0, position])


def test_boolean_masks_are_not_mistaken_for_positions(reader: StageReader) -> None:
    with pytest.raises(IndexError, match="must be a vector of integers"):
        reader.take_ragged("tokens", np.ones(NUM_ROWS, dtype=bool))


def test_an_unknown_column_is_named_with_those_that_exist(reader: StageReader) -> None:
    with pytest.raises(KeyError, match="no column 'gradient', only feature, flag, half, loss, tokens"):
        reader.read("gradient")


def test_ragged_and_even_columns_are_not_confused(reader: StageReader) -> None:
    with pytest.raises(ValueError, match="'tokens' is ragged; use take_ragged"):
        reader.read("tokens")
    with pytest.raises(ValueError, match="'loss' is not ragged; use read"):
        reader.take_ragged("loss", [0])


def test_an_unfinished_stage_is_refused(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    with pytest.raises(InvalidInput, match=r"holds no finished stage .* run the same command again"):
        StageReader(writer.path)


def test_a_flipped_byte_anywhere_never_becomes_a_value(tmp_path: Path) -> None:
    folder = finished_stage(tmp_path, num_rows=40)
    chance = random.Random(7)
    for file in sorted(folder.glob("shard-*")):
        good = file.read_bytes()
        for position in chance.sample(range(len(good)), 40):
            flipped = bytearray(good)
            flipped[position] ^= 1 << chance.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(StoreCorrupted, match=rf"{file.name} is not what was written .* run again"):
                StageReader(folder).read("flag")  # a column that the flip need not have touched
        file.write_bytes(good)
        assert len(StageReader(folder).read("flag")) == 40


def test_a_missing_shard_is_reported_as_damage(tmp_path: Path) -> None:
    folder = finished_stage(tmp_path)
    (folder / "shard-00004.safetensors").unlink()
    with pytest.raises((StoreCorrupted, InvalidInput), match=r"shard-00004\.safetensors"):
        StageReader(folder).read("loss")


def test_an_intact_shard_of_another_run_is_not_accepted(tmp_path: Path) -> None:
    writers = [StageWriter(tmp_path / str(i), "x", {}, num_rows=2, shard_rows=2) for i in range(2)]
    for value, writer in enumerate(writers):
        writer.write_shard(0, {"a": torch.full((2,), value)})
        writer.finish()
    shard = "shard-00000.safetensors"
    (writers[0].path / shard).write_bytes((writers[1].path / shard).read_bytes())
    with pytest.raises(StoreCorrupted):
        StageReader(writers[0].path).read("a")


def test_only_touched_shards_are_read(tmp_path: Path) -> None:
    folder = finished_stage(tmp_path)
    (folder / "shard-00009.safetensors").write_bytes(b"")
    assert len(StageReader(folder).take_ragged("tokens", [3])) == 1
    assert len(list(StageReader(folder).blocks("loss", 64, stop=128))) == 2


def test_streaming_a_stage_takes_the_memory_of_one_block(tmp_path: Path) -> None:
    import tracemalloc

    writer = StageWriter(tmp_path, "big", {}, num_rows=4096, shard_rows=256)
    for shard in writer.missing_shards():
        writer.write_shard(shard, {"x": torch.full((256, 2048), shard, dtype=torch.float32)})  # 32 MB in all
    writer.finish()
    reader = StageReader(writer.path)
    tracemalloc.start()
    total = sum(float(block[:, 0].sum()) for _, block in reader.blocks("x", 128))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 256 * sum(range(16))
    assert peak < 6 * 2**20  # two blocks of 1 MB and two buffers of 1 MB of the check, of 32 MB in all
