"""When two things count as the same: JSON in one spelling, its fingerprint, its first difference, files by content.

Whether work on disk may be reused is decided by these alone; names, places and dates of files never enter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tamis.errors import InvalidInput
from tamis.types import IntArray

__all__ = ["canonical_json", "file_sha256", "fingerprint", "first_difference", "rows_sha256", "text_sha256"]

_ABSENT = "(absent)"
_READ_BYTES = 1 << 22


def canonical_json(value: Any) -> str:
    """One spelling for one value: sorted keys, no spaces, ASCII, tuples as lists; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(spec: Mapping[str, Any]) -> str:
    """SHA-256 of ``spec`` in canonical JSON: equal for equal content whatever the order of its keys."""
    return text_sha256(canonical_json(dict(spec)))


def text_sha256(text: str) -> str:
    """SHA-256 of the text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def rows_sha256(rows: IntArray) -> str:
    """SHA-256 of row numbers as little-endian int64, whatever the machine's own integers are."""
    return hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, of which a few megabytes are in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def first_difference(stored: Any, wanted: Any) -> tuple[str, Any, Any] | None:
    """The first field, in sorted order, whose values differ: (dotted path, stored value, wanted value), or None.

    A field that one side lacks is reported with the text ``(absent)`` on that side.

    >>> first_difference({"model": {"dtype": "float32"}, "seed": 0}, {"model": {"dtype": "bfloat16"}, "seed": 0})
    ('model.dtype', 'float32', 'bfloat16')

    Raises:
        InvalidInput: one of them is not plain JSON.
    """
    return _difference(_plain(stored), _plain(wanted), "")


def _plain(value: Any) -> Any:
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"an identity must be plain JSON without NaN or infinity: {error}") from error


def _difference(stored: Any, wanted: Any, path: str) -> tuple[str, Any, Any] | None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            deeper = f"{path}.{key}" if path else key
            found = _difference(stored.get(key, _ABSENT), wanted.get(key, _ABSENT), deeper)
            if found is not None:
                return found
        return None
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        for index, (old, new) in enumerate(zip(stored, wanted, strict=True)):
            found = _difference(old, new, f"{path}.{index}" if path else str(index))
            if found is not None:
                return found
        return None
    # 1, 1.0 and true are equal in Python and different in canonical JSON.
    return None if canonical_json(stored) == canonical_json(wanted) else (path, stored, wanted)
