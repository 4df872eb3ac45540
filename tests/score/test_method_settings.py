"""Settings of every method: wrong types are refused by name in Python as on the command line, before anything runs."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

import pytest

from tamis.errors import InvalidSettings
from tamis.score import METHODS

FIELDS = [(method, field.name) for method, kind in METHODS.items() for field in dataclasses.fields(kind)]


def members(method: str, name: str) -> tuple[Any, ...]:
    """What the setting may be: classes, literals and tuples."""
    hint = typing.get_type_hints(METHODS[method])[name]
    return typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)


def wrong_values(method: str, name: str) -> list[Any]:
    """Values of other types, among them those that Python itself would take for the right one."""
    hint = str(typing.get_type_hints(METHODS[method])[name])
    wrong: list[Any] = [object(), {"a": 1}]
    if "bool" in hint:
        wrong += [0, 1, "false"]
    elif "int" in hint:
        wrong += [2.5, True, "3 rows"]
    elif "float" in hint:
        wrong += [True, "much", float("nan"), float("inf")]
    else:
        wrong += [3, True, "no such word"] if Literal in map(typing.get_origin, members(method, name)) else [3, True]
    return wrong


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_a_value_of_another_type_is_refused_by_its_setting_s_name(method: str, name: str) -> None:
    for value in wrong_values(method, name):
        with pytest.raises(InvalidSettings, match=name):
            METHODS[method](**{name: value})


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_of_the_types_that_are_asked_for(method: str) -> None:
    made = METHODS[method]()
    again = METHODS[method](**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})
    assert again == made
