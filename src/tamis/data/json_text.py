"""Any row as one line of JSON: the text by which its content is known, alike in every process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np

__all__ = ["to_json"]


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
