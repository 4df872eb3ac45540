from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tamis.score import matrix
from tamis.score.matrix import empty_scores, with_columns


@pytest.fixture
def task(tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(rows=np.arange(5), store=tmp_path / "store")


def test_all_columns_are_the_matrix_itself(task: SimpleNamespace) -> None:
    values = np.ones((5, 3), np.float32)
    assert with_columns(task, values, np.arange(3)) is values


@pytest.mark.parametrize("block_numbers", [1, 6, 1 << 22])
@pytest.mark.parametrize("in_memory", [0, 1 << 30])
def test_some_columns_are_numpy_s_choice_of_them(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, block_numbers: int, in_memory: int
) -> None:
    monkeypatch.setattr(matrix, "_BLOCK_NUMBERS", block_numbers)
    monkeypatch.setattr(matrix, "_IN_MEMORY", in_memory)
    values = empty_scores(task, 4)
    values[:] = np.arange(20).reshape(5, 4)
    kept = np.array([0, 3])
    found = with_columns(task, values, kept)
    np.testing.assert_array_equal(found, np.arange(20).reshape(5, 4)[:, kept])
    assert isinstance(found, np.memmap) == (in_memory == 0)


def test_a_matrix_on_disk_leaves_no_file_behind(task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_IN_MEMORY", 0)
    values = empty_scores(task, 4)
    values[:] = 1
    assert isinstance(values, np.memmap)
    assert list(task.store.iterdir()) == []
