"""The page of the Python interface explains every field that it shows."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

import tamis

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

from api_fields import explain, meanings  # noqa: E402

SHOWN = re.findall(r"autoclass:: tamis\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
CLASSES = [
    *(getattr(tamis, name) for name in SHOWN),
    *(getattr(room, name) for room in (tamis.methods, tamis.online) for name in room.__all__),
]
DATACLASSES = [kind for kind in CLASSES if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_field_on_the_page_is_explained(kind: type) -> None:
    assert set(meanings(kind)) == {field.name for field in dataclasses.fields(kind)}


def test_explanations_stand_beside_those_of_the_docstring_and_replace_none() -> None:
    said = ["First line.", "", ":param order: in its own words.", ":raises ValueError: never."]
    lines = explain(tamis.Selection, said)
    assert [line for line in lines if line in said] == said
    assert sum(line.startswith(":param order:") for line in lines) == 1
    assert ":param warnings: what to know before training on them." in lines
    assert explain(Path, said) == said


@pytest.mark.parametrize("name", ["OnlineTrainer", "OnlineSFTTrainer"])
def test_the_trainers_say_what_their_arguments_mean(name: str) -> None:
    import inspect

    said = inspect.getdoc(getattr(tamis, name).__init__) or ""
    for argument in ("target_dataset", "selection", "step_settings", "target_rows"):
        assert f"{argument}: " in said
