"""A method from its name and plain settings, as the command line and YAML files state them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tamis.errors import InvalidSettings
from tamis.online.methods import METHODS
from tamis.online.methods.choice import Method
from tamis.online.methods.filter_then_weight import FilterThenWeight
from tamis.values import changed_values, method_from_dict

__all__ = ["make_online_method", "online_settings"]


def make_online_method(name: str, values: Mapping[str, Any], *, keep: int, oversample: int) -> Method:
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
        wanted = {**online_settings(FilterThenWeight.paper()), **wanted}
    origin = f"settings of method {name!r}"
    return method_from_dict(kind, {**wanted, "keep": keep, "oversample": oversample}, origin=origin)


def online_settings(method: Method) -> dict[str, Any]:
    """The settings of a method that are not its defaults; ``keep`` and ``oversample``, which all have, are left out."""
    return {name: value for name, value in changed_values(method).items() if name not in ("keep", "oversample")}
