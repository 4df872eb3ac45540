"""One shard as a safetensors file that proves itself: encoding, header check, digest check.

The container is written here and not by the safetensors package because three things matter that the package leaves
open: bytes that depend on the content alone (its metadata has no fixed order), a digest computed while writing, and
errors of the disk that arrive as ``OSError``. Any safetensors reader can open the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tamis.disk import disk_errors
from tamis.errors import StoreCorrupted
from tamis.identity import canonical_json
from tamis.store.manifest import FORMAT, TensorRecord, refuse_other_format

if TYPE_CHECKING:  # whoever has a tensor has imported torch; whoever only reads need not wait for it
    from torch import Tensor

__all__ = [
    "NUMPY_DTYPES",
    "Column",
    "ShardHeader",
    "StoredTensor",
    "bfloat16_to_float32",
    "corrupted",
    "encode_shard",
    "offsets_name",
    "read_header",
    "verify_content",
]

Column: TypeAlias = "Tensor | npt.NDArray[Any] | Sequence[npt.NDArray[Any]]"

# Safetensors' names of element types and their little-endian layout. NumPy has no bfloat16: it is kept as its bits.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAME_OF_DTYPE = {dtype: name for name, dtype in NUMPY_DTYPES.items() if name != "BF16"}

_OWN_KEY = "tamis"
_READ_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies: element type, shape, and its first and last-but-one byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a shard file says of itself. ``sha256`` covers every other field and all tensor bytes."""

    fingerprint: str
    start: int
    stop: int
    ragged: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    sha256: str
    data_begin: int  # bytes before the first tensor
    about: dict[str, Any]  # the metadata as written, for the digest

    def columns(self) -> dict[str, TensorRecord]:
        """The columns as the user named them: a ragged one is stored as two tensors and listed once."""
        hidden = {offsets_name(name) for name in self.ragged}
        return {
            name: TensorRecord(dtype=t.dtype, row_shape=t.shape[1:], ragged=name in self.ragged)
            for name, t in sorted(self.tensors.items())
            if name not in hidden
        }


def offsets_name(name: str) -> str:
    """Under which name the (rows + 1,) int64 offsets of the ragged column ``name`` are stored."""
    return f"{name}:offsets"


def encode_shard(
    columns: Mapping[str, Column], *, fingerprint: str, start: int, stop: int
) -> tuple[list[bytes | memoryview], str]:
    """A shard as chunks of bytes to write one after the other, and its digest. Tensor bytes are not copied.

    Args:
        columns: per column a tensor or array of shape (rows, ...), or a list of ``rows`` one-dimensional arrays.
        fingerprint: of the stage's spec.
        start: the stage's row that the first row here is.
        stop: the row after the last.

    Raises:
        ValueError: a column has another number of rows, an element type that is not stored, or a reserved name.
    """
    arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {}
    ragged: list[str] = []
    for name, column in columns.items():
        if name == "__metadata__" or ":" in name or not name:
            raise ValueError(f"a column cannot be called {name!r}")
        if isinstance(column, np.ndarray) or not isinstance(column, Sequence):
            arrays[name] = _as_array(name, column)
        else:
            values, offsets = _flatten(name, column)
            arrays[name], arrays[offsets_name(name)] = _as_array(name, values), _as_array(name, offsets)
            ragged.append(name)
        rows = len(column)
        if rows != stop - start:
            raise ValueError(f"column {name!r} has {rows} rows, rows {start} to {stop} were asked for")
    # Wide elements first, as safetensors orders them: every tensor then starts at a multiple of its element size.
    order = sorted(arrays, key=lambda name: (-arrays[name][1].itemsize, name))
    tensors: dict[str, StoredTensor] = {}
    at = 0
    for name in order:
        dtype, array = arrays[name]
        tensors[name] = StoredTensor(dtype=dtype, shape=array.shape, begin=at, end=at + array.nbytes)
        at += array.nbytes
    about = {"format": FORMAT, "fingerprint": fingerprint, "start": start, "stop": stop, "ragged": sorted(ragged)}
    chunks = [arrays[name][1].reshape(-1).view(np.uint8).data for name in order]
    digest = _hash_of_header(about, tensors)
    for chunk in chunks:
        digest.update(chunk)
    sha256 = digest.hexdigest()
    return [_header_bytes({**about, "sha256": sha256}, tensors), *chunks], sha256


