"""Frozen dataclasses of settings from plain values and back: unknown names, missing ones and wrong types are refused.

Knows no setting by name; what a value means is checked by the dataclass itself.
"""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, TypeVar

import numpy as np

from tamis.errors import InvalidSettings

__all__ = [
    "changed_values",
    "check_plain",
    "check_types",
    "from_dict",
    "method_from_dict",
    "nearest",
    "required_names",
    "to_dict",
]

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
    known = {entry.name: entry for entry in _in_order(cls)}
    for key in values:
        if key not in known:
            hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
            raise InvalidSettings(f"{origin}: unknown setting {key!r}{hint}")
    for name, entry in known.items():
        if _is_required(entry) and values.get(name) in (None, (), []):
            raise InvalidSettings(
                f"{name} is missing or empty: pass --{name} (in Python {name}=), or set '{name}' in the --config file"
            )
    return cls(**dict(values))


def method_from_dict(kind: type[T], values: Mapping[str, Any], *, origin: str) -> T:
    """A method of class ``kind`` from what its user set, checked against the annotations of its fields.

    Methods therefore check ranges and contradictions only. A list, or a single value where several may stand, becomes a
    tuple; nothing else is converted, because stages are identified by the values as they were written.

    Raises:
        InvalidSettings: ``kind`` has no such setting, it takes another type or word, or ``kind`` refuses its value.
    """
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for entry in (each for each in fields(kind) if each.name in values):  # type: ignore[arg-type]  # T is a dataclass
        value = values[entry.name]
        try:
            checked = _checked(entry.name, value, hints[entry.name])
        except InvalidSettings as error:
            raise InvalidSettings(f"{origin}: {error}; leave it out for the default, {entry.default!r}") from error
        given[entry.name] = value if not isinstance(checked, tuple) else _as_tuple(value)
    return from_dict(kind, {**values, **given}, origin=origin)


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain values (lists, dicts, scalars): what must be given, the verb's own, what verbs share."""
    plain: dict[str, Any] = {}
    for entry in _in_order(type(settings)):
        value = getattr(settings, entry.name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {key: list(v) if isinstance(v, tuple) else v for key, v in value.items()}
        plain[entry.name] = value
    return plain


def changed_values(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    values = {entry.name: (getattr(settings, entry.name), entry.default) for entry in fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


def check_types(settings: Any) -> None:
    """Check every field against its annotation; lists become tuples, mappings plain dicts of their own, and numbers of
    NumPy those of Python.

    For the ``__post_init__`` of a frozen dataclass.

    Raises:
        InvalidSettings: a value is not what its annotation says.
    """
    hints = typing.get_type_hints(type(settings))
    for entry in fields(settings):
        given = getattr(settings, entry.name)
        given = given.item() if isinstance(given, np.generic) else given
        value = _checked(entry.name, given, hints[entry.name])
        object.__setattr__(settings, entry.name, value)


def required_names(cls: type[Any]) -> list[str]:
    """The settings that have no default, in their order."""
    return [entry.name for entry in fields(cls) if _is_required(entry)]


def _in_order(cls: type[Any]) -> list[Field[Any]]:
    """Fields as a person wants to read them: without default, then those of ``cls`` alone, then of its bases."""
    declared = [inspect.get_annotations(base) for base in cls.__mro__]

    def shared_by(entry: Field[Any]) -> int:
        return max(depth for depth, names in enumerate(declared) if entry.name in names)

    return sorted(fields(cls), key=lambda entry: (not _is_required(entry), shared_by(entry)))


def _is_required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it, or an error that names the setting."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _checked_union(name, value, arguments)
    if origin is Literal:
        if value not in arguments:
            listed = ", ".join(map(str, arguments))
            raise InvalidSettings(f"{name}={value!r}: expected one of {listed}{nearest(str(value), arguments)}")
        return value
    if origin is tuple:
        try:
            return tuple(_checked(name, item, arguments[0]) for item in _as_tuple(value))
        except InvalidSettings as error:
            kind = _SINGULAR[arguments[0]]
            raise InvalidSettings(f"{name}={value!r}: expected {kind} or a list of {_PLURAL[arguments[0]]}") from error
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise InvalidSettings(f"{name}={value!r}: expected NAME=VALUE pairs (in YAML: a mapping)")
        return {key: _checked(f"{name}.{key}", item, arguments[1]) for key, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InvalidSettings(f"{name}={value!r}: expected a finite number")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InvalidSettings(f"{name}={value!r}: expected {_SINGULAR[hint]}, got {type(value).__name__}")
    return value


_SINGULAR = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_PLURAL = {str: "texts", int: "whole numbers", float: "numbers"}


def _checked_union(name: str, value: Any, members: tuple[Any, ...]) -> Any:
    """``value`` as the first member wants it that takes it; the error lists what all of them would take."""
    if value is None and type(None) in members:
        return None
    present = [member for member in members if member is not type(None)]
    if len(present) == 1:
        return _checked(name, value, present[0])
    words: list[Any] = []
    kinds: list[str] = []
    for member in present:
        try:
            return _checked(name, value, member)
        except InvalidSettings:
            if typing.get_origin(member) is Literal:
                words.extend(typing.get_args(member))
            else:
                kinds.append(_SINGULAR[member])
    expected = " or ".join([*map(str, words), *kinds])
    raise InvalidSettings(f"{name}={value!r}: expected {expected}{nearest(str(value), words)}")


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
