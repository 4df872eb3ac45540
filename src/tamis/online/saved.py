"""The selection's part of a Trainer's checkpoint, one file of tensors beside those that the Trainer writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tamis.disk import disk_errors
from tamis.errors import InvalidInput, InvalidSettings, first_line
from tamis.online.methods.choice import Method
from tamis.online.settings import StepSettings

__all__ = ["load_selection", "save_selection", "selection_settings"]

_FILE = "tamis_selection.safetensors"
_TARGET_SEEN = "target_seen"  # in that file, beside what the step keeps there
_SETTINGS = "settings"  # in that file's metadata
_METHOD = "selection"
_ABSENT = "(absent)"


def selection_settings(method: Method, settings: StepSettings, **others: int) -> dict[str, Any]:
    """What a resumed run must have alike, by the name that the user knows; ``others`` stand beside the two."""
    own = {f"{_METHOD}.{name}": value for name, value in _fields(method).items()}
    steps = {f"step_settings.{name}": value for name, value in _fields(settings).items()}
    found = {_METHOD: method.name, **own, **steps, **others}
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in found.items()}
    # What JSON gives back as it was; a method of the user's own may have other fields.
    return {
        name: value for name, value in found.items() if value is None or isinstance(value, bool | int | float | str)
    }


def save_selection(
    folder: Path, state: Mapping[str, Tensor], target_seen: npt.NDArray[np.bool_], *, settings: Mapping[str, Any]
) -> None:
    """Write what the step remembers, which target rows choices have looked at, and by which settings.

    Raises:
        InvalidInput: the file cannot be written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    tensors[_TARGET_SEEN] = torch.from_numpy(target_seen)
    path = folder / _FILE
    with disk_errors(path):
        save_file(tensors, path, metadata={_SETTINGS: json.dumps(settings)})


def load_selection(
    folder: Path, *, target_rows: int, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], npt.NDArray[np.bool_]]:
    """The inverse of ``save_selection``.

    Raises:
        InvalidInput: the checkpoint has none, or a damaged one, or is of a run with other target rows.
        InvalidSettings: it is of a run with other ``settings``.
    """
    path = folder / _FILE
    if not path.is_file():
        raise InvalidInput(
            f"{folder} has no {_FILE}, so it is no checkpoint of an online run; resume from one that has it, or start "
            "anew from its weights"
        )
    try:
        with disk_errors(path, doing="read"):
            _check_settings(path, settings)
            state = load_file(path)
    except SafetensorError as error:
        raise InvalidInput(
            f"{path} is damaged ({first_line(error)}); resume from another checkpoint of the run"
        ) from error
    if _TARGET_SEEN not in state:
        raise _incomplete(path, "which target rows were looked at")
    seen: npt.NDArray[np.bool_] = state.pop(_TARGET_SEEN).numpy()
    if len(seen) != target_rows:
        raise InvalidInput(
            f"{folder} is of a run with {len(seen)} target rows and target_dataset has {target_rows}; resume with the "
            "same target_dataset"
        )
    return state, seen


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    with safe_open(path, framework="pt") as file:
        found = (file.metadata() or {}).get(_SETTINGS)
    if found is None:
        raise _incomplete(path, "by which settings it was made")
    there = json.loads(found)
    pairs = {name: (there.get(name, _ABSENT), settings.get(name, _ABSENT)) for name in {**settings, **there}}
    names = [name for name, (was, now) in pairs.items() if was != now]
    if _METHOD in names:  # settings of two methods cannot be compared
        names = [name for name in names if not name.startswith(f"{_METHOD}.")]
    if names:
        differing = ", ".join(f"{name} was {pairs[name][0]!r} there and is {pairs[name][1]!r} now" for name in names)
        raise InvalidSettings(
            f"{path.parent} is a checkpoint of another run: {differing}; resume with the settings it was made with, or "
            "start anew from its weights"
        )


def _incomplete(path: Path, what: str) -> InvalidInput:
    return InvalidInput(
        f"{path} is damaged, or another program wrote it: it does not say {what}; resume from another checkpoint of "
        "the run, or start anew from this one's weights"
    )


def _fields(of: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(of)] if dataclasses.is_dataclass(of) else []
    return {name: getattr(of, name) for name in names}
