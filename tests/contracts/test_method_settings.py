"""What a user sets of a method is checked by its fields' annotations: no method can forget to, none ends in a fault.

Every setting of every method and of the proxies' recipes is tried with the types that it does not take, and with those
that it does; the table is read from the classes, so a new method is in it from its first day.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest

from tamis import online, score
from tamis.errors import InvalidSettings
from tamis.evaluate.plan import _values as planned_values
from tamis.online.methods.by_name import make_online_method
from tamis.runs.select import make_method
from tamis.settings import SelectSettings
from tamis.settings.proxy import ProxySettings, Recipe
from tamis.values import from_dict, method_from_dict

Make = Callable[[Mapping[str, Any]], Any]
FILES: dict[str, Any] = {"model": "m", "pool": ("p.jsonl",), "target": ("t.jsonl",)}
# Values as YAML gives them, one of every type.
WRITTEN: dict[str, Any] = {
    "text": "certainly no word of any setting",
    "whole": 3,
    "fraction": 0.5,
    "truth": True,
    "nothing": None,
    "texts": ["a", "b"],
    "wholes": [1, 2],
    "fractions": [0.5, 0.25],
}


def offline(name: str) -> Make:
    return lambda values: make_method(SelectSettings(**FILES, method=name, set=values))


def planned(name: str) -> Make:
    return lambda values: planned_values(name, {f"{name}.{key}": value for key, value in values.items()})


def trained(name: str) -> Make:
    return lambda values: make_online_method(name, values, keep=4, oversample=2)


def proxy(values: Mapping[str, Any]) -> Any:
    return from_dict(ProxySettings, {**FILES, **values})


OFFLINE = [(f"select {name}", kind, offline(name)) for name, kind in score.METHODS.items()]
PLANNED = [(f"plan {name}", kind, planned(name)) for name, kind in score.METHODS.items()]
ONLINE = [(f"train {name}", kind, trained(name)) for name, kind in online.METHODS.items()]
MAKERS = [*OFFLINE, *PLANNED, *ONLINE, ("proxy", Recipe, proxy)]
OF_THE_VERB = {"keep", "oversample"}  # of every online method, and flags of their own
OF_THE_PRESET = {"weigh_input", "weigh_output"}  # of a proxy's recipe; no user writes them


def settings_of(kind: type[Any]) -> dict[str, Any]:
    """Setting -> its annotation."""
    hints = typing.get_type_hints(kind)
    names = {entry.name for entry in dataclasses.fields(kind)} - OF_THE_VERB - OF_THE_PRESET
    return {name: hints[name] for name in hints if name in names}


def takes(hint: Any, value: Any) -> bool:
    """Whether a person who reads the annotation would write that value; the slow twin of what is tested."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(takes(member, value) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return all(takes(arguments[0], item) for item in (value if isinstance(value, list) else [value]))
    if hint in (None, type(None)):
        return value is None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


SETTINGS = [(title, name, hint, make) for title, kind, make in MAKERS for name, hint in settings_of(kind).items()]


def test_the_table_holds_every_method() -> None:
    titles = {title for title, *_ in SETTINGS}
    assert {"select tracin", "select less", "plan influence-distillation", "train lookahead", "proxy"} <= titles
    assert len(SETTINGS) > 150


@pytest.mark.parametrize(("title", "name", "hint", "make"), SETTINGS, ids=[f"{row[0]}.{row[1]}" for row in SETTINGS])
def test_a_setting_of_the_wrong_type_is_refused_by_name(title: str, name: str, hint: Any, make: Make) -> None:
    refused = 0
    for value in WRITTEN.values():
        if takes(hint, value) or (title == "proxy" and value is None):  # None: what the preset says
            continue
        with pytest.raises(InvalidSettings) as caught:
            make({name: value})
        said = str(caught.value)
        assert f"{name}={value!r}: expected " in said, said
        assert "\n" not in said
        if title != "proxy":
            assert f"settings of method {title.split()[1]!r}: " in said, said
            assert "leave it out for the default" in said, said
        refused += 1
    assert refused >= 3


@pytest.mark.parametrize(("title", "name", "hint", "make"), SETTINGS, ids=[f"{row[0]}.{row[1]}" for row in SETTINGS])
def test_a_setting_of_the_right_type_is_never_refused_for_it(title: str, name: str, hint: Any, make: Make) -> None:
    for value in [*WRITTEN.values(), *(word for word in typing.get_args(hint) if isinstance(word, str))]:
        if not takes(hint, value):
            continue
        try:
            make({name: value})
        except InvalidSettings as error:
            assert "leave it out for the default" not in str(error)  # its range, or another setting


@pytest.mark.parametrize(("title", "kind", "make"), MAKERS, ids=[row[0] for row in MAKERS])
def test_an_unknown_setting_is_refused_by_name(title: str, kind: type[Any], make: Make) -> None:
    with pytest.raises(InvalidSettings, match="unknown setting 'nonesuch'"):
        make({"nonesuch": 1})


@pytest.mark.parametrize("name", [name for name, kind in score.METHODS.items() if "projection" in settings_of(kind)])
def test_a_projection_that_cannot_be_is_refused_before_a_warm_up(name: str) -> None:
    """The method is made before a file is read; its first use of the projection comes after hours of training."""
    for values in ({"projection": "nonesuch"}, {"projection": "none", "projection_dim": 8}, {"projection_dim": 0}):
        with pytest.raises(InvalidSettings, match="projection"):
            offline(name)(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything:
    count: int | Literal["all"] = 1
    rate: float = 0.5
    files: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    switch: bool | Literal["auto"] = "auto"
    words: Literal["a", "b"] | None = None


def made(**values: Any) -> Everything:
    return method_from_dict(Everything, values, origin="here")


def test_values_stay_as_they_were_written() -> None:
    """Stages are identified by them: 1 must not become 1.0 between two versions of the program."""
    kept = made(rate=1, rates=[1, 0.5], files="one", count="all", switch=False, words="b")
    assert type(kept.rate) is int and kept.rate == 1
    assert kept.rates == (1, 0.5) and type(kept.rates[0]) is int
    assert kept.files == ("one",)
    assert (kept.count, kept.switch, kept.words) == ("all", False, "b")
    assert made() == Everything()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": "al"}, "here: count='al': expected all or a whole number, did you mean 'all'?"),
        ({"count": 0.5}, "here: count=0.5: expected all or a whole number; leave it out for the default, 1"),
        ({"count": True}, "count=True: expected all or a whole number"),
        ({"rate": "fast"}, "rate='fast': expected a number, got str; leave it out for the default, 0.5"),
        ({"rate": math.inf}, "rate=inf: expected a finite number"),
        ({"rates": [1, "x"]}, "rates=[1, 'x']: expected a number or a list of numbers"),
        ({"files": 3}, "files=3: expected a text or a list of texts"),
        ({"switch": 1}, "switch=1: expected auto or true or false"),
        ({"words": "c"}, "words='c': expected one of a, b"),
        ({"rat": 1}, "here: unknown setting 'rat', did you mean 'rate'?"),
    ],
)
def test_the_error_says_what_was_expected_what_arrived_and_what_to_do(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        made(**values)
    assert said in str(caught.value)
