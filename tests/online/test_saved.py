"""The selection's own file in a checkpoint: whole, of this run, or a sentence that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tamis.errors import InvalidInput, InvalidSettings
from tamis.online import saved
from tamis.online.saved import load_selection, save_selection

STATE = {"shadow": torch.arange(6.0).reshape(2, 3)}
SEEN = np.array([True, False, True])
SETTINGS: dict[str, Any] = {"selection": "less", "selection.keep": 4}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save_selection(tmp_path, STATE, SEEN, settings=SETTINGS)
    state, seen = load_selection(tmp_path, target_rows=3, settings=SETTINGS)
    assert torch.equal(state["shadow"], STATE["shadow"])
    assert list(state) == ["shadow"]
    assert seen.tolist() == SEEN.tolist()


def test_a_file_cut_off_is_called_damaged(tmp_path: Path) -> None:
    save_selection(tmp_path, STATE, SEEN, settings=SETTINGS)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidInput, match=f"{path.name} is damaged .*; resume from another checkpoint of the run"):
        load_selection(tmp_path, target_rows=3, settings=SETTINGS)


def test_a_file_that_lacks_what_every_one_has_is_refused(tmp_path: Path) -> None:
    save_selection(tmp_path, STATE, SEEN, settings=SETTINGS)
    (path,) = tmp_path.iterdir()
    save_file(load_file(path), path)
    with pytest.raises(InvalidInput, match="it does not say by which settings it was made; resume from another"):
        load_selection(tmp_path, target_rows=3, settings=SETTINGS)


def test_a_setting_that_only_one_side_has_is_another_one(tmp_path: Path) -> None:
    save_selection(tmp_path, STATE, SEEN, settings=SETTINGS)
    without = {"selection": "less"}
    with pytest.raises(InvalidSettings, match=r"selection\.keep was 4 there and is '\(absent\)' now"):
        load_selection(tmp_path, target_rows=3, settings=without)
    save_selection(tmp_path, STATE, SEEN, settings=without)
    with pytest.raises(InvalidSettings, match=r"selection\.keep was '\(absent\)' there and is 4 now"):
        load_selection(tmp_path, target_rows=3, settings=SETTINGS)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save_file", full)
    with pytest.raises(InvalidInput, match=r"cannot write .*: No space left on device; free some space"):
        save_selection(tmp_path, STATE, SEEN, settings=SETTINGS)
