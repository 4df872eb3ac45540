"""Frozen dataclasses of settings from plain values and back: unknown names, missing ones and wrong types are refused.

Knows no setting by name; what a value means is checked by the dataclass itself.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar

from tamis.errors import InvalidSettings

__all__ = ["check_plain", "check_types", "from_dict", "nearest", "to_dict"]

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], *, origin: str = "settings") -> T:
    """Settings of class ``cls`` from plain values, the inverse of ``to_dict``.

    Args:
        cls: a dataclass.
        values: field name -> value; fields left out keep their defaults.
        origin: where the values come from, named in errors (a file's path, for example).

    Raises:
        InvalidSettings: a key is unknown (the nearest known one is suggested), a required one is missing, or a value
            is refused by ``cls``.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    for key in values:
        if key not in known:
            hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
            raise InvalidSettings(f"{origin}: unknown setting {key!r}{hint}")
    for name, entry in known.items():
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and values.get(name) in (None, (), []):
            raise InvalidSettings(f"{name} is missing: pass --{name}, or set '{name}' in the --config file")
    return cls(**dict(values))


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain values (lists, dicts, scalars), in the order in which the fields are declared."""
    plain: dict[str, Any] = {}
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {key: list(v) if isinstance(v, tuple) else v for key, v in value.items()}
        plain[entry.name] = value
    return plain


def check_types(settings: Any) -> None:
    """Check every field against its annotation; lists become tuples, and mappings become plain dicts of their own.

    For the ``__post_init__`` of a frozen dataclass.

    Raises:
        InvalidSettings: a value is not what its annotation says.
    """
    hints = typing.get_type_hints(type(settings))
    for entry in fields(settings):
        value = _checked(entry.name, getattr(settings, entry.name), hints[entry.name])
        object.__setattr__(settings, entry.name, value)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it, or an error that names the setting."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _checked(name, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value not in arguments:
            listed = ", ".join(map(str, arguments))
            raise InvalidSettings(f"{name}={value!r}: expected one of {listed}{nearest(str(value), arguments)}")
        return value
    if origin is tuple:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise InvalidSettings(f"{name}={value!r}: expected a text or a list of texts")
        return tuple(items)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise InvalidSettings(f"{name}={value!r}: expected NAME=VALUE pairs (in YAML: a mapping)")
        item_hint = arguments[1]
        return {key: v if item_hint is Any else _checked(f"{name}.{key}", v, item_hint) for key, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InvalidSettings(f"{name}={value!r}: expected a finite number")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        expected = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[hint]
        raise InvalidSettings(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")
    return value


def check_plain(name: str, value: Any) -> None:
    """Method settings end up in YAML and JSON, so they are scalars or flat lists of scalars.

    Raises:
        InvalidSettings: ``value`` is something else; the message calls it ``name``.
    """
    if isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (list, tuple)):
                raise InvalidSettings(f"{name}={value!r}: expected a flat list")
            check_plain(name, item)
        return
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise InvalidSettings(f"{name}={value!r}: expected a text, a number, true, false, null or a list of these")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidSettings(f"{name}={value!r}: expected a finite number")


def nearest(word: str, choices: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the closest of ``choices``, or an empty text if none is close."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), {c.replace("-", "_"): c for c in choices}, n=1)
    if not close:
        return ""
    return next(f", did you mean {c!r}?" for c in choices if c.replace("-", "_") == close[0])
