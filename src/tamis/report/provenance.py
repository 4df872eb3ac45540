"""A run's manifest as rows for reading: every setting as a person would type it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tamis.report.wording import number, one_line

__all__ = ["manifest_part", "plain", "provenance"]

_MAX_ROWS = 160


def provenance(
    manifest: Mapping[str, Any], *, without: Collection[str] = ()
) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """The manifest as (group, rows of key and value) but for the parts ``without``, the cost and the command.

    Those have places of their own on every page.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in manifest.items():
        if key in ("cost", "command", *without):
            continue
        nested = isinstance(value, Mapping | list | tuple)
        groups.setdefault(key if nested else "run", []).extend(_flat("" if nested else key, value))
    left, result = _MAX_ROWS, []
    for name, rows in groups.items():
        kept = rows[:left]
        if len(kept) < len(rows):
            kept.append(("…", f"{len(rows) - len(kept)} more in manifest.json"))
        left = max(0, left - len(rows))
        result.append((one_line(name, 60), tuple(kept)))
    return tuple(result)


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [row for key, part in value.items() for row in _flat(f"{prefix}.{key}" if prefix else str(key), part)]
    if isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        return [row for index, part in enumerate(value) for row in _flat(f"{prefix}[{index}]", part)]
    return [(one_line(prefix, 100), one_line(plain(value), 300))]


def plain(value: Any) -> str:
    """A setting as a person would type it; empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    if isinstance(value, float | np.floating):
        return number(float(value), 6)
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def manifest_part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What the manifest holds under ``key``; empty if it has no such part."""
    value = manifest.get(key)
    return value if isinstance(value, Mapping) else {}
