"""A method from its name and plain settings, as the command line and YAML files state them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tamis.errors import InvalidSettings
from tamis.online.choice import Method
from tamis.online.scorers import METHODS, FilterThenWeight
from tamis.values import from_dict

__all__ = ["make_method", "plain_settings"]


def make_method(name: str, values: Mapping[str, Any], *, keep: int, oversample: int) -> Method:
    """The method ``name`` with ``values`` in place of its defaults.

    ``preset: paper`` starts from ``FilterThenWeight.paper()``; the other values are changes to that.

    Raises:
        InvalidSettings: the method has no such setting or preset, or refuses its value.
    """
    kind, wanted = METHODS[name], dict(values)
    preset = wanted.pop("preset", None)
    if preset is not None:
        if kind is not FilterThenWeight or preset != "paper":
            raise InvalidSettings(
                f"settings of method {name!r}: unknown preset {preset!r}; the one preset is 'paper', of "
                "filter-then-weight"
            )
        wanted = {**plain_settings(FilterThenWeight.paper()), **wanted}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key, value in wanted.items():
        if key in defaults:
            _check_kind(name, key, value, defaults[key])
    origin = f"settings of method {name!r}"
    return from_dict(kind, {**wanted, "keep": keep, "oversample": oversample}, origin=origin)


def plain_settings(method: Method) -> dict[str, Any]:
    """The settings of a method that are not its defaults; ``keep`` and ``oversample``, which all have, are left out."""
    found = {}
    for field in dataclasses.fields(method):  # type: ignore[arg-type]  # methods are dataclasses by contract
        value = getattr(method, field.name)
        if value != field.default and field.name not in ("keep", "oversample"):
            found[field.name] = value
    return found


def _check_kind(method: str, name: str, value: Any, default: Any) -> None:
    """Texts are checked by the methods, which know the words; here, what they would compare with numbers."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        expected, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        expected, fits = "a whole number", is_number and isinstance(value, int)
    elif isinstance(default, float):
        expected, fits = "a number", is_number
    elif default is None:
        expected, fits = "a number or null", is_number or value is None
    else:
        expected, fits = "a text or a number", is_number or isinstance(value, str)
    if not fits:
        raise InvalidSettings(f"settings of method {method!r}: {name}={value!r}: expected {expected}")
