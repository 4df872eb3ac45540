"""JSON Lines, JSON, Parquet and hub datasets -> ``Examples`` with stable ids, far larger than memory if need be.

One pass reads and checks every row and keeps only compact arrays and the place of each row; rows are read again when
asked for. Rows are never merged or dropped here, except bad ones on request.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from tamis.data.files import open_files
from tamis.data.formats import Content, RowError, digest, parse_row, prompt_text, row_format_of, trained_text
from tamis.data.row_files import RowFile, ScannedRow
from tamis.data.rows import Rows
from tamis.errors import BadRow, InvalidInput
from tamis.identity import fingerprint
from tamis.types import Example, IntArray, RowFormat

__all__ = ["BadRowRecord", "Examples", "read_examples"]

_FORMATS: tuple[RowFormat, ...] = ("messages", "prompt-completion", "instruction", "text")


@dataclass(frozen=True)
class BadRowRecord:
    """A row that was left out because of ``on_bad_row="skip"``, and why."""

    file: str
    row: int  # 0-based line of a JSON Lines file, else 0-based position
    field: str | None
    problem: str


class Examples(Sequence[Example]):
    """The rows of one pool or target in reading order: random access without holding them in memory.

    What the first pass keeps for each of the ``N`` rows (about 0.3 KB a row):

    * ``ids``: the row's own id, else ``<file name>:<row>``; ids need not be unique, rows are known by index
    * ``file_index`` (int32) into ``files``, and ``row`` (int64): the 0-based line, or position, in that file
    * ``source_index`` (int32) into ``source_names``
    * ``digests``: SHA-256 (hex) of what is trained on
    * ``prompt_hashes`` (uint64): hash of the normalised prompt, 0 for a row without one
    * ``with_tools`` (int64): the rows that have tools, ascending

    ``duplicate_ids`` maps each id that occurs more than once to its rows. ``named_by[f]`` is the index of the path, as
    given to ``read_examples``, that named file ``f``.

    ``identity`` has a hash for each thing that a result can depend on, of all rows in order: ``content`` (what is
    trained on: all that tokens, losses and gradients depend on), ``files`` (names and row numbers), ``ids``,
    ``source``, and ``text`` (whole rows, as they are handed back). ``content_hash`` is one hash of them all.
    """

    def __init__(self, files: list[RowFile], named_by: list[int], scan: _Scan) -> None:
        self._files = files
        self.files: list[str] = [file.name for file in files]
        self.named_by: list[int] = named_by
        self.ids: list[str] = scan.ids
        self.digests: list[str] = scan.digests
        self.file_index: npt.NDArray[np.int32] = np.array(scan.file_index, dtype=np.int32)
        self.row: IntArray = np.array(scan.row, dtype=np.int64)
        self.source_names: list[str] = list(scan.sources)
        self.source_index: npt.NDArray[np.int32] = np.array(scan.source_index, dtype=np.int32)
        self.prompt_hashes: npt.NDArray[np.uint64] = np.array(scan.prompt_hash, dtype=np.uint64)
        self.with_tools: IntArray = np.array(scan.with_tools, dtype=np.int64)
        self.skipped: list[BadRowRecord] = scan.skipped
        self._start: IntArray = np.array(scan.start, dtype=np.int64)
        self._length: IntArray = np.array(scan.length, dtype=np.int64)
        self._format: npt.NDArray[np.int8] = np.array(scan.format, dtype=np.int8)
        self.duplicate_ids: dict[str, list[int]] = _repeated(self.ids)
        self._text_hash: npt.NDArray[np.uint64] = np.array(scan.text_hash, dtype=np.uint64)
        self.identity: dict[str, str] = {name: part.hexdigest() for name, part in scan.hashes.items()}
        self.content_hash: str = fingerprint(self.identity)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Read row ``index`` again.

        Raises:
            InvalidInput: the file is not what it was when it was first read.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        raw, content = self._read(index)
        return Example(
            index=index,
            id=self.ids[index],
            file=self.files[self.file_index[index]],
            row=int(self.row[index]),
            source=self.source_names[self.source_index[index]],
            format=content.format,
            messages=content.messages,
            prompt_messages=content.prompt_messages,
            prompt=content.prompt,
            completion=content.completion,
            text=content.text,
            tools=content.tools,
            template_kwargs=content.template_kwargs,
            digest=self.digests[index],
            raw=raw,
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def sources_of(self, rows: IntArray) -> list[str]:
        """The source of each of ``rows``."""
        return [self.source_names[index] for index in self.source_index[rows]]

    def raw_json(self, index: int) -> str:
        """The row as one line of JSON; of a JSON Lines file, the user's own line.

        Raises:
            InvalidInput: the file is not what it was when it was first read.
        """
        text = self._file(index).raw_json(int(self._start[index]), int(self._length[index]))
        if _hash64(text) != int(self._text_hash[index]):
            raise self._changed(index)
        return text

    def text(self, index: int) -> str:
        """The words of the row, prompt and answer, one turn per line."""
        return trained_text(self._read(index)[1])

    def prompt(self, index: int) -> str:
        """What the user asked, in lower case with single spaces; empty if the row has no prompt."""
        return prompt_text(self._read(index)[1])

    def _file(self, index: int) -> RowFile:
        return self._files[int(self.file_index[index])]

    def _read(self, index: int) -> tuple[Mapping[str, Any], Content]:
        file = self._file(index)
        try:
            raw = file.read(int(self._start[index]), int(self._length[index]))
            content = parse_row(raw, _FORMATS[self._format[index]])
            unchanged = digest(content) == self.digests[index]
        except (RowError, ValueError, AttributeError, IndexError):  # the bytes there are another row now, or none
            unchanged = False
        if not unchanged:
            raise self._changed(index)
        return raw, content

    def _changed(self, index: int) -> InvalidInput:
        return InvalidInput(
            f"{self._file(index).name} changed while it was in use (row {int(self.row[index])} is not what it was); "
            "leave the data alone during a run and start again"
        )


class _Scan:
    """What the first pass gathers, in growing arrays of machine numbers rather than lists of objects."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.digests: list[str] = []
        self.sources: dict[str, int] = {}
        self.file_index, self.source_index, self.format = array("i"), array("i"), array("b")
        self.row, self.start, self.length = array("q"), array("q"), array("q")
        self.prompt_hash, self.text_hash = array("Q"), array("Q")
        self.with_tools = array("q")
        self.hashes = {name: hashlib.sha256() for name in ("content", "files", "ids", "source", "text")}
        self.skipped: list[BadRowRecord] = []

    def add(
        self, scanned: ScannedRow, *, file: RowFile, file_index: int, id: str, source: str, content: Content
    ) -> None:
        trained = digest(content)  # first: it may refuse the row
        if content.tools:
            self.with_tools.append(len(self.ids))
        self.digests.append(trained)
        self.ids.append(id)
        self.file_index.append(file_index)
        self.source_index.append(self.sources.setdefault(source, len(self.sources)))
        self.format.append(_FORMATS.index(content.format))
        self.row.append(scanned.row)
        self.start.append(scanned.start)
        self.length.append(scanned.length)
        prompt = prompt_text(content)
        self.prompt_hash.append(_hash64(prompt) if prompt else 0)
        self.text_hash.append(_hash64(scanned.text))
        parts = {
            "content": trained,
            "files": f"{scanned.row} {file.name}",
            "ids": id,
            "source": source,
            "text": scanned.text,
        }
        for name, part in parts.items():
            # Length first: without it, two ids could be cut differently and still give the same bytes.
            encoded = part.encode("utf-8", errors="surrogatepass")  # a path may hold what is no character
            self.hashes[name].update(len(encoded).to_bytes(8, "little") + encoded)


