"""The selection's part of a Trainer's checkpoint, one file of tensors beside those that the Trainer writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tamis.errors import InvalidInput

__all__ = ["load_selection", "save_selection"]

_FILE = "tamis_selection.safetensors"
_TARGET_SEEN = "target_seen"  # in that file, beside what the step keeps there


def save_selection(folder: Path, state: Mapping[str, Tensor], target_seen: npt.NDArray[np.bool_]) -> None:
    """Write what the step remembers and which target rows choices have looked at."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file({**tensors, _TARGET_SEEN: torch.from_numpy(target_seen)}, folder / _FILE)


def load_selection(folder: Path, *, target_rows: int) -> tuple[dict[str, Tensor], npt.NDArray[np.bool_]]:
    """The inverse of ``save_selection``.

    Raises:
        InvalidInput: the checkpoint has none, is of another version, or of a run with other target rows.
    """
    path = folder / _FILE
    if not path.is_file():
        raise InvalidInput(
            f"{folder} has no {_FILE}, so it is no checkpoint of an online run; resume from one that has it, or start "
            "anew from its weights"
        )
    state = load_file(path)
    if _TARGET_SEEN not in state:
        raise InvalidInput(
            f"{path} does not say which target rows were looked at: an earlier version of tamis wrote it, and a run "
            "cannot go on exactly from there; resume with that version, or start anew from the checkpoint's weights"
        )
    seen: npt.NDArray[np.bool_] = state.pop(_TARGET_SEEN).numpy()
    if len(seen) != target_rows:
        raise InvalidInput(
            f"{folder} is of a run with {len(seen)} target rows and target_dataset has {target_rows}; resume with the "
            "same target_dataset"
        )
    return state, seen
