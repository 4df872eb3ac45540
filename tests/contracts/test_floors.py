"""The house has floors (CONTRIBUTING.md): a file imports from its own room and from lower floors."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tamis"
TABLE = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
# "`maths/`, `compare_*.py`" -> ("maths", 1), ("compare_*", 9); the first pattern that fits counts
PLACES = [
    (name.removesuffix(".py").rstrip("/"), int(floor))
    for floor, names in TABLE
    for name in re.findall(r"`(.+?)`", names)
]


def floor_of(place: str) -> int:
    found = [floor for name, floor in PLACES if name == place] or [f for name, f in PLACES if fnmatch(place, name)]
    assert found, f"{place} stands on no floor in CONTRIBUTING.md"
    return found[0]


def imports() -> list[tuple[str, str, str]]:
    """(file, its room or name, the room or name that it imports)."""
    found: list[tuple[str, str, str]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if inside.name in ("__init__.py", "__main__.py") and len(inside.parts) == 1:
            continue  # the public face opens every room
        found.extend(
            (str(inside), inside.parts[0].removesuffix(".py"), node.module.split(".")[1])
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tamis.")
        )
    return found


def test_every_room_stands_on_a_floor() -> None:
    for place in {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if not p.name.startswith("_")} - {"py.typed"}:
        floor_of(place)


def test_no_import_goes_up_a_floor() -> None:
    found = imports()
    assert len(found) > 1000
    assert [each for each in found if floor_of(each[2]) > floor_of(each[1])] == []


def test_rooms_of_one_floor_do_not_import_each_other() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    crossing = [
        (file, own, other)
        for file, own, other in imports()
        if own != other and {own, other} <= rooms and floor_of(own) == floor_of(other)
    ]
    assert [each for each in crossing if (each[1], each[2]) != ("solve", "maths")] == []
