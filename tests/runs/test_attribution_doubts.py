"""Scores of which a few first updates have nearly all are called in doubt; ordinary ones are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tamis.runs.attribution_doubts import doubts
from tamis.settings import AttributeSettings


def uses(sizes: dict[int, float], *, steps: int = 20, rows: int = 4, error: float | None = None) -> pa.Table:
    """Scores of size one, of alternating sign; ``sizes`` of those of some updates."""
    step = np.repeat(np.arange(1, steps + 1), rows)
    score = np.array([sizes.get(int(one), 1.0) for one in step]) * np.where(np.arange(len(step)) % 2, -1, 1)
    columns = {"step": step, "score": score}
    if error is not None:
        columns["error_proxy"] = np.where(step == 2, error, 0.1)
    return pa.table(columns)


def said(table: pa.Table, **changes: Any) -> tuple[list[int], str]:
    settings = AttributeSettings(run="r", target=("t.jsonl",), **changes)
    found = doubts(table, settings, moved=3.0)
    return found["outsized_updates"], " ".join(found["warnings"])


def test_a_first_update_that_outweighs_all_others_is_named_with_what_to_do() -> None:
    updates, sentence = said(uses({1: 80.0}))
    assert updates == [1]
    assert sentence.startswith("Update 1 has 81% of all scores by absolute value, 80 times as much per use")  # 80 / 99
    assert "--secant 10" in sentence
    updates, sentence = said(uses({1: 80.0, 3: 40.0}), secant=10)
    assert updates == [1, 3] and sentence.startswith("Updates 1 and 3 have 87% ") and "--secant" not in sentence
    assert "at a lower rate" in sentence


@pytest.mark.parametrize(
    "sizes",
    [{}, {1: 9.0}, {1: 15.0}, {15: 80.0}],
    ids=["ordinary", "not ten times as large", "not half of all", "not among the first"],
)
def test_other_scores_are_not_called_in_doubt(sizes: dict[int, float]) -> None:
    assert said(uses(sizes)) == ([], "")


def test_few_updates_and_tracin_tell_nothing() -> None:
    assert said(uses({1: 80.0}, steps=3)) == ([], "")
    assert said(uses({1: 80.0}), method="tracin") == ([], "")
    assert said(uses({}, steps=4, rows=1))[0] == []
    assert said(pa.table({"step": np.arange(1, 9), "score": np.zeros(8)})) == ([], "")


def test_errors_longer_than_the_run_are_counted() -> None:
    _, sentence = said(uses({}, error=4.0), error="proxy")
    assert sentence == (
        "4 uses of update 2 with an error_proxy above the length of the whole run's way, 3: no derivative is right for "
        "them"
    )
    assert said(uses({}, error=2.0), error="proxy") == ([], "")
