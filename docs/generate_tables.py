"""Fill the generated parts of the pages from the code: ``python docs/generate_tables.py``. A test compares the two.

A part stands between ``<!-- generated: KIND NAME -->`` and ``<!-- end -->``. The site is built with fresh parts, so
that it cannot lag behind the code that it describes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))  # the table of combinations says which ones a test runs

from composition_cases import AGGREGATES, CASES, MODELS, SELECTORS, combines  # noqa: E402
from tamis.errors import InvalidSettings  # noqa: E402
from tamis.notation import METHOD_SUMMARIES, ONLINE_SUMMARIES, PROJECTION_NAMES, PROXY_SUMMARIES  # noqa: E402
from tamis.online import METHODS as ONLINE  # noqa: E402
from tamis.online import StepSettings  # noqa: E402
from tamis.online.settings import check_combination  # noqa: E402
from tamis.score import METHODS  # noqa: E402
from tamis.settings.proxy import _RECIPES, Recipe  # noqa: E402

PART = re.compile(r"(<!-- generated: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The page with its generated parts as the code has them now."""
    return PART.sub(lambda match: f"{match[1]}{_part(match[2])}\n{match[3]}", text)


def pages() -> list[Path]:
    """All pages."""
    return sorted(DOCS.rglob("*.md"))


def _part(asked: str) -> str:
    kind, _, name = asked.partition(" ")
    return {
        "settings": _settings,
        "online-settings": _online_settings,
        "methods": _methods,
        "presets": _presets,
        "composition": _composition,
    }[kind](name)


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _settings(name: str) -> str:
    return _settings_table(METHODS[name])


def _online_settings(name: str) -> str:
    return _settings_table(StepSettings if name == "step" else ONLINE[name])


def _settings_table(kind: type) -> str:
    """Every field of a settings class: its default, and what it does."""
    meanings = {name: re.sub(r"\bNone\b", "null", meaning) for name, meaning in field_meanings(kind).items()}
    hints = get_type_hints(kind)
    rows = []
    for field in dataclasses.fields(kind):
        meaning = meanings[field.name]  # a setting that nothing explains is an error
        words = _words(hints[field.name])
        unsaid = [word for word in words if word.strip("`") not in meaning]
        rows.append(
            (
                f"`{field.name}`",
                f"`{_default(field.default)}`",
                f"{meaning} ({', '.join(words)})" if unsaid else meaning,
            )
        )
    return _table(("setting", "default", "meaning"), rows) if rows else "It has no settings."


def field_meanings(kind: type) -> dict[str, str]:
    """What the docstring or a comment says of each field, in the class or in those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        found |= {**_comments(base), **_arguments(base)}
    return found


def _default(value: Any) -> str:
    return {"()": "[]", "None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _words(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [f"`{word}`" for word in get_args(hint)]
    return [word for part in get_args(hint) for word in _words(part)]


def _arguments(kind: type) -> dict[str, str]:
    """The entries under ``Args:`` of the class's docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(kind) or "", re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", section[1], re.MULTILINE | re.DOTALL)
    return {name: _plain(text) for name, text in entries}


def _comments(kind: type) -> dict[str, str]:
    """What stands behind a field on its line, or on the line above it."""
    found = {}
    source = inspect.getsource(kind)
    lines = [*source.splitlines(), ""]
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        own, below = (re.match(r" {4}(\w+): ", lines[token.start[0] + down]) for down in (-1, 0))
        if own or (below and lines[token.start[0] - 1].lstrip().startswith("#")):
            found[(own or below)[1]] = _plain(token.string.lstrip("# "))  # type: ignore[index]
    return found


def _plain(text: str) -> str:
    return re.sub(r"``(.*?)``", r"`\1`", " ".join(text.split())).rstrip(".")


def _methods(which: str) -> str:
    online = which == "online"
    links = _links("online-" if online else "")
    rows = []
    for name, summary in (ONLINE_SUMMARIES if online else METHOD_SUMMARIES).items():
        kind = (ONLINE if online else METHODS)[name]
        place = "tamis.online" if online else "tamis.methods"
        rows.append((f"[`{name}`]({links[name]})", summary, f"`{place}.{kind.__name__}`"))
    return _table(("method", "in a sentence", "class"), rows)


