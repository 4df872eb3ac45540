"""Every error a user can meet, one tree. The command line turns any of them into one line and exit code 2.

TamisError
├── InvalidInput        a file, a row or a value is not what it should be (says which, and what to do)
│   └── BadRow          one data row: carries file, row and field
├── InvalidSettings     settings that contradict each other or the data
├── StoreMismatch       the store on disk was made from something else (names the field that differs)
├── StoreCorrupted      bytes on disk are not the bytes that were written
├── NonFinite           a loss, gradient or score is NaN or infinite (names the row)
└── Unsupported         a model, layer, optimizer or file this version cannot handle (names it)
"""

from __future__ import annotations

__all__ = [
    "BadRow",
    "InvalidInput",
    "InvalidSettings",
    "NonFinite",
    "StoreCorrupted",
    "StoreMismatch",
    "TamisError",
    "Unsupported",
    "first_line",
]

_MOST_SHOWN = 300  # characters of another library's message


class TamisError(Exception):
    """Base of all errors raised on purpose."""


class InvalidInput(TamisError):
    """A file, a row or a value is not what it should be."""


class BadRow(InvalidInput):
    """One row of data cannot be used.

    The message reads ``<file>, row <row> (0-based)[, field '<field>']: <problem>``.
    """

    def __init__(self, problem: str, *, file: str, row: int, field: str | None = None) -> None:
        self.problem, self.file, self.row, self.field = problem, file, row, field
        where = f"{file}, row {row} (0-based)" + (f", field '{field}'" if field else "")
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_bad_row, (self.problem, self.file, self.row, self.field)


def _rebuild_bad_row(problem: str, file: str, row: int, field: str | None) -> BadRow:
    return BadRow(problem, file=file, row=row, field=field)


class InvalidSettings(TamisError):
    """Settings contradict each other or the data."""


class StoreMismatch(TamisError):
    """What lies on disk was made from another model, datum or setting."""


class StoreCorrupted(TamisError):
    """Bytes on disk are not the bytes that were written."""


class NonFinite(TamisError):
    """A loss, gradient or score is NaN or infinite; ``rows`` are the corpus positions concerned, where known."""

    def __init__(self, message: str, *, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class Unsupported(TamisError):
    """Something this version cannot handle, named."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for one line; the name of its class if it says nothing."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    text = next(filter(None, lines), type(error).__name__)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
