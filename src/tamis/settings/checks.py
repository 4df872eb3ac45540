"""Checks that several verbs make of their settings; every error names the setting and says what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tamis.budget import describe_budget, parse_budget
from tamis.errors import InvalidSettings
from tamis.notation import target_parts
from tamis.values import check_plain

__all__ = [
    "budget_text",
    "check_above_zero",
    "check_at_least",
    "check_below_one",
    "check_method_settings",
    "check_not_blank",
    "check_sources",
    "check_targets",
]


def budget_text(value: Any) -> str:
    """Numbers, as YAML and Python write them, become the text of the same budget: 500 rows, 0.05 is 5%."""
    budget = parse_budget(value)
    return value if isinstance(value, str) else describe_budget(budget)


def check_sources(name: str, paths: tuple[str, ...]) -> None:
    """Refuse a setting ``name`` without a file, or with an empty one."""
    if not paths or not all(path.strip() for path in paths):
        raise InvalidSettings(f"{name}: expected at least one file, glob or hub id, got {list(paths)!r}; pass --{name}")


def check_targets(texts: tuple[str, ...], *, required: bool, setting: str = "target") -> list[str]:
    """The targets' names; refuses two of one name, and none where one is required."""
    if required:
        check_sources(setting, texts)
    names: list[str] = []
    for text in texts:
        name, _ = target_parts(text)
        if name in names:
            raise InvalidSettings(f"{setting}: two are called {name!r}; name them: --{setting} NAME=PATH")
        names.append(name)
    return names


def check_method_settings(values: Mapping[str, Any]) -> None:
    """Refuse what no method could have as a setting; which ones it has, and of which type, is seen when it is made."""
    for key, value in values.items():
        if not key.isidentifier():
            raise InvalidSettings(f"set: {key!r} is not the name of a method setting; expected --set name=value")
        check_plain(f"set.{key}", value)


def check_at_least(settings: Any, minimum: int, *names: str) -> None:
    """Refuse numbers below ``minimum``; a setting that is left out (None) has no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise InvalidSettings(f"{name}={value}: expected at least {minimum}")


def check_above_zero(settings: Any, *names: str) -> None:
    """Refuse zero and less; a setting that is left out (None) has no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InvalidSettings(f"{name}={value}: expected a number above zero")


def check_below_one(settings: Any, *names: str) -> None:
    """Refuse what is no share of a whole that leaves something over: below 0, or 1 and above."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < 1:
            raise InvalidSettings(f"{name}={value}: expected at least 0 and below 1")


def check_not_blank(settings: Any) -> None:
    """Refuse every text that says nothing: a shell's empty variable would otherwise pass for a name."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, str) and not value.strip():
            raise InvalidSettings(f"{entry.name}={value!r}: expected a text that is not empty")
