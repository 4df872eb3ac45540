"""A pool whose answer is known: relevant rows and their spoilt twins, planted among rows of the user's own pool.

Everything here is a chat, so that rows of any format can stand in one file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tamis.comparison.statistics import area_under_curve
from tamis.errors import InvalidInput
from tamis.seeds import child_seed, random_permutation, random_subset

__all__ = ["KINDS", "PlantedPool", "Score", "answer", "plant", "score_selection"]

# What a planted row is, and what a good method does with it.
KINDS: Mapping[str, str] = {
    "relevant": "a row of the task: to be taken",
    "copy": "an exact copy of a relevant row: to be taken once",
    "wrong answer": "a relevant row with another one's answer: to be left",
    "truncated": "a relevant row whose answer breaks off: to be left",
    "irrelevant": "words of the pool in random order: to be left",
    "background": "a row of the pool",
    "background, wrong answer": "a row of the pool with another answer of its source: to be left",
}
_COPIED, _WRONG, _TRUNCATED = 0.25, 0.5, 0.25  # of the relevant rows
_SPOILT_SHARE = 0.25  # of each source's background rows that get a wrong answer
_FEWEST_IN_SOURCE = 4  # rows from which a source can be told from its spoilt rows

Chat = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlantedPool:
    """The rows in random order, and what each of them is."""

    rows: tuple[dict[str, Any], ...]  # with id and source
    kinds: tuple[str, ...]
    of: tuple[int, ...]  # the relevant row that a row is, copies or spoils; -1 for others
    group: tuple[str, ...]  # the task or source within which wrong answers are told from right ones
    relevant: int  # relevant rows, copies not counted

    def counts(self) -> dict[str, int]:
        """Rows of each kind."""
        return {kind: self.kinds.count(kind) for kind in KINDS}


def plant(relevant: Sequence[tuple[str, Chat]], background: Sequence[tuple[str, Chat]], *, seed: int) -> PlantedPool:
    """Mix ``relevant`` rows and what is made of them into ``background``; both are (task or source, chat).

    Raises:
        InvalidInput: there are too few relevant rows.
    """
    if len(relevant) < 2:
        raise InvalidInput(
            f"{len(relevant)} relevant rows to plant, and wrong answers are made from at least 2; give more target "
            "rows, or a file of relevant ones by --relevant"
        )
    made: list[tuple[str, int, str, Chat]] = [("relevant", i, task, chat) for i, (task, chat) in enumerate(relevant)]
    made += [("copy", i, task, chat) for i, (task, chat) in _part(relevant, _COPIED, seed, "copies")]
    for task in dict.fromkeys(task for task, _ in relevant):
        own = [i for i, (name, _) in enumerate(relevant) if name == task]
        swapped = _with_swapped_answers([relevant[i][1] for i in own], child_seed(seed, "wrong", task))
        kept = list(swapped.items())[: math.ceil(_WRONG * len(own))]
        made += [("wrong answer", own[i], task, chat) for i, chat in kept]
    for i, (task, chat) in _part(relevant, _TRUNCATED, seed, "truncated"):
        words = answer(chat).split()
        if len(words) >= 3:
            made.append(("truncated", i, task, _with_answer(chat, " ".join(words[: len(words) // 3]))))
    made += [("irrelevant", -1, "irrelevant", chat) for chat in _salad(background or relevant, len(relevant), seed)]
    made += _spoilt_background(background, seed)
    order = random_permutation(child_seed(seed, "planted order"), len(made))
    shuffled = [made[int(i)] for i in order]
    return PlantedPool(
        rows=tuple(
            {**chat, "id": f"planted-{place}", "source": group} for place, (_, _, group, chat) in enumerate(shuffled)
        ),
        kinds=tuple(kind for kind, _, _, _ in shuffled),
        of=tuple(of for _, of, _, _ in shuffled),
        group=tuple(group for _, _, group, _ in shuffled),
        relevant=len(relevant),
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a selection and its scores fare on a planted pool."""

    selected: int
    found: int  # different relevant rows in the selection
    precision: float
    recall: float
    of_the_task: float  # share of the selection that is relevant, copied, or spoilt from a relevant row
    taken: Mapping[str, int]  # selected rows of each kind
    both_copies: int  # relevant rows that were selected together with their copy
    wrong_auc: float | None  # right against wrong answers among relevant rows; 0.5 is blind
    source_auc: float | None  # the same within the pool's own sources
    background_auc: float | None  # relevant rows against the pool's