def _links(prefix: str) -> dict[str, str]:
    """Page and heading of every method: headings of method pages are method names."""
    found = {}
    for page in sorted((DOCS / "methods").glob("*.md")):
        if page.stem == "index" or page.stem.startswith("online-") != bool(prefix):
            continue
        headings = re.findall(r"^(#+) (?:Online: )?`([^`]+)`", page.read_text(encoding="utf-8"), re.MULTILINE)
        for level, name in headings:
            anchor = "" if len(level) == 1 else "#" + re.sub(r"[^\w -]", "", name).lower().replace(" ", "-")
            found[name] = page.name + anchor
    return found


def _presets(name: str) -> str:
    fields = [field.name for field in dataclasses.fields(Recipe)]
    rows = []
    for preset, summary in PROXY_SUMMARIES.items():
        recipe = _RECIPES.get(preset)
        changed = (
            "–"
            if recipe is None
            else ", ".join(
                f"`{field}={_default(getattr(recipe, field))}`"
                for field in fields
                if getattr(recipe, field) != getattr(Recipe(), field)
            )
        )
        rows.append((f"`{preset}`", summary, changed or "the defaults"))
    return _table(("preset", "in a sentence", "sets"), rows)


def _mark(is_possible: bool, is_tested: bool) -> str:
    return "–" if not is_possible else "tested" if is_tested else "yes"


def _composition(which: str) -> str:
    tables: dict[str, Callable[[], str]] = {
        "models": lambda: _pairs("method", METHODS, "model", MODELS),
        "projections": lambda: _pairs("method", METHODS, "projection", PROJECTION_NAMES),
        "selectors": lambda: _pairs("method", METHODS, "selector", SELECTORS),
        "model-projections": lambda: _pairs("model", MODELS, "projection", PROJECTION_NAMES),
        "online": _online_candidates,
    }
    return tables[which]()


def _pairs(down: str, rows: Any, across: str, columns: Any) -> str:
    """For every pair of a row and a column: whether it can be asked for, and whether a test runs it end to end."""
    tested = {(getattr(case, down), getattr(case, across)) for case in CASES}

    def line(row: str) -> tuple[str, ...]:
        return tuple(_mark(combines(**{down: row, across: column}), (row, column) in tested) for column in columns)

    typed = (*METHODS, *PROJECTION_NAMES, *AGGREGATES)  # words that a user types
    named = {word: f"`{word}`" if word in typed else word for word in (*rows, *columns)}
    return _table((down, *(named[column] for column in columns)), [(named[row], *line(row)) for row in rows])


def _online_candidates() -> str:
    kinds = ("exact", "reuse:2", "sources:2", "jvp", "proxy")
    lines = []
    for name, kind in ONLINE.items():
        cells = []
        for candidates in kinds:
            marks = {_goes(method, candidates) for method in _variants(kind)}
            cells.append("yes" if marks == {True} else "–" if marks == {False} else "some forms")
        lines.append((f"`{name}`", *cells))
    return _table(("method", *(f"`{kind.replace('2', 'K')}`" for kind in kinds)), lines)


def _variants(kind: Any) -> list[Any]:
    """The method as it is, and with each word of its settings."""
    hints = get_type_hints(kind)
    found = [kind()]
    for field in dataclasses.fields(kind):
        for word in _words(hints[field.name]):
            try:
                found.append(kind(**{field.name: word.strip("`")}))
            except InvalidSettings:
                continue  # a word that goes with others only
    if kind.__name__ == "FilterThenWeight":  # the forms that the message of a refusal names
        found += [kind(filter="top", weights="none"), kind(alignment="raw", interactions="raw")]
    return found


def _goes(method: Any, candidates: str) -> bool:
    try:
        check_combination(method, StepSettings(candidates=candidates))
    except InvalidSettings:
        return False
    return True


if __name__ == "__main__":
    for page in pages():
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
