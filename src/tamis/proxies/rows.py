"""Which rows build a proxy and which measure it: no row, and no copy of one, does two of these things.

Rows are drawn from the pool in an order that depends on the seed alone, and rendered until there are enough of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np

from tamis.data.batches import collate, plan_batches
from tamis.data.duplicates import exact_duplicates
from tamis.data.examples import Examples
from tamis.data.render import Renderer
from tamis.errors import BadRow, InvalidInput
from tamis.model.limits import ModelLimits
from tamis.row_limits import check_row_limits
from tamis.seeds import child_seed, random_permutation
from tamis.types import Batch, Example, IntArray, TokenizedExample

__all__ = ["Roles", "Row", "RowSizes", "TargetRows", "assign_roles", "batches_of", "usable_rows"]

_MOST_STAND_INS = 5  # sources of the pool that stand in for targets
_LEAST_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row as read and as tokens."""

    example: Example
    tokens: TokenizedExample


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """Rows that stand for tasks; ``group[i]`` is the index into ``names`` of row ``i``'s."""

    rows: tuple[Row, ...]
    group: IntArray
    names: tuple[str, ...]
    are_stand_ins: bool  # drawn from the pool, because no target was given
    left_out: Mapping[str, int] = field(default_factory=dict)  # rows of a target without a supervised token

    def counts(self) -> dict[str, int]:
        """Rows of every target."""
        return {name: int((self.group == index).sum()) for index, name in enumerate(self.names)}


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Every row that a build looks at, by what it is for."""

    held_out: tuple[Row, ...]  # the report's
    validation: tuple[Row, ...]  # alignment stops by these
    probe: tuple[Row, ...]
    align: tuple[Row, ...]
    target: TargetRows
    pool_rows: int
    mean_tokens: float  # of the rows drawn, for what a pass over the pool would cost

    def check_rows(self, limits: ModelLimits, tokenizer: Any, *, pool: Sequence[Row] | None = None) -> list[str]:
        """As ``row_limits.check_row_limits``, of the rows that were drawn and of the target's.

        ``pool`` are all usable rows of the pool, for a model that is given more than the drawn ones.

        Raises:
            BadRow: the model cannot take a row.
        """
        said = []
        drawn = (*self.held_out, *self.validation, *self.probe, *self.align)
        for kind, rows in (("pool", drawn if pool is None else pool), ("target", self.target.rows)):
            said += check_row_limits(
                limits,
                tokenizer,
                cast(Examples, [row.example for row in rows]),  # it looks rows up by their place, no more
                kind=kind,
                rows=np.arange(len(rows)),
                lengths=np.array([len(row.tokens.input_ids) for row in rows], dtype=np.int64),
                take=lambda wanted, rows=rows: [rows[index].tokens for index in wanted.tolist()],  # type: ignore[misc]
            )
        return said

    def rendered_by(self, renderer: Renderer) -> Roles:
        """The same rows in the tokens of another model.

        Raises:
            BadRow: a row cannot be rendered by it.
            InvalidInput: a row has no supervised token there.
        """

        def again(rows: tuple[Row, ...]) -> tuple[Row, ...]:
            found = tuple(Row(example=row.example, tokens=renderer.render(row.example)) for row in rows)
            for row in found:
                if not row.tokens.num_supervised:
                    raise InvalidInput(
                        f"{row.example.file}, row {row.example.row} (0-based): has no supervised token in the "
                        "sibling's tokens; remove the row, or raise --max-length"
                    )
            return found

        return replace(
            self,
            held_out=again(self.held_out),
            validation=again(self.validation),
            probe=again(self.probe),
            align=again(self.align),
            target=replace(self.target, rows=again(self.target.rows)),
        )

    def counts(self) -> dict[str, int]:
        """Rows of every role that is drawn from the pool."""
        return {name: len(getattr(self, name)) for name in ("held_out", "validation", "probe", "align")}

    def notes(self) -> list[str]:
        """What the report must say about the rows."""
        said = []
        if self.target.are_stand_ins:
            said.append(
                f"No --target was given: {len(self.target.rows)} pool rows stand in for it, as "
                f"{len(self.target.names)} targets by their source."
            )
        counts = self.target.counts()
        for name, number in self.target.left_out.items():
            said.append(
                f"{number} of the {number + counts[name]} rows of target '{name}' have no supervised token within "
                "--max-length, or cannot be rendered, and are left out."
            )
        return said


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """How many rows each role may have; a small pool gives at most a quarter, an eighth, an eighth and a quarter."""

    held_out: int
    validation: int
    stand_ins: int
    probe: int
    align: int


def assign_roles(
    pool: Examples,
    target: Mapping[str, Sequence[Example]],
    renderer: Renderer,
    *,
    sizes: RowSizes,
    seed: int,
    on_bad_row: Literal["fail", "skip"],
) -> Roles:
    """Draw distinct usable rows of the pool and share them out.

    Raises:
        BadRow: a row that was drawn cannot be rendered and ``on_bad_row`` is "fail".
        InvalidInput: fewer than 40 distinct usable rows are there, or a target has none.
    """
    if target:
        sizes = replace(sizes, stand_ins=0)
    wanted = sum(vars(sizes).values())
    drawn = _draw(pool, renderer, wanted, seed, on_bad_row)
    if len(drawn) < min(wanted, _LEAST_ROWS):
        raise InvalidInput(
            f"the pool has {len(drawn)} distinct rows with a supervised token; a proxy is built from some and measured "
            f"on others, so give at least {_LEAST_ROWS}"
        )
    # Where there are too few rows for all roles, each has its part of them and the rest aligns.
    total = len(drawn)
    parts = {"held_out": 4, "validation": 8, "stand_ins": 8, "probe": 4}
    taken: dict[str, list[Row]] = {}
    rest = drawn
    for role, part in parts.items():
        size = getattr(sizes, role)
        if total < wanted:
            size = min(size, total // part)
        taken[role], rest = rest[:size], rest[size:]
    given = _given_targets(target, renderer, on_bad_row) if target else _stand_ins(taken["stand_ins"])
    return Roles(
        held_out=tuple(taken["held_out"]),
        validation=tuple(taken["validation"]),
        probe=tuple(taken["probe"]),
        align=tuple(rest),
        target=given,
        pool_rows=len(pool),
        mean_tokens=float(np.mean([len(row.tokens.input_ids) for row in drawn])),
    )


def usable_rows(examples: Examples, renderer: Renderer, on_bad_row: str) -> Iterator[tuple[int, Row]]:
    """Every row with a supervised token, and its position.

    Raises:
        BadRow: a row cannot be rendered and ``on_bad_row`` is "fail".
    """
    for index, example in enumerate(examples):
        row = _render(example, renderer, on_bad_row)
        if row is not None:
            yield index, row


def batches_of(rows: Sequence[Row], *, batch_tokens: int, pad_id: int) -> list[Batch]:
    """Padded batches, longest rows first; ``Batch.rows`` are positions in ``rows``."""
    lengths = np.array([len(row.tokens.input_ids) for row in rows], dtype=np.int64)
    planned = plan_batches(lengths, batch_tokens=batch_tokens)
    return [collate(at, [rows[i].tokens for i in at.tolist()], pad_id) for at in planned]


def _draw(pool: Examples, renderer: Renderer, wanted: int, seed: int, on_bad_row: str) -> list[Row]:
    first = exact_duplicates(pool)
    found: list[Row] = []
    for index in random_permutation(child_seed(seed, "proxy rows"), len(pool)).tolist():
        if first[index] != index:
            continue
        row = _render(pool[index], renderer, on_bad_row)
        if row is not None:
            found.append(row)
        if len(found) == wanted:
            break
    return found


def _render(example: Example, renderer: Renderer, on_bad_row: str) -> Row | None:
    """None for a row without a supervised token: it has no gradient, and is of no use here."""
    try:
        tokens = renderer.render(example)
    except BadRow:
        if on_bad_row == "fail":
            raise
        return None
    return Row(example=example, tokens=tokens) if tokens.num_supervised else None


def _given_targets(target: Mapping[str, Sequence[Example]], renderer: Renderer, on_bad_row: str) -> TargetRows:
    rows: list[Row] = []
    group: list[int] = []
    left_out: dict[str, int] = {}
    for index, (name, examples) in enumerate(target.items()):
        usable = [row for example in examples if (row := _render(example, renderer, on_bad_row)) is not None]
        if not usable:
            raise InvalidInput(
                f"target '{name}' has no row with a supervised token; give it other rows, or raise --max-length"
            )
        rows += usable
        group += [index] * len(usable)
        if len(usable) < len(examples):
            left_out[name] = len(examples) - len(usable)
    return TargetRows(
        rows=tuple(rows),
        group=np.array(group, dtype=np.int64),
        names=tuple(target),
        are_stand_ins=False,
        left_out=left_out,
    )


def _stand_ins(rows: Sequence[Row]) -> TargetRows:
    """The pool's largest sources as targets; all other rows in one more."""
    counts: Counter[str] = Counter(row.example.source for row in rows)
    names = [name for name, number in counts.most_common(_MOST_STAND_INS) if number > 1]
    others = [row for row in rows if row.example.source not in names]
    ordered = [row for name in names for row in rows if row.example.source == name] + others
    group = [names.index(row.example.source) if row.example.source in names else len(names) for row in ordered]
    return TargetRows(
        rows=tuple(ordered),
        group=np.array(group, dtype=np.int64),
        names=(*names, *(["other sources"] if others else [])),
        are_stand_ins=True,
    )
