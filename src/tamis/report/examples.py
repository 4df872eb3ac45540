"""The rows that the report shows with their text: which ones, and how much of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tamis.report.columns import Columns, DoubleArray
from tamis.report.wording import as_text, one_line, visible
from tamis.types import Example, IntArray

__all__ = [
    "ExampleCard",
    "Pair",
    "TargetExamples",
    "Turn",
    "card",
    "copies",
    "flagged_examples",
    "leaked_examples",
    "target_examples",
]

ReadExample = Callable[[int], Example]

_TURN_CHARACTERS = 3000
_MAX_TURNS = 8
_PREVIEW = 150
_BEST, _LAST, _WORST, _OF_TARGET = 5, 2, 3, 2  # rows shown for each target


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message, cut to a readable size."""

    role: str
    text: str
    characters: int  # of the whole message
    left_out: int  # characters not shown


@dataclass(frozen=True, kw_only=True)
class ExampleCard:
    """One row, ready to show."""

    id: str
    row: int  # 0-based, in its file
    place: str  # file and row
    source: str
    preview: str
    turns: tuple[Turn, ...]
    turns_left_out: int
    rank: int | None = None
    score: float | None = None
    loss: float | None = None
    tokens: int | None = None
    supervised: int | None = None
    marks: tuple[str, ...] = ()  # "suspicious answer", "truncated", ...


