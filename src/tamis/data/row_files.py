"""Sources of rows, each row reachable by position: JSON Lines, Parquet, and rows that are Python objects already.

Knows bytes and rows, not what a row means (that is ``formats.py``). JSON Lines and Parquet are never held in memory
whole: a scan leaves the place of each row, and reading one seeks there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from tamis.data.json_text import to_json
from tamis.errors import InvalidInput, first_line

if TYPE_CHECKING:
    import datasets

__all__ = [
    "BYTE_ORDER_MARK",
    "MAX_LINE_BYTES",
    "JsonLinesFile",
    "ListedRows",
    "ParquetFile",
    "RowFile",
    "ScannedRow",
    "open_bytes",
]

# One row of 32 MiB is about eight million tokens, far beyond any context: such a line is a file that lost its line
# breaks, or no text at all. It is refused before more than this many bytes of it are in memory.
MAX_LINE_BYTES = 32 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ScannedRow:
    """One row met by a scan: where it is and its value, or why it has none."""

    row: int  # what the user is told: the 0-based line of a JSON Lines file, else the 0-based position
    start: int  # byte offset of the line (JSON Lines), else the position
    length: int  # bytes of the line (JSON Lines), else 0
    value: Any = None
    text: str = ""  # the value as one line of JSON, as the user wrote it where the file is JSON Lines
    problem: str | None = None


class RowFile(Protocol):
    """A source of rows, opened once and read many times."""

    name: str  # as the user named it
    stem: str  # its rows' source, unless they say otherwise

    def scan(self) -> Iterator[ScannedRow]:
        """Every row in order, one in memory at a time."""
        ...

    def read(self, start: int, length: int) -> Any:
        """The value of the row that a scan found at ``start``."""
        ...

    def raw_json(self, start: int, length: int) -> str:
        """The same row as one line of JSON, as the user wrote it where the file is JSON Lines."""
        ...


class JsonLinesFile:
    """One JSON object per line; blank lines are skipped but count as lines, so that an editor finds row ``n``."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.stem, self._path = name, path.stem, path

    def scan(self) -> Iterator[ScannedRow]:
        """Every non-blank line, with at most ``MAX_LINE_BYTES`` of the file in memory."""
        with open_bytes(self._path, self.name) as stream:
            start = len(BYTE_ORDER_MARK) if stream.read(3) == BYTE_ORDER_MARK else 0
            stream.seek(start)
            row = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    yield ScannedRow(row, start, 0, problem=_TOO_LONG)
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(2**20)
                elif not line.isspace():
                    yield _scanned_line(row, start, line)
                start, row = stream.tell(), row + 1

    def read(self, start: int, length: int) -> Any:
        """Parse the line at byte ``start``."""
        return json.loads(self.raw_json(start, length))

    def raw_json(self, start: int, length: int) -> str:
        """The line itself, without its line break."""
        with open_bytes(self._path, self.name) as stream:
            stream.seek(start)
            line = stream.read(length)
        try:
            return line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise _changed(self.name) from error


_TOO_LONG = (
    f"line is longer than {MAX_LINE_BYTES // 2**20} MiB; write one row per line "
    "(a file that is one JSON list belongs in a .json file)"
)


def _scanned_line(row: int, start: int, line: bytes) -> ScannedRow:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = (
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start} of the line); save the file as UTF-8"
        )
        return ScannedRow(row, start, len(line), problem=problem)
    try:
        return ScannedRow(row, start, len(line), value=json.loads(text), text=text.strip())
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at character {error.pos}); write one JSON object per line"
    except RecursionError:
        problem = "JSON is nested too deeply; flatten the row"
    except ValueError as error:  # an integer of more digits than Python converts
        problem = f"not valid JSON ({error}); write one JSON object per line"
    return ScannedRow(row, start, len(line), problem=problem)


def _scanned_value(position: int, value: Any) -> ScannedRow:
    try:
        return ScannedRow(position, position, 0, value=value, text=to_json(value))
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"cannot be written as JSON ({first_line(error)}); change the value or leave its field out"
        return ScannedRow(position, position, 0, problem=problem)


class ListedRows:
    """Rows that are Python objects already: a JSON list, a dataset (memory-mapped by ``datasets``), a caller's rows."""

    def __init__(self, rows: Sequence[Any] | datasets.Dataset, name: str, stem: str) -> None:
        self.name, self.stem, self._rows = name, stem, rows

    def scan(self) -> Iterator[ScannedRow]:
        """Every row in order."""
        for position, value in enumerate(self._rows):
            yield _scanned_value(position, value)

    def read(self, start: int, length: int) -> Any:
        """The row at position ``start``."""
        return self._rows[start]

    def raw_json(self, start: int, length: int) -> str:
        """The row as one line of JSON."""
        return to_json(self._rows[start])


class ParquetFile:
    """Rows of a Parquet file; the row group read last stays in memory, nothing else does."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.stem, self._path = name, path.stem, path
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise InvalidInput(f"{name}: not a readable Parquet file ({first_line(error)})") from error
        self._first_rows = [0]
        for group in range(metadata.num_row_groups):
            self._first_rows.append(self._first_rows[-1] + metadata.row_group(group).num_rows)
        self._held_group = -1
        self._held: pa.Table | None = None

    def scan(self) -> Iterator[ScannedRow]:
        """Every row in order, decoded a few hundred at a time."""
        position = 0
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=512):
                    for value in batch.to_pylist():
                        yield _scanned_value(position, value)
                        position += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{self.name}: cannot be read near row {position} ({first_line(error)})") from error

    def read(self, start: int, length: int) -> Any:
        """The row at position ``start``, through its row group."""
        group = next(g for g in range(len(self._first_rows) - 1) if start < self._first_rows[g + 1])
        if self._held is None or group != self._held_group:
            try:
                with pq.ParquetFile(self._path) as file:
                    self._held, self._held_group = file.read_row_group(group), group
            except (pa.ArrowException, OSError) as error:
                raise _changed(self.name) from error
        return self._held.slice(start - self._first_rows[group], 1).to_pylist()[0]

    def raw_json(self, start: int, length: int) -> str:
        """The row as one line of JSON; dates and the like become text, since JSON has none."""
        return to_json(self.read(start, length))


def open_bytes(path: Path, name: str) -> BinaryIO:
    """The file's bytes; ``name`` is what the user called it."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidInput(f"{name}: cannot be opened ({error.strerror or error})") from error


def _changed(name: str) -> InvalidInput:
    return InvalidInput(f"{name} changed while it was in use; leave the data alone during a run and start again")
