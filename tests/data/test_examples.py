from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tamis.data.examples import BadRowRecord, read_examples
from tamis.errors import BadRow, InvalidInput


def chat(question: str, answer: str, **extra) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


ROWS = [
    chat("What is 1 + 1?", "2", id="one", source="maths"),
    chat("Où ?", "Là-bas 😀"),
    chat("Who?", "Me.", id=7, source=None, note={"kept": [1, 2]}),
]


def lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(params=["jsonl", "json", "parquet"])
def stored(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        return lines(path, ROWS)
    if request.param == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        rows = [{"source": None, "note": None, **row, "id": str(row["id"]) if "id" in row else None} for row in ROWS]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def test_every_kind_of_file_gives_the_same_rows(stored):
    examples = read_examples([stored])
    name = stored.rsplit("/", 1)[1]
    assert examples.ids == ["one", f"{name}:1", "7"]
    assert [example.source for example in examples] == ["maths", "rows", "rows"]
    assert examples.row.tolist() == [example.row for example in examples] == [0, 1, 2]
    assert [example.messages[-1]["content"] for example in examples] == ["2", "Là-bas 😀", "Me."]
    assert examples[2].raw["note"] == {"kept": [1, 2]}
    assert json.loads(examples.raw_json(1))["messages"] == ROWS[1]["messages"]


def test_digests_do_not_depend_on_the_kind_of_file(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "rows.parquet")
    from_parquet = read_examples([str(tmp_path / "rows.parquet")])
    assert from_parquet.digests == read_examples([lines(tmp_path / "rows.jsonl", ROWS[:2])]).digests


def test_random_access_equals_iteration(stored):
    examples = read_examples([stored])
    walked = list(examples)
    for index in (2, 0, 1, 0, -1):
        assert examples[index] == walked[index]
    assert examples[1:] == walked[1:]
    with pytest.raises(IndexError):
        examples[3]


def test_parquet_is_read_by_row_group(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": f"row {n}"} for n in range(25)]), path, row_group_size=4)
    examples = read_examples([str(path)])
    assert [examples[n].text for n in (24, 0, 7, 8, 3)] == ["row 24", "row 0", "row 7", "row 8", "row 3"]


def test_parquet_text_that_is_not_utf8_is_one_clear_error(tmp_path):
    table = pa.table({"text": pa.array([b"fine", b"\xff"]).view(pa.string())})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InvalidInput, match=r"rows.parquet: cannot be read near row 0 \('utf-8' codec can't decode"):
        read_examples([str(tmp_path / "rows.parquet")])


def test_a_line_of_json_lines_is_handed_back_untouched(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = '{ "text":"a\\u00e9",  "z": 1.50, "id" :"x"}'
    path.write_text(line + "\n")
    assert read_examples([str(path)]).raw_json(0) == line


def test_files_keep_their_order_and_their_namesakes_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "rows.jsonl", [chat("q", f"in {folder}")])
    paths = [str(tmp_path / "b" / "rows.jsonl"), str(tmp_path / "a" / "*.jsonl")]
    examples = read_examples(paths)
    assert examples.files == [paths[0], str(tmp_path / "a" / "rows.jsonl")]
    assert examples.file_index.tolist() == examples.named_by == [0, 1]
    assert examples.ids == [f"{examples.files[0]}:0", f"{examples.files[1]}:0"]
    assert not examples.duplicate_ids
    assert examples.file_index.dtype == np.int32 and examples.row.dtype == np.int64


def test_duplicate_ids_are_known_and_rows_stay_apart(tmp_path):
    rows = [chat("a", "b", id="x"), chat("c", "d", id="y"), chat("a", "b", id="x")]
    examples = read_examples([lines(tmp_path / "rows.jsonl", rows)])
    assert len(examples) == 3
    assert examples.duplicate_ids == {"x": [0, 2]}


def test_rows_with_tools_are_known_by_their_places(tmp_path):
    tool = {"name": "add"}
    rows = [
        chat("a", "b"),
        chat("a", "b", tools=[tool]),
        chat("a", "b", tools=[]),
        chat("a", "b", tools=json.dumps([tool])),
    ]
    assert read_examples([lines(tmp_path / "rows.jsonl", rows)]).with_tools.tolist() == [1, 3]


def identity_of(tmp_path, *rows) -> dict[str, str]:
    return read_examples([lines(tmp_path / "rows.jsonl", rows)]).identity


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


@pytest.mark.parametrize(
    ("rows", "differs"),
    [
        ((chat("a", "b", id="x", source="s"), chat("c", "d", id="y")), set()),
        ((chat("a", "B", id="x", source="s"), chat("c", "d", id="y")), {"content", "text"}),
        ((chat("a", "b", id="z", source="s"), chat("c", "d", id="y")), {"ids", "text"}),
        ((chat("a", "b", id="x", source="S"), chat("c", "d", id="y")), {"source", "text"}),
        ((chat("a", "b", id="x", source="s", note=1), chat("c", "d", id="y")), {"text"}),
        ((chat("a", "b", source="s", id="x"), chat("c", "d", id="y")), {"text"}),  # another order of the fields
        ((chat("a", "b", id="x", source="s"),), {"content", "files", "ids", "source", "text"}),
        (
            (chat("c", "d", id="y"), chat("a", "b", id="x", source="s")),
            {"content", "ids", "source", "text"},
        ),
        ((chat("a", "b", id="xy", source="s"), chat("c", "d", id="")), {"ids", "text"}),
    ],
)
def test_identity_names_what_changed_and_nothing_else(tmp_path, rows, differs):
    base = identity_of(tmp_path, chat("a", "b", id="x", source="s"), chat("c", "d", id="y"))
    assert changed(base, identity_of(tmp_path, *rows)) == differs


def test_identity_knows_file_names_and_row_numbers(tmp_path):
    rows = [chat("a", "b", id="x", source="s"), chat("c", "d", id="y", source="s")]
    base = read_examples([lines(tmp_path / "rows.jsonl", rows)])
    renamed = read_examples([lines(tmp_path / "others.jsonl", rows)])
    assert changed(base.identity, renamed.identity) == {"files"}
    assert base.content_hash != renamed.content_hash
    (tmp_path / "rows.jsonl").write_text("\n" + (tmp_path / "rows.jsonl").read_text())
    moved = read_examples([str(tmp_path / "rows.jsonl")])
    assert changed(base.identity, moved.identity) == {"files"}


def test_an_edit_of_a_field_that_is_not_trained_on_is_noticed_when_the_row_is_written(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [chat("a", "b", note="old")])
    examples = read_examples([path])
    assert '"old"' in examples.raw_json(0)
    lines(tmp_path / "rows.jsonl", [chat("a", "b", note="new")])
    assert examples[0].raw["note"] == "new"  # what is trained on is what it was
    with pytest.raises(InvalidInput, match=r"rows.jsonl changed while it was in use \(row 0 is not what it was\)"):
        examples.raw_json(0)


GOOD = json.dumps(chat("q", "a")).encode()


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        (b'{"messages": [', None, "not valid JSON"),
        (b"[1]", None, "expected a JSON object, got list; write one object per row"),
        (b"null", None, "expected a JSON object, got NoneType"),
        (b"[" * 100_000, None, "JSON is nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
        (b'{"text": "\xff"}', None, r"not UTF-8 \(byte 0xff at byte 10 of the line\); save the file as UTF-8"),
        (b'{"question": "q"}', "messages", "the field is missing; add it"),
        (b'{"messages": null}', "messages", "expected a list of messages, got null"),
        (b'{"messages": 3}', "messages", "expected a list of messages, got a number"),
        (b'{"messages": [{"role": "bot", "content": "x"}]}', "messages[0].role", "unknown role 'bot'"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "messages", "no assistant turn"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "messages[0].content", "turn is null"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', "messages[0].content", "turn is empty"),
        (
            b'{"text": "hello"}',
            None,
            "this row is in the text format but the file is read as messages, as its first row is; keep one format",
        ),
        (GOOD[:-1] + b', "id": [1]}', "id", "expected a string or a whole number, got list"),
        (GOOD[:-1] + b', "id": "\\ud800"}', "id", "half of a surrogate pair"),
        (GOOD[:-1] + b', "source": [3]}', "source", "expected a string, got list"),
        (GOOD[:-1] + b', "source": {"name": 3}}', "source", "expected a string, got dict"),
        (GOOD.replace(b'"a"', b'"\\udfff"'), None, "half of a surrogate pair"),
    ],
)
def test_bad_rows_fail_or_are_skipped_with_file_row_and_field(tmp_path, line, field, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    where = rf"rows.jsonl, row 2 \(0-based\)(, field '[^']+')?: .*({problem})"
    with pytest.raises(BadRow, match=where) as caught:
        read_examples([str(path)])
    assert caught.value.field == field
    examples = read_examples([str(path)], on_bad_row="skip")
    assert examples.row.tolist() == [0, 3]
    assert examples.skipped == [BadRowRecord(str(path), 2, field, caught.value.problem)]


def test_unknown_format_of_the_first_row_lists_its_fields(tmp_path):
    with pytest.raises(BadRow, match=r"row 0 \(0-based\): unknown row format with 'question', 'answer'; expected"):
        read_examples([lines(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])])


def test_row_format_overrides_detection(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{**ROWS[0], "text": "all of it"}])
    assert read_examples([path])[0].format == "messages"
    assert read_examples([path], row_format="text")[0].text == "all of it"


