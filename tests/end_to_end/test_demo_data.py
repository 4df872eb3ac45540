"""The demo's chats are what they claim: right where they should be right, wrong only where a mistake is planted."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo"
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", DEMO / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "data" / name).read_text(encoding="utf-8").splitlines()]


POOL, TARGET = read("pool.jsonl"), read("target.jsonl")
BY_ID = {row["id"]: row for row in POOL}


def said(row: dict[str, Any], role: str) -> str:
    return next(turn["content"] for turn in row["messages"] if turn["role"] == role)


def planted(*kinds: str) -> list[dict[str, Any]]:
    return [row for row in POOL if row["planted"] in kinds]


def assert_worked_answer_is_right(answer: str) -> None:
    equations = EQUATION.findall(answer)
    assert equations, answer
    for left, sign, right, result in equations:
        a, b = int(left), int(right)
        expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        assert expected == int(result), answer
    assert answer.endswith(f"The answer is {equations[-1][3]}."), answer


def test_committed_files_are_what_the_script_writes(make_data: ModuleType) -> None:
    assert make_data.make_pool() == POOL
    assert make_data.make_target() == TARGET


def test_planted_kinds_have_the_stated_sizes() -> None:
    assert Counter(row["planted"] for row in POOL) == {
        "relevant": 40,
        "corrupted": 10,
        "look-alike": 34,
        "short-answer": 44,
        "irrelevant": 178,
        "duplicate": 8,
        "near-duplicate": 6,
    }
    assert len(TARGET) == 16


def test_every_row_is_one_question_and_one_answer() -> None:
    for row in [*POOL, *TARGET]:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"], row["id"]
        assert all(turn["content"].strip() == turn["content"] != "" for turn in row["messages"]), row["id"]
        assert sum(len(turn["content"]) for turn in row["messages"]) < 520, f"{row['id']} is too long for a short demo"
    assert len(BY_ID) == len(POOL)


@pytest.mark.parametrize("row", [*TARGET, *planted("relevant")], ids=lambda row: row["id"])
def test_worked_answers_are_arithmetically_right(row: dict[str, Any]) -> None:
    assert_worked_answer_is_right(said(row, "assistant"))


def test_corrupted_rows_have_the_form_of_an_answer_but_to_another_question(make_data: ModuleType) -> None:
    true_answers = {
        chat[0]["content"]: chat[1]["content"] for chat in make_data.read_chats(DEMO / "texts" / "word-problems.txt")
    }
    for row in planted("corrupted"):
        answer = said(row, "assistant")
        assert_worked_answer_is_right(answer)  # right in itself ...
        truth = true_answers[said(row, "user")]
        assert answer != truth
        assert answer.split("The answer is")[1] != truth.split("The answer is")[1]  # ... and wrong for its question


def test_copies_come_after_their_original_and_are_as_alike_as_they_claim() -> None:
    position = {row["id"]: i for i, row in enumerate(POOL)}
    for row in planted("duplicate", "near-duplicate"):
        original = BY_ID[row["copy_of"]]
        assert position[original["id"]] < position[row["id"]]
        assert row["source"] == original["source"]
        assert said(row, "assistant") == said(original, "assistant")
        if row["planted"] == "duplicate":
            assert row["messages"] == original["messages"]
        else:
            alike = difflib.SequenceMatcher(None, said(row, "user"), said(original, "user")).ratio()
            assert 0.85 < alike < 1
    others = [json.dumps(row["messages"]) for row in POOL if row["planted"] != "duplicate"]
    assert len(set(others)) == len(others), "an exact copy that nobody planted"


def test_target_rows_do_not_leak_into_the_pool() -> None:
    pool_pieces = {piece for row in POOL for piece in pieces(said(row, "user"), words=6)}
    for row in TARGET:
        assert not pool_pieces & pieces(said(row, "user"), words=6), row["id"]


def pieces(text: str, words: int) -> set[tuple[str, ...]]:
    split = re.findall(r"\w+", text.lower())
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def test_look_alikes_share_the_words_of_the_relevant_rows_but_solve_nothing() -> None:
    numbers = {number for row in planted("relevant", "corrupted") for number in re.findall(r"\d+", said(row, "user"))}
    for row in planted("look-alike"):
        assert set(re.findall(r"\d+", said(row, "user"))) & numbers, row["id"]
        assert not EQUATION.search(said(row, "assistant")), row["id"]
        assert "The answer is" not in said(row, "assistant"), row["id"]


def test_code_answers_are_python_and_json_answers_are_json() -> None:
    for row in POOL:
        if row["source"] == "python":
            compile(said(row, "assistant"), row["id"], "exec")
        if row["source"] == "json":
            json.loads(said(row, "assistant"))


@pytest.mark.parametrize(
    ("row", "call", "expected"),
    [
        ("python-02", "count_vowels('Banana')", 3),
        ("python-05", "unique([3, 1, 3, 2, 1])", [3, 1, 2]),
        ("python-06", "[fibonacci(n) for n in range(7)]", [0, 1, 1, 2, 3, 5, 8]),
        ("python-10", "[is_leap(y) for y in (1900, 2000, 2023, 2024)]", [False, True, False, True]),
        ("python-13", "chunks([1, 2, 3, 4, 5], 2)", [[1, 2], [3, 4], [5]]),
        ("python-15", "gcd(84, 36)", 12),
        ("python-21", "[n for n in range(20) if is_prime(n)]", [2, 3, 5, 7, 11, 13, 17, 19]),
        ("python-28", "[binary_search([1, 4, 9], x) for x in (1, 9, 5)]", [0, 2, -1]),
        ("python-31", "rotate([1, 2, 3, 4], 5)", [2, 3, 4, 1]),
        ("python-34", "running_total([1, 2, 3])", [1, 3, 6]),
    ],
)
def test_code_answers_do_what_was_asked(row: str, call: str, expected: object) -> None:
    names: dict[str, Any] = {}
    exec(said(BY_ID[row], "assistant"), names)
    assert eval(call, names) == expected