def read_examples(
    paths: Sequence[str],
    *,
    row_format: RowFormat | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    held: Mapping[str, Rows] | None = None,
) -> Examples:
    """Check every row that ``paths`` name and return them as ``Examples``.

    A path is a JSON Lines, JSON (one list) or Parquet file, a glob, a hub id ``org/name[:config][@split]`` (split
    ``train`` if it names none), or a name in ``held``, which has rows in memory. The format is told from each file's
    first good row unless ``row_format`` says it; one file holds one format. With ``on_bad_row="skip"`` bad rows are
    left out and listed in ``.skipped``; a file that cannot be read at all is always an error.

    Raises:
        BadRow: a row cannot be used; names file, row and field.
        InvalidInput: a path names nothing readable, or nothing usable is left.
    """
    files, named_by = open_files(paths, held=held)
    labels = _labels([file.name for file in files])
    scan = _Scan()
    for file_index, file in enumerate(files):
        before, bad_before = len(scan.ids), len(scan.skipped)
        file_format = row_format
        for scanned in file.scan():
            try:
                file_format = _take(
                    scan, scanned, file_index, file, labels[file_index], file_format, is_named=row_format is not None
                )
            except RowError as problem:
                if on_bad_row == "fail":
                    raise BadRow(problem.problem, file=file.name, row=scanned.row, field=problem.field) from None
                scan.skipped.append(BadRowRecord(file.name, scanned.row, problem.field, problem.problem))
        if len(scan.ids) == before:
            raise InvalidInput(_nothing_in(file.name, scan.skipped[bad_before:]))
    return Examples(files, named_by, scan)


