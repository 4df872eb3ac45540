"""What every method promises, run over all of them from the one dict that names them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from score_task import make_task, save_tiny
from tamis.errors import InvalidSettings
from tamis.score import METHODS
from tamis.types import TargetScores

QUICK = {
    "less": {"warmup_epochs": 1, "warmup_pool_share": 0.5},
    "loss-drop": {"warmup_steps": 2},
    "influence-distillation": {"landmarks": 4, "warmup_epochs": 1},
    "adamw-influence": {"update_rows": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def scores_of(name: str, folder: Path, model: Path, **task: object) -> TargetScores:
    return METHODS[name](**QUICK.get(name, {})).score(make_task(folder, model, **task))


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_finite_and_have_the_promised_shape(name: str, tmp_path: Path, model: Path) -> None:
    task = make_task(tmp_path, model)
    scores = METHODS[name](**QUICK.get(name, {})).score(task)
    assert scores.values.dtype == np.float32
    assert scores.values.shape == (len(task.rows), len(scores.group))
    np.testing.assert_array_equal(scores.rows, task.rows)
    assert set(scores.group.tolist()) == set(range(len(task.target_names)))
    assert np.isfinite(scores.values).all()
    for column in scores.extra.values():
        assert len(column) == len(task.rows)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_scores(name: str, tmp_path: Path, model: Path) -> None:
    one, two = (scores_of(name, tmp_path / part, model, seed=3) for part in "ab")
    np.testing.assert_array_equal(one.values, two.values)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_call_takes_everything_from_the_store(
    name: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scores_of(name, tmp_path, model)
    monkeypatch.setattr("tamis.collect.load_model", lambda settings: pytest.fail("the model was loaded again"))
    np.testing.assert_array_equal(scores_of(name, tmp_path, model).values, first.values)


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_frozen_documented_and_named_by_the_user_s_word(name: str) -> None:
    method = METHODS[name]()
    assert method.name == name
    assert METHODS[name].__doc__
    assert dataclasses.is_dataclass(method)
    for field in dataclasses.fields(method)[:1]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tracin", {"normalize": "l2"}),
        ("tracin", {"memory_gb": 0.0}),
        ("less", {"form": "adamw"}),
        ("less", {"warmup_pool_share": 0.0}),
        ("bm25", {"b": 2.0}),
        ("length", {"order": "middle"}),
        ("rds+", {"positions": "first"}),
        ("loss-drop", {"warmup_steps": 0}),
        ("influence-distillation", {"landmarks": 1}),
        ("influence-distillation", {"kernel": "sinc"}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings, match=next(iter(settings))):
        METHODS[name](**settings)
