"""Methods from names and plain settings."""

from __future__ import annotations

from typing import Any

import pytest

from tamis.errors import InvalidSettings
from tamis.notation import ONLINE_SUMMARIES
from tamis.online import METHODS, FilterThenWeight, Tilt
from tamis.online.methods.by_name import make_online_method, online_settings


def make(name: str, **values: Any) -> Any:
    return make_online_method(name, values, keep=6, oversample=3)


def test_the_listed_methods_are_those_that_exist() -> None:
    assert list(ONLINE_SUMMARIES) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_name_alone_is_the_method_with_its_defaults(name: str) -> None:
    made = make(name)
    assert made == METHODS[name](keep=6, oversample=3)  # type: ignore[call-arg]
    assert made.name == name and online_settings(made) == {}


def test_settings_become_fields_and_back() -> None:
    made = make("filter-then-weight", filter="top", scale=1.5, ridge=2, normalise=False)
    assert made == FilterThenWeight(keep=6, oversample=3, filter="top", scale=1.5, ridge=2, normalise=False)
    again = make("filter-then-weight", **online_settings(made))
    assert again == made
    assert online_settings(Tilt(keep=2, oversample=9, ridge=1.0)) == {"ridge": 1.0}


def test_the_preset_is_the_paper_with_changes() -> None:
    assert make("filter-then-weight", preset="paper") == FilterThenWeight.paper(keep=6, oversample=3)
    changed = make("filter-then-weight", preset="paper", alignment="projected")
    assert (changed.alignment, changed.interactions, changed.scale) == ("projected", "raw", 1.0)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("tilt", {"ridg": 1.0}, "settings of method 'tilt': unknown setting 'ridg', did you mean 'ridge'"),
        ("uniform", {"alignment": "raw"}, "unknown setting 'alignment'"),
        ("tilt", {"preset": "paper"}, "unknown preset 'paper'; the one preset is 'paper', of filter-then-weight"),
        ("filter-then-weight", {"preset": "papre"}, "unknown preset 'papre'"),
        ("filter-then-weight", {"filter": "best"}, "filter='best': expected one of greedy, top, none"),
        ("filter-then-weight", {"cold_start": "no"}, "cold_start='no': expected a whole number, got str"),
        ("filter-then-weight", {"cold_start": True}, "cold_start=True: expected a whole number, got bool"),
        ("filter-then-weight", {"ridge": "big"}, "ridge='big': expected a number, got str"),
        ("tilt", {"ridge": None}, "ridge=None: expected a number"),
        ("filter-then-weight", {"normalise": 1}, "normalise=1: expected true or false"),
        ("filter-then-weight", {"scale": [1]}, "scale=[1]: expected target or a number"),
        (
            "anchored",
            {"alignment": "adma"},
            "alignment='adma': expected one of adam, jacobian",
        ),
    ],
)
def test_what_a_method_does_not_have_is_refused_by_name(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        make(name, **values)
    assert message in str(caught.value)