def _take(
    scan: _Scan,
    scanned: ScannedRow,
    file_index: int,
    file: RowFile,
    label: str,
    file_format: RowFormat | None,
    *,
    is_named: bool,
) -> RowFormat:
    """Check one row and add it; returns the file's format: the named one, or what its first good row decides."""
    if scanned.problem is not None:
        raise RowError(None, scanned.problem)
    row = scanned.value
    if not isinstance(row, Mapping):
        raise RowError(None, f"expected a JSON object, got {type(row).__name__}; write one object per row")
    found = row_format_of(row) if file_format is None else file_format
    try:
        content = parse_row(row, found)
    except RowError:
        _refuse_mixture(row, found, is_named=is_named)
        raise
    scan.add(
        scanned,
        file=file,
        file_index=file_index,
        id=_id(row, label, scanned.row),
        source=_source(row, file),
        content=content,
    )
    return found


def _refuse_mixture(row: Mapping[str, Any], expected: RowFormat, *, is_named: bool) -> None:
    """A better message for a row that is fine in itself, but of another format than the rows before it."""
    try:
        own = row_format_of(row)
    except RowError:
        return
    if own == expected:
        return
    if is_named:
        raise RowError(
            None,
            f"this row is in the {own} format but row_format says {expected}; remove the row, or leave row_format out "
            "if whole files are in other formats",
        )
    raise RowError(
        None,
        f"this row is in the {own} format but the file is read as {expected}, as its first row is; keep one format per "
        "file, or name by row_format one whose fields every row has",
    )


def _id(row: Mapping[str, Any], label: str, number: int) -> str:
    value = row.get("id")
    if value is None or value == "":
        return f"{label}:{number}"
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError("id", f"expected a string or a whole number, got {type(value).__name__}")
    return _encodable(str(value), "id")


def _source(row: Mapping[str, Any], file: RowFile) -> str:
    value = row.get("source")
    if value is None or value == "":
        return file.stem
    if not isinstance(value, str | int | float):  # numbers and truth values are names as good as any
        raise RowError("source", f"expected a string, got {type(value).__name__}; name where the row comes from")
    return _encodable(str(value), "source")


def _encodable(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(name, "holds half of a surrogate pair, which is no character; repair the text") from None
    return text


def _labels(names: list[str]) -> list[str]:
    """File names for default ids: the last part of the path, or all of it where two files share that part."""
    short = [PurePath(name).name for name in names]
    count = Counter(short)
    return [s if count[s] == 1 else name for s, name in zip(short, names, strict=True)]


def _nothing_in(name: str, bad: list[BadRowRecord]) -> str:
    if not bad:
        return f"{name} has no rows; write at least one"
    where = f", field '{bad[0].field}'" if bad[0].field else ""
    return f"{name}: all {len(bad)} rows are bad; the first is row {bad[0].row}{where}: {bad[0].problem}"


def _hash64(text: str) -> int:
    """64 bits of a text, never 0; equal hashes of prompts are looked at again before anyone is told of a leak."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little") or 1


def _repeated(ids: list[str]) -> dict[str, list[int]]:
    if len(set(ids)) == len(ids):
        return {}
    repeated: dict[str, list[int]] = {id: [] for id, count in Counter(ids).items() if count > 1}
    for index, id in enumerate(ids):
        if id in repeated:
            repeated[id].append(index)
    return repeated