def test_a_row_in_another_format_than_the_named_one_is_told_to_leave_the_name_out(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"text": "t"}, chat("q", "a")])
    with pytest.raises(
        BadRow, match=r"row 1 .*in the messages format but row_format says text; .*leave row_format out"
    ):
        read_examples([path], row_format="text")


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_null_field_of_the_first_row_is_called_null(tmp_path, on_bad_row):
    path = lines(tmp_path / "rows.jsonl", [{"instruction": None, "output": "x"}])
    with pytest.raises(InvalidInput, match=r"row 0.*, field 'instruction': the field is null; fill it") as caught:
        read_examples([path], on_bad_row=on_bad_row)
    assert "expected" not in str(caught.value)


def test_numbers_and_truth_values_name_a_source(tmp_path):
    rows = [chat("q", "a", source=value) for value in (7, 0, 1.5, True, None, "s")]
    examples = read_examples([lines(tmp_path / "rows.jsonl", rows)])
    assert [e.source for e in examples] == ["7", "0", "1.5", "True", "rows", "s"]
    assert examples[0].raw["source"] == 7  # the row itself is handed back as it was


def test_files_of_different_formats_go_together(tmp_path):
    paths = [
        lines(tmp_path / "a.jsonl", ROWS),
        lines(tmp_path / "b.jsonl", [{"text": "t"}]),
        lines(tmp_path / "c.jsonl", [{"instruction": "i", "output": "o"}]),
        lines(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "c"}]),
    ]
    examples = read_examples(paths)
    assert [e.format for e in examples] == ["messages"] * 3 + ["text", "instruction", "prompt-completion"]
    assert examples[5].prompt == "p" and examples[5].completion == "c"


