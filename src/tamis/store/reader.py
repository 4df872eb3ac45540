"""Reading a finished stage: whole columns, blocks in row order, or single rows. Every shard is verified before use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tamis.errors import InvalidInput
from tamis.store.manifest import StageManifest, TensorRecord, read_manifest
from tamis.store.shards import (
    NUMPY_DTYPES,
    ShardHeader,
    bfloat16_to_float32,
    corrupted,
    offsets_name,
    read_header,
    verify_content,
)

__all__ = ["StageReader"]

# Maps kept open for random access. A map costs address space and page cache, not memory of ours.
_OPEN_MAPS = 64


class StageReader:
    """A finished stage, memory-mapped. All arrays that come out are copies in memory, safe to change.

    The first touch of a shard reads it once in full to check its digest. bfloat16 columns arrive as float32, which
    holds them exactly; all others keep their element type.

    Raises:
        InvalidInput: the folder holds no finished stage.
        StoreCorrupted: the manifest is not what was written.
        Unsupported: it is of a format version that this version cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise InvalidInput(
                f"{self.path} holds no finished stage (manifest.json is missing); run the same command again"
            )
        self.manifest: StageManifest = manifest
        self._starts = np.array([record.start for record in manifest.shards], dtype=np.int64)
        self._verified: dict[int, ShardHeader] = {}
        self._maps: OrderedDict[int, npt.NDArray[np.uint8]] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, sorted."""
        return tuple(sorted(self.manifest.tensors))

    @property
    def num_rows(self) -> int:
        """Rows of every column."""
        return self.manifest.plan.num_rows

    @property
    def fingerprint(self) -> str:
        """Identity of the spec that the stage was made from."""
        return self.manifest.plan.fingerprint

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that determined the numbers."""
        return self.manifest.plan.spec

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of a column; empty for numbers and for ragged columns."""
        return self._column(name).row_shape

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole column, (num_rows, ...), in memory.

        Raises:
            ValueError: the column is ragged.
            KeyError: there is no such column.
            StoreCorrupted: a shard is not what was written.
        """
        self._require(name, ragged=False)
        whole = np.empty((self.num_rows, *self.row_shape(name)), dtype=self._dtype(name))
        for shard, record in enumerate(self.manifest.shards):
            whole[record.start : record.stop] = self._array(self._map(shard, keep=False), shard, name)
        return whole

    def blocks(
        self, name: str, rows: int = 4096, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """A column in row order, ``rows`` at a time whatever the shards are: pairs (first row, block).

        Memory is bounded by one block. ``start`` and ``stop`` limit the rows.

        Raises:
            ValueError: the column is ragged, or ``rows`` is not positive.
            KeyError: there is no such column.
            StoreCorrupted: a shard is not what was written.
        """
        self._require(name, ragged=False)
        if rows < 1:
            raise ValueError(f"a block must have at least one row, got rows={rows}")
        end = self.num_rows if stop is None else min(stop, self.num_rows)
        for first in range(start, end, rows):
            yield first, self._rows(name, first, min(first + rows, end))

    def take(self, name: str, positions: npt.ArrayLike) -> npt.NDArray[Any]:
        """Rows of a column at any positions, in the order asked for.

        Raises:
            ValueError: the column is ragged.
            IndexError: a position lies outside the stage.
            KeyError: there is no such column.
            StoreCorrupted: a shard is not what was written.
        """
        self._require(name, ragged=False)
        wanted = self._positions(positions)
        taken = np.empty((len(wanted), *self.row_shape(name)), dtype=self._dtype(name))
        for shard, where in self._by_shard(wanted):
            taken[where] = self._array(self._map(shard, keep=False), shard, name, wanted[where] - self._starts[shard])
        return taken

    def take_ragged(self, name: str, positions: npt.ArrayLike) -> list[npt.NDArray[Any]]:
        """Rows of a ragged column at any positions, in the order asked for, each of its own length.

        Raises:
            ValueError: the column is not ragged.
            IndexError: a position lies outside the stage.
            KeyError: there is no such column.
            StoreCorrupted: a shard is not what was written.
        """
        self._require(name, ragged=True)
        wanted = self._positions(positions)
        taken: list[npt.NDArray[Any]] = [np.zeros(0, dtype=self._dtype(name))] * len(wanted)
        for shard, where in self._by_shard(wanted):
            mapped = self._map(shard, keep=True)
            offsets = self._array(mapped, shard, offsets_name(name))
            for position in where:
                row = wanted[position] - self._starts[shard]
                inside = slice(int(offsets[row]), int(offsets[row + 1]))
                taken[position] = np.array(self._array(mapped, shard, name, inside))
        return taken

    def _column(self, name: str) -> TensorRecord:
        if name not in self.manifest.tensors:
            raise KeyError(f"{self.path} has no column {name!r}, only {', '.join(self.names) or 'none'}")
        return self.manifest.tensors[name]

    def _require(self, name: str, *, ragged: bool) -> None:
        if self._column(name).ragged != ragged:
            use = "read or blocks" if ragged else "take_ragged"
            raise ValueError(f"column {name!r} is {'not ' if ragged else ''}ragged; use {use}")

    def _dtype(self, name: str) -> np.dtype[Any]:
        stored = self._column(name).dtype
        return np.dtype(np.float32) if stored == "BF16" else NUMPY_DTYPES[stored]

    def _positions(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        wanted = np.asarray(positions)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise IndexError(f"positions must be a vector of integers, got shape {wanted.shape}, dtype {wanted.dtype}")
        outside = wanted[(wanted < 0) | (wanted >= self.num_rows)]
        if outside.size:
            raise IndexError(f"position {outside[0]} lies outside the {self.num_rows} rows of {self.path}")
        return wanted.astype(np.int64)

    def _by_shard(self, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """For every shard that is needed, ascending: which entries of ``wanted`` lie in it."""
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        order = np.argsort(shard_of, kind="stable").astype(np.int64)
        shards, firsts = np.unique(shard_of[order], return_index=True)
        for shard, where in zip(shards, np.split(order, firsts[1:]), strict=True) if len(wanted) else ():
            yield int(shard), where

    def _rows(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        block = np.empty((last - first, *self.row_shape(name)), dtype=self._dtype(name))
        shard = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < last and shard < len(self._starts) and self._starts[shard] < last:
            record = self.manifest.shards[shard]
            low, high = max(first, record.start), min(last, record.stop)
            # Maps of shards that are passed are dropped, so that streaming never holds more than one.
            mapped = self._map(shard, keep=False)
            inside = slice(low - record.start, high - record.start)
            block[low - first : high - first] = self._array(mapped, shard, name, inside)
            shard += 1
        return block

    def _header(self, shard: int) -> ShardHeader:
        if shard not in self._verified:
            record = self.manifest.shards[shard]
            path = self.path / record.file
            header = read_header(path)
            if (header.start, header.stop, header.sha256) != (record.start, record.stop, record.sha256):
                raise corrupted(path)
            verify_content(path, header)
            self._verified[shard] = header
        return self._verified[shard]

    def _map(self, shard: int, *, keep: bool) -> npt.NDArray[np.uint8]:
        """The bytes of the shard's tensors, verified."""
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        header = self._header(shard)
        size = max((t.end for t in header.tensors.values()), default=0)
        path = self.path / self.manifest.shards[shard].file
        if size == 0:
            return np.zeros(0, dtype=np.uint8)
        try:
            mapped: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r", offset=header.data_begin, shape=(size,))
        except (OSError, ValueError) as error:
            raise corrupted(path) from error  # it was whole a moment ago
        if keep:
            self._maps[shard] = mapped
            if len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
        return mapped

    def _array(
        self,
        mapped: npt.NDArray[np.uint8],
        shard: int,
        name: str,
        rows: slice | npt.NDArray[np.int64] = slice(None),
    ) -> npt.NDArray[Any]:
        """Rows of one stored tensor of a shard; a view into the map where the element type allows it."""
        stored = self._verified[shard].tensors[name]
        raw = np.asarray(mapped[stored.begin : stored.end]).view(NUMPY_DTYPES[stored.dtype]).reshape(stored.shape)[rows]
        return bfloat16_to_float32(raw) if stored.dtype == "BF16" else raw
