"""The result table as NumPy columns, checked once, so that the rest of the report can assume they are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tamis.errors import InvalidInput
from tamis.types import IntArray

__all__ = ["Columns", "read_columns"]

BoolArray = npt.NDArray[np.bool_]
DoubleArray = npt.NDArray[np.float64]

_NEEDED = (
    *("id", "file", "row", "source", "tokens", "supervised_tokens", "truncated", "score", "rank", "selected", "weight"),
    *("loss", "duplicate_of", "near_duplicate_of", "flagged", "leaked", "picked_for"),
)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """One entry per pool row, N in all. Missing numbers are NaN (scores, losses) or -1 (indices, ranks)."""

    table: pa.Table  # for the few strings that are shown; never read as a whole
    source_names: tuple[str, ...]
    source: IntArray  # index into source_names
    tokens: IntArray
    supervised: IntArray
    truncated: IntArray  # tokens cut
    score: DoubleArray
    target_names: tuple[str, ...]
    target_scores: Mapping[str, DoubleArray]  # empty when there is one target
    rank: IntArray
    selected: BoolArray
    loss: DoubleArray
    duplicate_of: IntArray
    near_duplicate_of: IntArray
    flagged: BoolArray
    leaked: BoolArray
    picked_for: IntArray  # index into target_names

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.tokens)

    def chosen(self) -> IntArray:
        """Selected rows, best rank first; rows without a rank last, in pool order."""
        rows = np.flatnonzero(self.selected)
        rank = np.where(self.rank[rows] < 0, np.iinfo(np.int64).max, self.rank[rows])
        return rows[np.argsort(rank, kind="stable")]

    def first_copy(self) -> IntArray:
        """For each row the pool index that stands for all its exact copies."""
        return np.where(self.duplicate_of >= 0, self.duplicate_of, np.arange(self.num_rows))

    def score_for(self, target: str) -> DoubleArray:
        """The score for one target; the overall score when there is no column of its own."""
        return self.target_scores.get(target, self.score)

    def score_picked_by(self) -> DoubleArray:
        """Each row's score for the target that it was picked for; the overall one where it was picked for all."""
        found: DoubleArray = self.score.copy()
        for index, name in enumerate(self.target_names):
            picked = self.picked_for == index
            found[picked] = self.score_for(name)[picked]
        return found

    def cell(self, name: str, row: int) -> str:
        """One string of the table, empty for null."""
        value = self.table.column(name)[row].as_py()
        return "" if value is None else str(value)


def read_columns(table: pa.Table, target_names: Sequence[str]) -> Columns:
    """The columns of ``table`` as arrays.

    Raises:
        InvalidInput: a column is missing, ``picked_for`` names no known target, or a duplicate points outside the pool.
    """
    missing = [name for name in _NEEDED if name not in table.column_names]
    if missing:
        raise InvalidInput(
            f"the report's table lacks the column '{missing[0]}'; it has {', '.join(table.column_names)}"
        )
    source_names, source = _encoded(table.column("source"))
    picked_names, picked = _encoded(table.column("picked_for"))
    unknown = [name for code, name in enumerate(picked_names) if name not in target_names and (picked == code).any()]
    if unknown:
        raise InvalidInput(
            f"column 'picked_for' names the target '{unknown[0]}', but the targets are {list(target_names)}"
        )
    target_index = np.array([list(target_names).index(n) if n in target_names else -1 for n in picked_names] + [-1])
    columns = Columns(
        table=table,
        source_names=source_names,
        source=source,
        tokens=_ints(table, "tokens"),
        supervised=_ints(table, "supervised_tokens"),
        truncated=_ints(table, "truncated"),
        score=_floats(table, "score"),
        target_names=tuple(target_names),
        target_scores={
            name: _floats(table, f"score:{name}") for name in target_names if f"score:{name}" in table.column_names
        },
        rank=_ints(table, "rank", missing=-1),
        selected=_bools(table, "selected"),
        loss=_floats(table, "loss"),
        duplicate_of=_ints(table, "duplicate_of", missing=-1),
        near_duplicate_of=_ints(table, "near_duplicate_of", missing=-1),
        flagged=_bools(table, "flagged"),
        leaked=_bools(table, "leaked"),
        picked_for=target_index[picked].astype(np.int64),  # code -1 (null) takes the last entry, -1
    )
    for name in ("duplicate_of", "near_duplicate_of"):
        largest = int(getattr(columns, name).max(initial=-1))
        if largest >= columns.num_rows:
            raise InvalidInput(f"column '{name}' points at row {largest}, but the pool has {columns.num_rows} rows")
    return columns


def _encoded(column: pa.ChunkedArray) -> tuple[tuple[str, ...], IntArray]:
    encoded = _whole(column.cast(pa.string()).dictionary_encode())
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return tuple(encoded.dictionary.to_pylist()), np.asarray(codes, dtype=np.int64)


def _ints(table: pa.Table, name: str, missing: int = 0) -> IntArray:
    filled = pc.fill_null(_whole(table.column(name)).cast(pa.int64()), missing)
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype=np.int64)


def _floats(table: pa.Table, name: str) -> DoubleArray:
    values = _whole(table.column(name)).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=np.float64)  # null becomes NaN


def _bools(table: pa.Table, name: str) -> BoolArray:
    filled = pc.fill_null(_whole(table.column(name)).cast(pa.bool_()), False)
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype=np.bool_)


def _whole(column: Any) -> Any:
    """One array of a chunked column (``combine_chunks`` returns chunks again in some versions of pyarrow)."""
    combined = column.unify_dictionaries().combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.array([], type=combined.type)
    return combined