def test_files_without_a_good_row_are_refused(tmp_path):
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(InvalidInput, match=r"blank.jsonl has no rows; write at least one"):
        read_examples([str(blank)])
    bad = lines(tmp_path / "bad.jsonl", [chat("q", ""), {"messages": []}])
    with pytest.raises(InvalidInput, match=r"all 2 rows are bad; the first is row 0, field 'messages\[1\].content'"):
        read_examples([bad], on_bad_row="skip")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(InvalidInput, match=r"none.parquet has no rows"):
        read_examples([str(tmp_path / "none.parquet")])


@pytest.mark.parametrize("change", ["longer first row", "shorter file", "same size"])
def test_a_file_that_changes_during_a_run_is_noticed(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    examples = read_examples([lines(path, ROWS)])
    if change == "longer first row":
        lines(path, [chat("What is 1 + 1 then?", "2"), *ROWS[1:]])
    elif change == "shorter file":
        lines(path, ROWS[:1])
    else:
        path.write_text(path.read_text("utf-8").replace("Me.", "Yu."), encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"rows.jsonl changed while it was in use"):
        examples[2]


def test_rows_are_not_held_in_memory(tmp_path):
    import tracemalloc

    path = lines(tmp_path / "rows.jsonl", [chat("q", "x" * 10_000) for _ in range(1000)])  # 10 MB
    tracemalloc.start()
    examples = read_examples([path])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(examples) == 1000
    assert held < 1000 * 500  # bytes a row: id, digest and seven numbers
    assert peak < 2_000_000
