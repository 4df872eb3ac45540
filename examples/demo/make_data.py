"""Writes the demo's pool and target (data/*.jsonl) from the hand-written chats in texts/.

What is planted, and where, is decided here and recorded in each row's ``planted`` field, which the library carries
along and never reads. Running this script again gives the same bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 20

# source -> what its rows are, seen from a target of word problems that are solved step by step
SOURCES = {
    "word-problems": "relevant",  # the target's skill in other words
    "notices": "look-alike",  # the same stories and numbers, answered with a sign, a card, a line of dialogue
    "quick-sums": "short-answer",  # arithmetic without working
    "trivia": "short-answer",
    "python": "irrelevant",
    "customer-emails": "irrelevant",
    "recipes": "irrelevant",
    "json": "irrelevant",
    "french": "irrelevant",
    "summaries": "irrelevant",
}
CORRUPTED_EVERY = 5  # every fifth word problem gets the worked answer of another one

# (source, number of the row in its file, counted from 1) of the rows that the pool holds twice
EXACT_COPIES = [
    *(("word-problems", number) for number in (3, 12, 27, 41)),
    *(("python", 9), ("trivia", 20), ("customer-emails", 6), ("json", 14)),
]

# The same, with a small change to the user's words: what a scrape of two mirrors of one site looks like.
NEAR_COPIES = [
    ("word-problems", 8, "How many litres are in the full tank", "How many litres are left in the full tank"),
    ("word-problems", 17, "How many tulips survive?", "How many of the tulips survive?"),
    ("word-problems", 33, "What does a month with", "What does one month with"),
    ("word-problems", 44, "How much does he have left?", "How much money does he have left?"),
    ("summaries", 3, "In the end it could not agree", "In the end the council could not agree"),
    ("recipes", 15, "Soak the beans overnight", "Soak the white beans overnight"),
]


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """The chats of one text file: blocks divided by ``---``, each a user's turn and the assistant's."""
    chats = []
    for block in path.read_text(encoding="utf-8").split("\n---\n"):
        user, _, assistant = block.strip().partition("\nassistant: ")
        chats.append(
            [
                {"role": "user", "content": user.removeprefix("user: ")},
                {"role": "assistant", "content": assistant},
            ]
        )
    return chats


def make_pool() -> list[dict[str, Any]]:
    """All rows of the pool, shuffled, each copy after its original."""
    rows: dict[str, dict[str, Any]] = {}
    for source, planted in SOURCES.items():
        for number, messages in enumerate(read_chats(HERE / "texts" / f"{source}.txt"), start=1):
            name = f"{source}-{number:02d}"
            rows[name] = {"id": name, "source": source, "messages": messages, "planted": planted}
    corrupt([row for row in rows.values() if row["planted"] == "relevant"][CORRUPTED_EVERY - 1 :: CORRUPTED_EVERY])

    copies = []
    for source, number in EXACT_COPIES:
        original = rows[f"{source}-{number:02d}"]
        copies.append(original | {"id": f"{original['id']}-again", "planted": "duplicate", "copy_of": original["id"]})
    for source, number, old, new in NEAR_COPIES:
        original = rows[f"{source}-{number:02d}"]
        user, assistant = original["messages"]
        if old not in user["content"]:
            raise ValueError(f"{original['id']} does not contain {old!r}")
        messages = [user | {"content": user["content"].replace(old, new)}, assistant]
        name = f"{original['id']}-alike"
        copies.append(
            original | {"id": name, "messages": messages, "planted": "near-duplicate", "copy_of": original["id"]}
        )

    pool = [*rows.values(), *copies]
    random.Random(SEED).shuffle(pool)
    for copy in copies:
        here = pool.index(copy)
        there = next(i for i, row in enumerate(pool) if row["id"] == copy["copy_of"])
        if here < there:
            pool[here], pool[there] = pool[there], pool[here]
    return pool


def corrupt(rows: list[dict[str, Any]]) -> None:
    """Give each row the answer of the next one: right in form, wrong for its question."""
    answers = [row["messages"][1] for row in rows]
    for row, answer in zip(rows, answers[1:] + answers[:1], strict=True):
        row["messages"] = [row["messages"][0], answer]
        row["planted"] = "corrupted"


def make_target() -> list[dict[str, Any]]:
    """The rows that stand for the task: word problems told in another tone than the pool's."""
    chats = read_chats(HERE / "texts" / "target.txt")
    return [{"id": f"target-{i:02d}", "messages": messages} for i, messages in enumerate(chats, start=1)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(HERE / "data" / "pool.jsonl", make_pool())
    write(HERE / "data" / "target.jsonl", make_target())
