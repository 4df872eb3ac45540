"""Records of finished runs come back as they were written, or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from comparison_runs import made_run
from tamis.comparison.records import Records
from tamis.errors import StoreCorrupted

RUN = made_run("tracin", 0, [1.25, float("nan")], answers=("a \ud800 b",), spec={"seed": 0, "rates": {9: 1e-3, 10: 2}})


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(RUN)
    found = records.read(RUN.key)
    assert found.row_losses[0] == 1.25 and found.answers == RUN.answers and found.seed == 0
    content = json.loads(records.path(RUN.key).read_text(encoding="utf-8", errors="surrogatepass"))
    records.path(RUN.key).write_text(json.dumps({**content, "train_seconds": 99.0}))
    assert records.read(RUN.key).train_seconds == 99.0, "times are not part of what a record is"
    del content["sha256"]
    records.path(RUN.key).write_text(json.dumps(content))
    assert records.read(RUN.key).tflops == RUN.tflops, "of an earlier version"


@pytest.mark.parametrize(("was", "now"), [("1.25", "1.35"), ('"steps": 10', '"steps": 18'), ("{", "["), ("1.25", "")])
def test_a_changed_record_is_named(tmp_path: Path, was: str, now: str) -> None:
    records = Records(tmp_path)
    records.write(replace(RUN, answers=()))
    path = records.path(RUN.key)
    path.write_bytes(path.read_bytes().replace(was.encode(), now.encode(), 1))
    with pytest.raises(StoreCorrupted, match=f"{path.name}: .*; delete it to repeat that run"):
        records.read(RUN.key)
