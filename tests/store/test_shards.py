from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from stage_folders import columns
from tamis.errors import StoreCorrupted, Unsupported
from tamis.store import manifest as manifest_module
from tamis.store import shards as shards_module
from tamis.store.shards import bfloat16_to_float32, encode_shard, read_header, verify_content


def write(path: Path, start: int = 0, stop: int = 6) -> Path:
    chunks, _ = encode_shard(columns(start, stop), fingerprint="f" * 64, start=start, stop=stop)
    path.write_bytes(b"".join(chunks))
    return path


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 3, 9)
    loaded, expected = load_file(path), columns(3, 9)
    for name in ("feature", "half", "loss", "flag"):
        assert loaded[name].dtype == expected[name].dtype
        assert torch.equal(loaded[name], expected[name])
    assert loaded["tokens"].tolist() == np.concatenate(expected["tokens"]).tolist()
    assert loaded["tokens:offsets"].tolist() == [0, 3, 7, 7, 8, 10, 13]
    with safe_open(path, framework="np") as opened:
        assert set(opened.metadata()) == {"tamis"}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    ],
)  # fmt: skip
def test_every_element_type_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    column = torch.tensor([[0, 1], [2, 3]]).to(dtype)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(encode_shard({"x": column}, fingerprint="", start=0, stop=2)[0]))
    assert torch.equal(load_file(path)["x"], column)
    verify_content(path, read_header(path))


def test_bytes_depend_on_the_content_alone() -> None:
    one = {"a": torch.ones(3), "b": torch.zeros(3, 2)}
    other = {"b": np.zeros((3, 2), dtype=np.float32), "a": np.ones(3, dtype=np.float32)}
    made = [b"".join(encode_shard(c, fingerprint="f", start=0, stop=3)[0]) for c in (one, other)]
    assert made[0] == made[1]


def test_non_contiguous_and_big_endian_input_is_stored_by_value(tmp_path: Path) -> None:
    strided = torch.arange(6.0).view(2, 3).T
    swapped = np.arange(3, dtype=">i4")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(encode_shard({"x": strided, "y": swapped}, fingerprint="", start=0, stop=3)[0]))
    assert torch.equal(load_file(path)["x"], strided) and load_file(path)["y"].tolist() == [0, 1, 2]


def test_rows_of_no_numbers_and_empty_ragged_rows_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    empty = {"x": torch.zeros(2, 0), "r": [np.zeros(0, dtype=np.int8), np.zeros(0, dtype=np.int8)]}
    path.write_bytes(b"".join(encode_shard(empty, fingerprint="", start=0, stop=2)[0]))
    header = read_header(path)
    verify_content(path, header)
    assert header.columns()["x"].row_shape == (0,) and header.columns()["r"].ragged


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (torch.zeros(3), "column 'x' has 3 rows, rows 0 to 2 were asked for"),
        (torch.zeros(2, dtype=torch.complex64), "has dtype complex64"),
        ([np.zeros(1), np.zeros(1, dtype=np.float32)], "must be vectors of one element type"),
        ([np.zeros((1, 1)), np.zeros((1, 1))], "must be vectors of one element type"),
        ([], "has no rows"),
    ],
)
def test_columns_that_cannot_be_stored_are_named(column: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        encode_shard({"x": column}, fingerprint="", start=0, stop=2)  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["__metadata__", "a:offsets", ""])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        encode_shard({name: torch.zeros(2)}, fingerprint="", start=0, stop=2)


def test_a_flipped_bit_in_any_byte_of_header_or_data_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 0, 3)
    good = path.read_bytes()
    data_begin = read_header(path).data_begin
    positions = [(byte, bit) for byte in range(8) for bit in range(8)]  # the header's length
    positions += [(byte, byte * 5 % 8) for byte in range(8, len(good))]
    assert len(good) > data_begin > 8
    for byte, bit in positions:
        flipped = bytearray(good)
        flipped[byte] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(StoreCorrupted, match=r"a\.safetensors is not what was written .* delete this file"):
            verify_content(path, read_header(path))


@given(cut=st.integers(0, 10**6), extra=st.binary(min_size=1, max_size=9))
@settings(max_examples=60)
def test_a_file_of_another_length_is_detected(tmp_path_factory: pytest.TempPathFactory, cut: int, extra: bytes) -> None:
    path = write(tmp_path_factory.mktemp("s") / "a.safetensors")
    good = path.read_bytes()
    for content in (good[: cut % len(good)], good + extra):
        path.write_bytes(content)
        with pytest.raises(StoreCorrupted):
            verify_content(path, read_header(path))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_corrupted_and_never_crash(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("s") / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(StoreCorrupted):
        read_header(path)


def test_a_safetensors_file_of_someone_else_is_not_ours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(StoreCorrupted):
        read_header(tmp_path / "a.safetensors")


def test_a_shard_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "FORMAT", 9)
        path = write(tmp_path / "a.safetensors")
    assert manifest_module.FORMAT == 1
    with pytest.raises(Unsupported, match="has store format 9, this version reads format 1"):
        read_header(path)


def test_bfloat16_widens_exactly_including_special_values() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -3e38, 1e-40, float("inf"), float("-inf"), float("nan")]).bfloat16()
    bits = values.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16_to_float32(bits), values.float().numpy())
