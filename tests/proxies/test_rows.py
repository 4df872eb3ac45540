"""Rows of a pool shared out: no row, and no copy of one, is in two roles or twice in one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.proxies.rows import Roles, RowSizes, assign_roles
from tiny_run import byte_tokenizer, write_rows

SMALL = RowSizes(held_out=20, validation=10, stand_ins=10, probe=15, align=30)
LARGE = RowSizes(held_out=200, validation=64, stand_ins=32, probe=128, align=800)  # more than any pool here has


def texts(number: int) -> list[str]:
    return [f"row {index} says {index * index % 97}" for index in range(number)]


def roles_of(folder: Path, pool: Sequence[str], sizes: RowSizes, *, seed: int = 0) -> Roles:
    """Each row with an id and a source of its own beside its text."""
    rows: list[dict[str, Any]] = [{"text": text, "id": f"{n}", "source": f"s{n % 3}"} for n, text in enumerate(pool)]
    examples = read_examples([str(write_rows(folder / "pool.jsonl", rows))])
    renderer = Renderer(byte_tokenizer(), max_length=100)
    return assign_roles(examples, {}, renderer, sizes=sizes, seed=seed, on_bad_row="fail")


def by_role(roles: Roles) -> dict[str, list[tuple[int, ...]]]:
    """The tokens of every role's rows."""
    rows = {name: getattr(roles, name) for name in ("held_out", "validation", "probe", "align")}
    rows["target"] = roles.target.rows
    return {name: [tuple(row.tokens.input_ids.tolist()) for row in found] for name, found in rows.items()}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (SMALL, {"held_out": 20, "validation": 10, "target": 10, "probe": 15, "align": 30}),
        (LARGE, {"held_out": 25, "validation": 12, "target": 12, "probe": 25, "align": 26}),  # of a hundred
    ],
)
def test_no_row_has_two_roles(sizes: RowSizes, expected: dict[str, int], tmp_path: Path) -> None:
    found = by_role(roles_of(tmp_path, texts(100), sizes))
    assert {name: len(rows) for name, rows in found.items()} == expected
    for one, other in itertools.combinations(found, 2):
        assert not set(found[one]) & set(found[other]), (one, other)


def test_copies_are_drawn_once(tmp_path: Path) -> None:
    alone = texts(60)
    found = by_role(roles_of(tmp_path, [*alone, *alone], LARGE))
    drawn = [tokens for rows in found.values() for tokens in rows]
    assert len(drawn) == len(set(drawn)) == 60
