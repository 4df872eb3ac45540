"""Flags over a settings file over defaults: from what the user typed to the settings of a verb."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from tamis.config import config_verb, read_config, read_value
from tamis.errors import InvalidInput, InvalidSettings
from tamis.values import from_dict, nearest

__all__ = ["merge_settings", "parse_pairs"]

T = TypeVar("T")


def merge_settings(cls: type[T], flags: Mapping[str, Any], config: str | None) -> T:
    """Settings of class ``cls``: its defaults, over them the file's values, over those the flags the user typed.

    A flag replaces the file's value as a whole, except for NAME=VALUE flags, which replace single names.

    Raises:
        InvalidInput: the file cannot be read.
        InvalidSettings: a setting is unknown, missing or refused.
    """
    values = read_config(config) if config is not None else {}
    if config is not None:
        known = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]  # settings are dataclasses
        strange = sorted(str(name) for name in values if name not in known)
        verb = config_verb(config)
        # Names that are all close to known ones are slips of the pen in a file of this verb's own.
        if verb is not None and not all(nearest(name, known) for name in strange):
            raise InvalidSettings(
                f"--config {config}: these are settings of `tamis {verb}`, and here there is no {', '.join(strange)}; "
                "leave those lines out of a copy, or pass flags instead"
            )
    for name, value in flags.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), Mapping):
            value = {**values[name], **value}
        values[name] = value
    return from_dict(cls, values, origin=f"--config {config}" if config is not None else "settings")


def parse_pairs(flag: str, texts: list[str]) -> dict[str, Any]:
    """``["lr=1e-5", "form=dot"]`` as a mapping; the values are read as YAML scalars or flow lists.

    Raises:
        InvalidSettings: a text is not NAME=VALUE, or a name comes twice.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidSettings(f"{flag} {text}: expected NAME=VALUE")
        if name.strip() in pairs:
            raise InvalidSettings(f"{flag} {text}: {name.strip()!r} is given twice")
        try:
            pairs[name.strip()] = read_value(value)
        except InvalidInput as error:
            raise InvalidSettings(f"{flag} {text}: {error}; quote the value") from error
    return pairs
