"""What is odd about rows is said in sentences, once, with the first row's place."""

from __future__ import annotations

from pathlib import Path

from tamis.data.examples import Examples, read_examples
from tamis.data.render import Renderer
from tamis.data.row_warnings import bad_row_warnings, row_warnings, tool_warnings
from tiny_run import CHATML, byte_tokenizer, chat, write_rows


def read(folder: Path, *more: dict[str, object]) -> Examples:
    return read_examples([str(write_rows(folder / "rows.jsonl", [chat("q", "a", **own) for own in more]))])


def renderer(template: str = CHATML) -> Renderer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, max_length=100)


def test_tools_are_told_of_only_where_the_template_writes_none(tmp_path: Path) -> None:
    with_tools = {"tools": [{"name": "add"}]}
    (said,) = tool_warnings(read(tmp_path, {}, with_tools, with_tools), renderer(), "pool")
    assert said.startswith("pool: 2 of 3 rows have tools, but the chat template writes none")
    assert "rows.jsonl, row 1, 0-based" in said
    assert not tool_warnings(read(tmp_path, {}, with_tools), renderer("{{ tools }}" + CHATML), "pool")
    assert not tool_warnings(read(tmp_path, {}, {}), renderer(), "pool")


def test_repeated_ids_are_counted_once_each(tmp_path: Path) -> None:
    examples = read(tmp_path, {"id": "x"}, {"id": "x"}, {"id": "y"}, {"id": "x"})
    assert row_warnings(examples, renderer(), "target") == ["target: 1 ids occur more than once; rows stay apart."]
    assert row_warnings(read(tmp_path, {"id": "x"}, {"id": "y"}), renderer(), "target") == []


def test_bad_rows_are_counted_and_the_first_is_named() -> None:
    assert bad_row_warnings([], "pool") == []
    (said,) = bad_row_warnings(["a.jsonl, row 3: is empty", "a.jsonl, row 4: is empty"], "pool")
    assert said == "pool: 2 rows cannot be used and were left out; the first: a.jsonl, row 3: is empty"
