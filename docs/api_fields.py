"""What the fields of a class mean, for the page of the Python interface.

Autodoc shows the docstring of a class. Most fields are explained by a comment behind them or, if they are settings of a
verb, by the help of their flag; without this file the page would list them bare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from generate_cli import flag_meanings
from generate_tables import field_meanings

_VERBS = {"TrainRunSettings": "train"}  # of classes of settings; the others are named after theirs


def meanings(kind: type) -> dict[str, str]:
    """What each field of a dataclass means, where anything says so."""
    found = field_meanings(kind)
    if kind.__module__.startswith("tamis.settings."):
        found |= flag_meanings(_VERBS.get(kind.__name__, kind.__name__.removesuffix("Settings").lower()))
    return {field.name: found[field.name] for field in dataclasses.fields(kind) if field.name in found}


def explain(kind: type, lines: Sequence[str]) -> list[str]:
    """The lines of a class's docstring, with those of its fields added that it does not explain itself."""
    if not dataclasses.is_dataclass(kind):
        return list(lines)
    added = [
        f":param {name}: {meaning.replace('`', '``')}{'' if meaning.endswith('.') else '.'}"
        for name, meaning in meanings(kind).items()
        if not any(line.startswith(f":param {name}:") for line in lines)
    ]
    place = next((number for number, line in enumerate(lines) if line.startswith(":")), len(lines))
    apart = [""] if place == len(lines) else []
    return [*lines[:place], *apart, *added, *apart, *lines[place:]]
