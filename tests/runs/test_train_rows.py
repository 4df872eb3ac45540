"""How long a run is, and which rows of the target only measure."""

from __future__ import annotations

from typing import Any

import pytest

from tamis.errors import InvalidInput, InvalidSettings
from tamis.online import StepSettings, Tilt, TracIn
from tamis.runs.train_rows import check_candidates, measuring_targets, num_updates
from tamis.settings import TrainRunSettings


def settings(**changes: Any) -> TrainRunSettings:
    return TrainRunSettings(**{"model": "m", "pool": ("p",), "target": ("t",), **changes})


@pytest.mark.parametrize(
    ("changes", "updates"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 1}, 5),  # 33 rows, 8 at a time: four full choices and one row
        ({"epochs": 1, "accumulation": 2}, 3),  # two choices each, one for the last
        ({"epochs": 2, "accumulation": 2}, 6),
        ({"epochs": 0.5}, 3),
    ],
)
def test_epochs_count_every_row_once_as_a_candidate(changes: dict[str, Any], updates: int) -> None:
    assert num_updates(settings(**changes), pool_rows=33, candidates=8) == updates


def test_a_pool_must_fill_one_choice() -> None:
    check_candidates(["a"] * 32, Tilt(keep=8, oversample=4), StepSettings())
    with pytest.raises(InvalidSettings, match="the pool has 31 usable rows, fewer than the 8 x 4 candidates"):
        check_candidates(["a"] * 31, Tilt(keep=8, oversample=4), StepSettings())


def test_a_pool_must_have_two_sources_where_sources_are_chosen() -> None:
    settings = StepSettings(candidates="sources:4")
    check_candidates([*["a"] * 31, "b"], TracIn(keep=8, oversample=4), settings)
    with pytest.raises(InvalidInput, match=r"all 32 rows of the pool are of one source \('a'\)"):
        check_candidates(["a"] * 32, TracIn(keep=8, oversample=4), settings)


def test_rows_that_measure_are_targets_with_names_of_their_own() -> None:
    assert measuring_targets(settings(steps=1, eval=("u", "x=b.jsonl"))) == (
        "u (measures)=u",
        "x (measures)=b.jsonl",
    )
    with pytest.raises(InvalidSettings, match="target, eval: t is in both, and rows that a choice looks at measure"):
        measuring_targets(settings(steps=1, target=("a=t",), eval=("b=t",)))
