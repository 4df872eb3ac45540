"""Rows that a Python program holds in memory: told from paths, checked, and named so that a run can speak of them.

They are read where they are, never copied, pickled or written to disk but for what is selected of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from tamis.errors import InvalidInput

__all__ = ["IN_MEMORY", "Rows", "are_rows", "checked_rows", "held_name"]

Rows: TypeAlias = Sequence[Mapping[str, Any]] | datasets.Dataset

IN_MEMORY = "(in memory)"  # how the name of such rows ends, where a path would stand


def held_name(what: str) -> str:
    """Under which name ``what`` ("pool", "target maths") goes where a path would stand."""
    return f"{what} {IN_MEMORY}"


def are_rows(given: Any) -> bool:
    """Whether ``given`` is meant as rows, good or bad, and not as a path or a list of paths."""
    if isinstance(given, str | Path):
        return False
    return not isinstance(given, Sequence) or any(not isinstance(item, str | Path) for item in given)


def checked_rows(given: Any, what: str) -> Rows:
    """``given`` as rows that can be read many times and in any order.

    Raises:
        InvalidInput: it is something else; says what to pass.
    """
    if isinstance(given, datasets.Dataset):
        plain: datasets.Dataset = given.with_format(None)  # rows as Python values, whatever the user trains on
        return plain
    if isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = ", ".join(map(str, given))
        raise InvalidInput(f"{what}: a dataset with splits ({splits}); pass one of them, as in {what}=data['train']")
    if isinstance(given, datasets.IterableDataset):
        raise InvalidInput(f"{what}: a streamed dataset cannot be read twice; load it without streaming")
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        raise InvalidInput(f"{what}: a data frame; pass its rows, for example {what}=frame.to_dict('records')")
    if not isinstance(given, Sequence):
        raise InvalidInput(f"{what}: expected paths, a list of rows or a datasets.Dataset, got {type(given).__name__}")
    for position, row in enumerate(given):
        if not isinstance(row, Mapping):
            raise InvalidInput(
                f"{what}: entry {position} is {type(row).__name__}, others are rows or paths; "
                "pass a list of rows (dicts) or a list of paths, not both"
            )
    return given
