"""Files of rows: JSON Lines, JSON lists, Parquet and hub datasets, each row reachable by position.

Knows bytes and rows, not what a row means (that is ``formats.py``). JSON Lines and Parquet are never held in memory
whole: a scan leaves the place of each row, and reading one seeks there.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol
from uuid import UUID

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tamis.data.rows import IN_MEMORY, Rows
from tamis.errors import InvalidInput, first_line

__all__ = ["MAX_JSON_BYTES", "MAX_LINE_BYTES", "RowFile", "ScannedRow", "open_files", "to_json"]

# One row of 32 MiB is about eight million tokens, far beyond any context: such a line is a file that lost its line
# breaks, or no text at all. It is refused before more than this many bytes of it are in memory.
MAX_LINE_BYTES = 32 * 2**20

# A JSON list cannot be read piecewise, so it is held in memory as Python objects, about ten times its size on disk.
MAX_JSON_BYTES = 2**30

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
# Endings that say that a path was meant, also those of files that cannot be read.
_FILE_ENDINGS = (
    *_DATA_SUFFIXES,
    ".csv",
    ".tsv",
    ".txt",
    ".arrow",
    ".xlsx",
    ".yaml",
    ".yml",
    ".zip",
    ".gz",
    ".zst",
    ".xz",
)
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.:%+\[\]-]+))?")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
        with _open(self._path, self.name) as stream:
            start = len(_BYTE_ORDER_MARK) if stream.read(3) == _BYTE_ORDER_MARK else 0
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
        with _open(self._path, self.name) as stream:
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


class _ListedRows:
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


def to_json(value: Any) -> str:
    """One line of JSON that any reader accepts: NaN and infinities, which JSON lacks, become null.

    Raises:
        TypeError: it holds an object that has no text of its own, such as an image.
        ValueError, RecursionError: it holds itself.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_json)
    except ValueError:
        value = _without_nan(value)
        text = json.dumps(value, ensure_ascii=False, default=_as_json)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can say it, UTF-8 cannot
        return json.dumps(value, default=_as_json)
    return text


def _as_json(value: Any) -> Any:
    """What JSON can say of a value that is none of its own kinds: the same in every process, so no address in it."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, date | time | timedelta | Decimal | UUID | PurePath | bytes):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"JSON knows no {type(value).__name__}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def open_files(
    paths: Sequence[str], *, kind: str, held: Mapping[str, Rows] | None = None
) -> tuple[list[RowFile], list[int]]:
    """The files that ``paths`` name, in order, and for each the index of the path that named it.

    A path is a file, a glob (``**`` crosses folders; matches come sorted), a hub id ``org/name[:config][@split]``, or
    the name of rows in memory, which ``held`` has.

    Raises:
        InvalidInput: a path names nothing, a folder, a file named before, or a file of an unknown kind.
    """
    if not paths:
        raise InvalidInput(f"the {kind} names no file; give at least one path, glob or hub id")
    files: list[RowFile] = []
    named_by: list[int] = []
    seen: dict[Path, str] = {}
    for index, text in enumerate(paths):
        if text.endswith(IN_MEMORY):
            files.append(_held_rows(text, held or {}))
            named_by.append(index)
            continue
        for path in _matches(text, kind):
            if path is None:
                files.append(_open_hub(text, kind))
            else:
                real = path.resolve()
                if real in seen:
                    raise InvalidInput(
                        f"{kind} {text}: the file {path} was already named by {seen[real]}; name each file once"
                    )
                seen[real] = text
                files.append(_open_path(path, str(path) if glob.has_magic(text) and str(path) != text else text))
            named_by.append(index)
    return files, named_by


def _held_rows(name: str, held: Mapping[str, Rows]) -> RowFile:
    if name not in held:
        raise InvalidInput(
            f"{name} stands for rows that a Python program held in memory; call tamis.select with them again, "
            "or write them to a .jsonl file and name that"
        )
    return _ListedRows(held[name], name, name.removesuffix(IN_MEMORY).split()[-1])


def _matches(text: str, kind: str) -> list[Path | None]:
    """Local files that ``text`` names; a single None stands for a hub id."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise InvalidInput(f"{kind} {text} is a folder; name its files, for example '{text.rstrip('/')}/*.jsonl'")
    if path.exists():
        return [path]
    if _names_hub(text):
        return [None]
    if glob.has_magic(text):
        found: list[Path | None] = [
            Path(match)
            for match in sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob: no absolute patterns
            if Path(match).is_file()
        ]
        if not found:
            raise InvalidInput(
                f"{kind} {text} matches no file; check the pattern (quote it, so that the shell leaves it)"
            )
        return found
    raise InvalidInput(
        f"{kind} {text} does not exist; check the path (a hub dataset is written org/name[:config][@split])"
    )


def _names_hub(text: str) -> bool:
    """``org/name...`` that is no path: neither ends like a file of data nor starts with a folder that is here."""
    match = _HUB_ID.fullmatch(text)
    if match is None or match["name"].lower().endswith(_FILE_ENDINGS) or text.startswith((".", "~")):
        return False
    return not Path(text.split("/")[0]).is_dir()


def _open_path(path: Path, name: str) -> RowFile:
    suffix = path.suffix.lower()
    if suffix not in _DATA_SUFFIXES:
        raise InvalidInput(
            f"{name}: unknown kind of file '{suffix or 'no suffix'}'; expected one of {', '.join(_DATA_SUFFIXES)}"
        )
    with _open(path, name) as stream:
        head = stream.read(4096)
    if not head:
        raise InvalidInput(f"{name} is empty (0 bytes); write at least one row")
    if suffix == ".parquet":
        return ParquetFile(path, name)
    if suffix == ".json" and not head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return _ListedRows(_read_json_list(path, name), name, path.stem)
    return JsonLinesFile(path, name)


def _read_json_list(path: Path, name: str) -> list[Any]:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise InvalidInput(
            f"{name}: a JSON list of {size / 2**30:.1f} GiB cannot be read piecewise; write one row per line (.jsonl)"
        )
    data = path.read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{name}: not UTF-8 (byte 0x{data[error.start]:02x} at byte {error.start}); save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"{name}: not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}); "
            "a .json file must be one list of rows, or one row per line"
        ) from error
    except (RecursionError, ValueError) as error:
        raise InvalidInput(f"{name}: not valid JSON ({first_line(error)})") from error
    if not isinstance(value, list):
        raise InvalidInput(f"{name}: a .json file must be one list of rows, got {type(value).__name__}")
    return value


def _open_hub(text: str, kind: str) -> RowFile:
    match = _HUB_ID.fullmatch(text)
    assert match is not None
    wanted = match["split"] or "train"
    try:
        rows = datasets.load_dataset(match["name"], match["config"], split=wanted)
    except Exception as error:  # the hub client raises its own, requests', OSError and ValueError
        raise InvalidInput(
            f"{kind} {text}: no local file, and not loadable as the hub dataset '{match['name']}', "
            f"config {match['config'] or 'default'}, split '{wanted}' ({first_line(error)}); "
            "check the id, or write org/name:config@split"
        ) from error
    return _ListedRows(rows, text, match["name"].split("/")[1])


def _open(path: Path, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidInput(f"{name}: cannot be opened ({error.strerror or error})") from error


def _changed(name: str) -> InvalidInput:
    return InvalidInput(f"{name} changed while it was in use; leave the data alone during a run and start again")
