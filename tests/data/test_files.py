from __future__ import annotations

import json
import tracemalloc
from datetime import date
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pytest

from tamis.data import files
from tamis.data.files import open_files
from tamis.data.json_text import to_json
from tamis.data.row_files import MAX_LINE_BYTES
from tamis.errors import InvalidInput


def open_one(path, **options):
    opened, _ = open_files([str(path)])
    return opened[0]


def test_lines_are_numbered_as_an_editor_does_and_read_again_by_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": "\xc3\xa9"}\r\nnot json\n{"a": 3}')
    file = open_one(path)
    scanned = list(file.scan())
    assert [row.row for row in scanned] == [0, 3, 4, 5]
    assert [row.value for row in scanned] == [{"a": 1}, {"a": "é"}, None, {"a": 3}]
    assert scanned[2].problem is not None and "not valid JSON (Expecting value at character 0)" in scanned[2].problem
    for row in scanned:
        if row.problem is None:
            assert file.read(row.start, row.length) == row.value
    assert file.raw_json(scanned[1].start, scanned[1].length) == '{"a": "é"}'


def test_a_scan_holds_one_line_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"text": "x" * 20_000}) + "\n"
    path.write_text(line * 1500, encoding="utf-8")  # 30 MB
    file = open_one(path)
    tracemalloc.start()
    assert sum(1 for _ in file.scan()) == 1500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_line_of_100_mb_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "first"}\n')
        stream.seek(100_000_000)
        stream.write(b'\n{"text": "last"}\n')
    tracemalloc.start()
    scan = open_one(path).scan()
    assert next(scan).value == {"text": "first"}
    assert "line is longer than 32 MiB; write one row per line" in str(next(scan).problem)
    assert next(scan).value == {"text": "last"}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * MAX_LINE_BYTES


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", b"", r"rows.jsonl is empty \(0 bytes\); write at least one row"),
        ("rows.txt", b"x", r"unknown kind of file '.txt'; expected one of .jsonl, .ndjson, .json, .parquet"),
        ("rows.json", b'[{"a": 1},', r"rows.json: not valid JSON \(Expecting value at line 1, column 11\)"),
        ("rows.json", b"3", "a .json file must be one list of rows, got int"),
        ("rows.json", b'[{"a": "\xff"}]', r"not UTF-8 \(byte 0xff at byte 8\); save the file as UTF-8"),
        ("rows.parquet", b"PAR1 not really", "rows.parquet: not a readable Parquet file"),
    ],
)
def test_unusable_files_say_what_is_wrong(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=problem):
        list(open_one(path).scan())


def test_a_json_list_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 5)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}]')
    with pytest.raises(InvalidInput, match=r"cannot be read piecewise; write one row per line \(.jsonl\)"):
        open_one(path)


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row.value for row in open_one(path).scan()] == [{"a": 1}, {"a": 2}]


def test_missing_paths_folders_and_patterns_say_what_to_do(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInput, match=r"^.*/none.jsonl does not exist; check the path"):
        open_one(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match=r"folder is a folder; name its files, for example '.*/folder/\*.jsonl'"):
        open_one(tmp_path / "folder")
    with pytest.raises(InvalidInput, match=r"\*.jsonl matches no file; check the pattern"):
        open_one(tmp_path / "*.jsonl")
    with pytest.raises(InvalidInput, match="no file is named; give at least one path, glob or hub id"):
        open_files([])


def test_patterns_cross_folders_in_sorted_order_and_keep_who_named_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "literal[1].jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"a": 1}\n')
    opened, named_by = open_files(["literal[1].jsonl", "[ab].jsonl", "deep/**/*.jsonl"])
    assert [file.name for file in opened] == ["literal[1].jsonl", "a.jsonl", "b.jsonl", "deep/er/c.jsonl"]
    assert named_by == [0, 1, 1, 2]
    with pytest.raises(InvalidInput, match=r"^\*.jsonl: the file a.jsonl was already named by a.jsonl"):
        open_files(["a.jsonl", "*.jsonl"])


def test_hub_ids_pass_config_and_split_on(monkeypatch):
    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for text in ("org/name", "org/name:part", "org/name@test[:10%]", "org/na.me:part@val"):
        file = open_one(text)
        assert (file.name, file.stem) == (text, text.split(":")[0].split("@")[0].split("/")[1])
        assert [row.value for row in file.scan()] == [{"text": "one"}, {"text": "two"}]
        assert file.raw_json(1, 0) == '{"text": "two"}'
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", "part", "train"),
        ("org/name", None, "test[:10%]"),
        ("org/na.me", "part", "val"),
    ]


@pytest.mark.parametrize("text", ["here/name", "org/rows.csv", "org/rows.JSONL", "./org/name", "/org/name"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, text):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(InvalidInput, match="does not exist; check the path"):
        open_one(text)


def test_hub_failures_are_one_line(monkeypatch):
    def load(name, config, *, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        InvalidInput, match=r"not loadable as the hub dataset 'org/name', config default, split 'train' "
    ):
        open_one("org/name")


def test_to_json_writes_what_any_reader_accepts():
    assert to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "é"}) == '{"a": null, "b": [null, 1.5], "c": "é"}'
    assert json.loads(to_json({"a": "\ud800"})) == {"a": "\ud800"}
    assert json.loads(to_json({"n": np.int64(3), "v": np.array([0.5, 1.5])})) == {"n": 3, "v": [0.5, 1.5]}
    assert to_json({"day": date(2026, 1, 2), "price": Decimal("1.50")}) == '{"day": "2026-01-02", "price": "1.50"}'
    with pytest.raises(TypeError, match="JSON knows no object"):  # its text would be an address, new in every process
        to_json({"image": object()})
