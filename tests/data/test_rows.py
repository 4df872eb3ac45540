from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any

import datasets
import pytest

from tamis.data.examples import read_examples
from tamis.data.rows import are_rows, checked_rows, held_name
from tamis.errors import BadRow, InvalidInput

ROWS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": "one", "note": [1]},
    {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}], "id": "two", "note": [2]},
]


def read(rows: Any, **options: Any) -> Any:
    name = held_name("pool")
    return read_examples([name], held={name: checked_rows(rows, "pool")}, **options)


def as_file(folder: Path, rows: list[dict[str, Any]]) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read_examples([str(path)])


@pytest.mark.parametrize("kind", ["list", "tuple", "dataset"])
def test_rows_in_memory_are_the_rows_of_a_file(tmp_path: Path, kind: str) -> None:
    given = {"list": list, "tuple": tuple, "dataset": datasets.Dataset.from_list}[kind](ROWS)
    held, filed = read(given), as_file(tmp_path, ROWS)
    assert held.digests == filed.digests and held.ids == filed.ids
    assert [example.messages for example in held] == [example.messages for example in filed]
    assert [json.loads(held.raw_json(i)) for i in (0, 1)] == ROWS
    assert held.identity["content"] == filed.identity["content"]
    assert held.files == ["pool (in memory)"] and held[0].source == "pool"


def test_rows_without_an_id_are_named_by_their_place() -> None:
    assert read([{"text": "a"}, {"text": "b"}]).ids == ["pool (in memory):0", "pool (in memory):1"]


def test_the_same_rows_have_the_same_identity_and_others_another() -> None:
    again = [json.loads(json.dumps(row)) for row in ROWS]
    assert read(ROWS).identity == read(again).identity
    again[1]["note"] = [3]
    assert read(again).identity["text"] != read(ROWS).identity["text"]


def test_rows_changed_while_they_are_in_use_are_noticed() -> None:
    rows = [json.loads(json.dumps(row)) for row in ROWS]
    examples = read(rows)
    rows[0]["note"] = "new"
    with pytest.raises(InvalidInput, match=r"pool \(in memory\) changed while it was in use"):
        examples.raw_json(0)
    rows[1]["messages"][1]["content"] = "new"
    with pytest.raises(InvalidInput, match=r"pool \(in memory\) changed while it was in use"):
        examples[1]


def test_a_formatted_dataset_gives_plain_values() -> None:
    data = datasets.Dataset.from_list([{"text": "a", "n": 1}, {"text": "b", "n": 2}]).with_format("numpy")
    assert json.loads(read(data).raw_json(1)) == {"text": "b", "n": 2}


def test_a_value_that_json_lacks_is_a_bad_row_like_any_other() -> None:
    rows = [{"text": "a"}, {"text": "b", "image": object()}]
    with pytest.raises(BadRow, match=r"pool \(in memory\), row 1 .* written as JSON \(JSON knows no object\)"):
        read(rows)
    assert len(read(rows, on_bad_row="skip")) == 1


def test_paths_are_not_taken_for_rows() -> None:
    for given in ("a.jsonl", Path("a.jsonl"), ["a.jsonl", Path("b.jsonl")], ("a",), []):
        assert not are_rows(given)
    for given in (ROWS, datasets.Dataset.from_list(ROWS), ["a.jsonl", ROWS[0]], (row for row in ROWS)):
        assert are_rows(given)


class Frame:
    columns = ("text",)

    def to_dict(self) -> None: ...


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), r"a dataset with splits \(train\); pass one"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "a streamed dataset cannot be read twice"),
        (Frame(), r"a data frame; pass its rows, for example pool=frame\.to_dict\('records'\)"),
        ((row for row in ROWS), "expected paths, a list of rows or a datasets.Dataset, got generator"),
        ([ROWS[0], "a.jsonl"], "entry 1 is str, others are rows or paths; .* not both"),
    ],
)
def test_what_is_no_list_of_rows_is_refused_with_what_to_pass(given: Any, problem: str) -> None:
    with pytest.raises(InvalidInput, match=f"pool: {problem}"):
        checked_rows(given, "pool")


def test_a_name_whose_rows_are_gone_says_so() -> None:
    with pytest.raises(InvalidInput, match=r"pool \(in memory\) stands for rows that a Python program held in memory"):
        read_examples([held_name("pool")])


def test_any_mapping_is_a_row() -> None:
    assert json.loads(read([UserDict(text="a", more=UserDict(n=1))]).raw_json(0)) == {"text": "a", "more": {"n": 1}}