@dataclass(frozen=True, kw_only=True)
class TargetExamples:
    """What one target looks like and which rows it brought in."""

    name: str
    target_rows: int
    shown: tuple[ExampleCard, ...]
    best: tuple[ExampleCard, ...]
    last: tuple[ExampleCard, ...]  # the lowest-ranked rows that were still selected
    worst: tuple[ExampleCard, ...]  # the lowest scores of the pool


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two rows that say the same, exactly or nearly."""

    kind: str  # "exact" or "near"
    both_selected: bool
    first: ExampleCard
    second: ExampleCard


def target_examples(
    columns: Columns,
    read_example: ReadExample,
    read_target: ReadExample,
    target_group: IntArray,
    *,
    max_targets: int,
) -> tuple[TargetExamples, ...]:
    """Best, last and worst rows for each of the first ``max_targets`` targets.

    Best and last are rows picked for the target, in rank order; where no row says for which target it was picked, the
    selected rows in the order of the target's score.
    """
    chosen = columns.chosen()
    result = []
    for index, name in enumerate(columns.target_names[:max_targets]):
        score = columns.score_for(name)
        mine = chosen[columns.picked_for[chosen] == index]
        if len(mine) == 0 and (columns.picked_for[chosen] < 0).all():
            mine = chosen if len(columns.target_names) == 1 else _by_score(chosen, score)
        best = mine[:_BEST]
        last = mine[_BEST:][-_LAST:]
        scored = np.flatnonzero(np.isfinite(score) & ~columns.selected)
        worst = scored[np.argsort(score[scored], kind="stable")[:_WORST]]
        members = np.flatnonzero(target_group == index)
        result.append(
            TargetExamples(
                name=name,
                target_rows=len(members),
                shown=tuple(card(read_target(int(row))) for row in members[:_OF_TARGET]),
                best=_cards(columns, best, read_example, score),
                last=_cards(columns, last, read_example, score),
                worst=_cards(columns, worst, read_example, score),
            )
        )
    return tuple(result)


def flagged_examples(columns: Columns, read_example: ReadExample, limit: int = 5) -> tuple[ExampleCard, ...]:
    """Selected rows with an unusually high loss, highest first."""
    rows = np.flatnonzero(columns.flagged & columns.selected)
    loss = np.nan_to_num(columns.loss[rows], nan=-np.inf)
    return _cards(columns, rows[np.argsort(-loss, kind="stable")[:limit]], read_example, columns.score)


def leaked_examples(columns: Columns, read_example: ReadExample, limit: int = 3) -> tuple[ExampleCard, ...]:
    """Pool rows that equal a target row, selected ones first."""
    rows = np.flatnonzero(columns.leaked)
    return _cards(
        columns, rows[np.argsort(~columns.selected[rows], kind="stable")[:limit]], read_example, columns.score
    )


def copies(columns: Columns, read_example: ReadExample, *, kind: str, limit: int) -> tuple[Pair, ...]:
    """Pairs of equal (``exact``) or nearly equal (``near``) rows: both selected first, then one, then none."""
    of = columns.duplicate_of if kind == "exact" else columns.near_duplicate_of
    rows = np.flatnonzero((of >= 0) & (of != np.arange(columns.num_rows)))
    if kind == "near":  # exact copies are near too; they have their own list
        first = columns.first_copy()
        rows = rows[first[rows] != first[of[rows]]]
    selected = columns.selected[rows].astype(int) + columns.selected[of[rows]]
    pairs = []
    for row in rows[np.argsort(-selected, kind="stable")[:limit]]:
        first_card, second_card = _cards(columns, np.array([of[row], row]), read_example, columns.score)
        both = bool(columns.selected[row] and columns.selected[of[row]])
        pairs.append(Pair(kind=kind, both_selected=both, first=first_card, second=second_card))
    return tuple(pairs)


def _by_score(rows: IntArray, score: DoubleArray) -> IntArray:
    return rows[np.argsort(-np.nan_to_num(score[rows], nan=-np.inf), kind="stable")]


def _cards(columns: Columns, rows: IntArray, read_example: ReadExample, score: DoubleArray) -> tuple[ExampleCard, ...]:
    return tuple(_scored_card(columns, int(row), read_example(int(row)), float(score[row])) for row in rows)


def _scored_card(columns: Columns, row: int, example: Example, score: float) -> ExampleCard:
    marks = (
        ("selected", columns.selected[row]),
        ("suspicious answer", columns.flagged[row]),
        ("equals a target row", columns.leaked[row]),
        (f"{columns.truncated[row]:,} tokens cut", columns.truncated[row] > 0),
        ("exact copy", columns.duplicate_of[row] >= 0),
        ("near copy", columns.near_duplicate_of[row] >= 0 and columns.duplicate_of[row] < 0),
    )
    return card(
        example,
        rank=int(columns.rank[row]) if columns.rank[row] >= 0 else None,
        score=score if np.isfinite(score) else None,
        loss=float(columns.loss[row]) if np.isfinite(columns.loss[row]) else None,
        tokens=int(columns.tokens[row]),
        supervised=int(columns.supervised[row]),
        marks=tuple(label for label, holds in marks if holds),
    )


def card(
    example: Example,
    *,
    rank: int | None = None,
    score: float | None = None,
    loss: float | None = None,
    tokens: int | None = None,
    supervised: int | None = None,
    marks: tuple[str, ...] = (),
) -> ExampleCard:
    """``example`` with its text cut to a readable size and every hidden character made visible."""
    parts = _turns(example)
    asked = next((text for role, text in reversed(parts) if role in ("user", "prompt", "text") and text.strip()), "")
    return ExampleCard(
        id=one_line(example.id, 80),
        row=example.row,
        place=f"{one_line(example.file, 120)}, row {example.row}",
        source=one_line(example.source, 60),
        preview=one_line(asked or " ".join(text for _, text in parts if text), _PREVIEW),
        turns=tuple(
            Turn(
                role=one_line(role, 24),
                text=visible(text[:_TURN_CHARACTERS]),
                characters=len(text),
                left_out=max(0, len(text) - _TURN_CHARACTERS),
            )
            for role, text in parts[:_MAX_TURNS]
        ),
        turns_left_out=max(0, len(parts) - _MAX_TURNS),
        rank=rank,
        score=score,
        loss=loss,
        tokens=tokens,
        supervised=supervised,
        marks=marks,
    )


def _turns(example: Example) -> list[tuple[str, str]]:
    if example.messages:
        turns = []
        for message in example.messages:
            text = as_text(message.get("content"))
            if calls := message.get("tool_calls"):
                text = "\n".join(part for part in (text, as_text(calls)) if part)
            turns.append((str(message.get("role", "?")), text))
        return turns
    if example.text is not None:
        return [("text", example.text)]
    return [("prompt", example.prompt or ""), ("completion", example.completion or "")]