def score_selection(pool: PlantedPool, rows: npt.NDArray[np.int64], score: npt.NDArray[np.float64]) -> Score:
    """Of the selected ``rows``; ``score`` has a number for every row, NaN for rows that were not scored (the last)."""
    kinds = np.asarray(pool.kinds, dtype=object)
    ranked = np.where(np.isnan(score), -np.inf, score)
    right = [i for i in rows.tolist() if kinds[i] in ("relevant", "copy")]
    found = {pool.of[i] for i in right}
    group = np.asarray(pool.group, dtype=object)
    return Score(
        selected=len(rows),
        found=len(found),
        precision=len(found) / max(1, len(rows)),
        recall=len(found) / pool.relevant,
        of_the_task=float(np.mean([pool.of[i] >= 0 for i in rows.tolist()])) if len(rows) else 0.0,
        taken={kind: int((kinds[rows] == kind).sum()) for kind in KINDS},
        both_copies=len(right) - len(found),
        wrong_auc=_within(ranked, group, kinds == "relevant", kinds == "wrong answer"),
        source_auc=_within(ranked, group, kinds == "background", kinds == "background, wrong answer"),
        background_auc=area_under_curve(ranked[kinds == "relevant"], ranked[kinds == "background"]),
    )


def _within(
    ranked: npt.NDArray[np.float64],
    group: npt.NDArray[Any],
    right: npt.NDArray[np.bool_],
    wrong: npt.NDArray[np.bool_],
) -> float | None:
    """Area under the curve inside each group, averaged over the wrong rows; None where there is none."""
    areas, weights = [], []
    for name in dict.fromkeys(group[wrong]):
        own = group == name
        area = area_under_curve(ranked[own & right], ranked[own & wrong])
        if area is not None:
            areas.append(area)
            weights.append(int((own & wrong).sum()))
    return float(np.average(areas, weights=weights)) if areas else None


def answer(chat: Chat) -> str:
    """The text of a chat's last turn; empty if it is not an assistant's."""
    last = chat["messages"][-1]
    content = last.get("content")
    return content if last.get("role") == "assistant" and isinstance(content, str) else ""


def _with_answer(chat: Chat, text: str) -> dict[str, Any]:
    changed = copy.deepcopy(dict(chat))
    changed["messages"][-1]["content"] = text
    return changed


def _with_swapped_answers(chats: Sequence[Chat], seed: int) -> dict[int, dict[str, Any]]:
    """Each chat with the answer of the next one in a random circle; those whose answer stays the same are left out."""
    order = random_permutation(seed, len(chats)).tolist()
    swapped = {}
    for place, i in enumerate(order):
        other = answer(chats[order[(place + 1) % len(order)]])
        if other.strip() and other.strip() != answer(chats[i]).strip():
            swapped[int(i)] = _with_answer(chats[i], other)
    return swapped


def _part(
    relevant: Sequence[tuple[str, Chat]], share: float, seed: int, name: str
) -> list[tuple[int, tuple[str, Chat]]]:
    """A random part of the relevant rows, each with its place."""
    count = math.ceil(share * len(relevant))
    return [(int(i), relevant[int(i)]) for i in random_subset(child_seed(seed, name), len(relevant), count)]


def _spoilt_background(background: Sequence[tuple[str, Chat]], seed: int) -> list[tuple[str, int, str, Chat]]:
    """The pool's own rows, some of each source with the answer of another row of that source."""
    made: list[tuple[str, int, str, Chat]] = []
    for source in dict.fromkeys(name for name, _ in background):
        own = [chat for name, chat in background if name == source]
        spoilt: dict[int, dict[str, Any]] = {}
        if len(own) >= _FEWEST_IN_SOURCE:
            chosen = random_subset(
                child_seed(seed, "spoilt", source), len(own), max(2, round(_SPOILT_SHARE * len(own)))
            ).tolist()
            swapped = _with_swapped_answers([own[i] for i in chosen], child_seed(seed, "swapped", source))
            spoilt = {chosen[i]: chat for i, chat in swapped.items()}
        for i, chat in enumerate(own):
            kind = "background, wrong answer" if i in spoilt else "background"
            made.append((kind, -1, source, spoilt.get(i, chat)))
    return made


def _salad(rows: Sequence[tuple[str, Chat]], count: int, seed: int) -> list[dict[str, Any]]:
    """Chats of as many words as rows of the pool have, drawn from all of their words."""
    prompts = [" ".join(_texts(chat)[:-1]).split() for _, chat in rows]
    answers = [answer(chat).split() for _, chat in rows]
    words = sorted({word for part in (*prompts, *answers) for word in part}) or ["lorem"]
    made = []
    for i in range(count):
        row = int(random_permutation(child_seed(seed, "salad row", i), len(rows))[0])
        sizes = (max(1, len(prompts[row])), max(1, len(answers[row])))
        order = random_permutation(child_seed(seed, "salad", i), max(len(words), sum(sizes))) % len(words)
        drawn = [words[int(place)] for place in order[: sum(sizes)]]
        made.append(
            {
                "messages": [
                    {"role": "user", "content": " ".join(drawn[: sizes[0]])},
                    {"role": "assistant", "content": " ".join(drawn[sizes[0] :])},
                ]
            }
        )
    return made


def _texts(chat: Chat) -> list[str]:
    return [str(message.get("content") or "") for message in chat["messages"]]
