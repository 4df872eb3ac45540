"""From what a user names (files, globs, hub ids, rows in memory) to sources of rows."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from tamis.data.row_files import BYTE_ORDER_MARK, JsonLinesFile, ListedRows, ParquetFile, RowFile, open_bytes
from tamis.data.rows import IN_MEMORY, Rows
from tamis.errors import InvalidInput, first_line

__all__ = ["MAX_JSON_BYTES", "open_files"]

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


def open_files(paths: Sequence[str], *, held: Mapping[str, Rows] | None = None) -> tuple[list[RowFile], list[int]]:
    """The files that ``paths`` name, in order, and for each the index of the path that named it.

    A path is a file, a glob (``**`` crosses folders; matches come sorted), a hub id ``org/name[:config][@split]``, or
    the name of rows in memory, which ``held`` has.

    Raises:
        InvalidInput: a path names nothing, a folder, a file named before, or a file of an unknown kind.
    """
    if not paths:
        raise InvalidInput("no file is named; give at least one path, glob or hub id")
    files: list[RowFile] = []
    named_by: list[int] = []
    seen: dict[Path, str] = {}
    for index, text in enumerate(paths):
        if text.endswith(IN_MEMORY):
            files.append(_held_rows(text, held or {}))
            named_by.append(index)
            continue
        for path in _matches(text):
            if path is None:
                files.append(_open_hub(text))
            else:
                real = path.resolve()
                if real in seen:
                    raise InvalidInput(
                        f"{text}: the file {path} was already named by {seen[real]}; name each file once"
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
    return ListedRows(held[name], name, name.removesuffix(IN_MEMORY).split()[-1])


def _matches(text: str) -> list[Path | None]:
    """Local files that ``text`` names; a single None stands for a hub id."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise InvalidInput(f"{text} is a folder; name its files, for example '{text.rstrip('/')}/*.jsonl'")
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
            raise InvalidInput(f"{text} matches no file; check the pattern (quote it, so that the shell leaves it)")
        return found
    named = "; the name in NAME=PATH has no slash and no wildcard" if "=" in text else ""
    raise InvalidInput(
        f"{text} does not exist; check the path (a hub dataset is written org/name[:config][@split]){named}"
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
    with open_bytes(path, name) as stream:
        head = stream.read(4096)
    if not head:
        raise InvalidInput(f"{name} is empty (0 bytes); write at least one row")
    if suffix == ".parquet":
        return ParquetFile(path, name)
    if suffix == ".json" and not head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return ListedRows(_read_json_list(path, name), name, path.stem)
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


def _open_hub(text: str) -> RowFile:
    match = _HUB_ID.fullmatch(text)
    assert match is not None
    wanted = match["split"] or "train"
    try:
        rows = datasets.load_dataset(match["name"], match["config"], split=wanted)
    except Exception as error:  # the hub client raises its own, requests', OSError and ValueError
        raise InvalidInput(
            f"{text}: no local file, and not loadable as the hub dataset '{match['name']}', "
            f"config {match['config'] or 'default'}, split '{wanted}' ({first_line(error)}); "
            "check the id, or write org/name:config@split"
        ) from error
    return ListedRows(rows, text, match["name"].split("/")[1])