def read_header(path: Path) -> ShardHeader:
    """The header of a shard, after checking that it is spelled as it was written and that the file has its length.

    Raises:
        StoreCorrupted: it is not, or the file is missing.
        Unsupported: the shard is of another format version.
    """
    try:
        with disk_errors(path, doing="read"), path.open("rb") as file:
            length_bytes = file.read(8)
            size = path.stat().st_size
            length = struct.unpack("<Q", length_bytes)[0]
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("header longer than the file")
            header_bytes = file.read(length)
        header = json.loads(header_bytes)
        about = json.loads(header.pop("__metadata__")[_OWN_KEY])
        tensors: dict[str, StoredTensor] = {}
        at = 0
        for name, t in header.items():
            begin, at = at, at + NUMPY_DTYPES[t["dtype"]].itemsize * math.prod(t["shape"])
            tensors[name] = StoredTensor(dtype=t["dtype"], shape=tuple(t["shape"]), begin=begin, end=at)
        # Comparing bytes leaves no spelling of the same content through, not even another kind of white space, and
        # with the offsets computed again none but the right ones.
        if _header_bytes(about, tensors) != length_bytes + header_bytes:
            raise ValueError("header is spelled differently")
        if size != 8 + length + at:
            raise ValueError("file has another length")
        found = ShardHeader(
            fingerprint=about["fingerprint"],
            start=about["start"],
            stop=about["stop"],
            ragged=tuple(about["ragged"]),
            tensors=tensors,
            sha256=about["sha256"],
            data_begin=8 + length,
            about=about,
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, struct.error) as error:
        raise corrupted(path) from error
    if about.get("format") != FORMAT:
        verify_content(path, found)  # only an intact file is believed when it claims to be of another format
    refuse_other_format(about.get("format"), path)
    return found


def verify_content(path: Path, header: ShardHeader) -> None:
    """Read the whole file once, a megabyte at a time, and compare its digest with the header's.

    Raises:
        StoreCorrupted: they differ.
    """
    digest = _hash_of_header({k: v for k, v in header.about.items() if k != "sha256"}, header.tensors)
    for chunk in _content(path, header.data_begin):
        digest.update(chunk)
    if digest.hexdigest() != header.sha256:
        raise corrupted(path)


def corrupted(path: Path) -> StoreCorrupted:
    """The error for a shard that is not what was written."""
    return StoreCorrupted(
        f"{path} is not what was written (its checksum does not match); delete this file and run again to recompute it"
    )


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers that bfloat16 ``bits`` stand for, exactly."""
    widened: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened


def _content(path: Path, begin: int) -> Iterator[bytes]:
    with disk_errors(path, doing="read"), path.open("rb") as file:
        file.seek(begin)
        while chunk := file.read(_READ_BYTES):
            yield chunk


def _as_array(name: str, column: Tensor | npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any]]:
    if not isinstance(column, np.ndarray):
        import torch  # loaded already: the column is a tensor

        column = column.detach().cpu().contiguous()
        if column.dtype == torch.bfloat16:
            return "BF16", column.view(torch.int16).numpy().view(NUMPY_DTYPES["BF16"])
        column = column.numpy()
    little = column.dtype.newbyteorder("<")
    if little not in _NAME_OF_DTYPE or column.ndim == 0:
        known = ", ".join(NUMPY_DTYPES)
        raise ValueError(f"column {name!r} has dtype {column.dtype}, shape {column.shape}; stored are rows of {known}")
    return _NAME_OF_DTYPE[little], np.ascontiguousarray(column, dtype=little)


def _flatten(name: str, rows: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    if not rows:
        raise ValueError(f"ragged column {name!r} has no rows, so no element type")
    kinds = {(row.dtype, row.ndim) for row in rows}
    if len(kinds) != 1 or next(iter(kinds))[1] != 1:
        found = ", ".join(sorted(f"{dtype} with {ndim} axes" for dtype, ndim in kinds))
        raise ValueError(f"the rows of ragged column {name!r} must be vectors of one element type, got {found}")
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.concatenate(rows), offsets


def _hash_of_header(about: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> hashlib._Hash:
    shapes = [[name, t.dtype, list(t.shape)] for name, t in tensors.items()]
    return hashlib.sha256(canonical_json({**about, "tensors": shapes}).encode() + b"\n")


def _header_bytes(about: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {_OWN_KEY: canonical_json(about)}}
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.begin, t.end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as safetensors asks
    return struct.pack("<Q", len(text)) + text
