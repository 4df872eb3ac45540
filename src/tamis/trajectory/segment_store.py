"""Numbers of a run's steps, written segment by segment from the end, so that a killed pass goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tamis.disk import make_folder, replace_atomically
from tamis.errors import StoreCorrupted, first_line

__all__ = ["SegmentStore"]


class SegmentStore:
    """What a backward pass has done, in memory or in a folder.

    Args:
        folder: of this pass alone, and of one process at a time; None keeps everything in memory.

    Raises:
        StoreCorrupted: a file in it is missing or is not what was written; from every method.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._held = folder, dict[tuple[int, int], list[dict[str, Tensor]]]()
        self.reached: int | None = None  # all steps from here on are done
        if folder is not None:
            make_folder(folder)
            path = folder / "reached.json"
            if path.is_file():
                try:
                    self.reached = int(json.loads(path.read_text(encoding="utf-8"))["step"])
                except (ValueError, KeyError, TypeError, OSError) as error:
                    raise self._damaged(path, error) from error
            self._remove_states()  # of a run that was killed before it did

    def tensors(self, like: Tensor) -> dict[str, Tensor]:
        """The state that the pass goes on from, on the device of ``like``."""
        assert self._folder is not None
        if self.reached == 0:
            return {}
        found = self._load(f"state-{self.reached:08d}.safetensors")
        return {name: tensor.to(like.device) for name, tensor in found.items()}

    def write(self, start: int, stop: int, steps: list[dict[str, Tensor]], state: Mapping[str, Tensor]) -> None:
        """The numbers of a segment's steps and the state before it; the mark that it is done comes last."""
        if self._folder is None:
            self._held[start, stop] = steps
            return
        flat = {  # each its own memory: safetensors refuses two names of one tensor
            f"{i}.{name}": tensor.contiguous().clone() for i, step in enumerate(steps) for name, tensor in step.items()
        }
        replace_atomically(self._folder / f"scores-{start:08d}-{stop:08d}.safetensors", (save(flat),))
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        if start:  # also where it is empty (TracIn's): a pass that goes on reads it
            replace_atomically(self._folder / f"state-{start:08d}.safetensors", (save(own),))
        replace_atomically(self._folder / "reached.json", (json.dumps({"step": start}).encode(),))
        self.reached = start
        self._remove_states()  # only after the mark no longer needs them

    def all(self, parts: Sequence[tuple[int, int]]) -> dict[str, list[Tensor]]:
        """The numbers of all steps, by name, in the order of the steps."""
        found: dict[str, list[Tensor]] = {}
        for start, stop in parts:
            if self._folder is None:
                steps = self._held[start, stop]
            else:
                flat = self._load(f"scores-{start:08d}-{stop:08d}.safetensors")
                steps = [{} for _ in range(start, stop)]
                for key, tensor in flat.items():
                    number, _, name = key.partition(".")
                    steps[int(number)][name] = tensor
            for step in steps:
                for name, tensor in step.items():
                    found.setdefault(name, []).append(tensor)
        return found

    def _remove_states(self) -> None:
        """All but the one that the mark names; they are the largest files here."""
        assert self._folder is not None
        for state in self._folder.glob("state-*.safetensors"):
            if self.reached is None or state.name != f"state-{self.reached:08d}.safetensors":
                state.unlink(missing_ok=True)

    def _load(self, name: str) -> dict[str, Tensor]:
        assert self._folder is not None
        try:
            found: dict[str, Tensor] = load_file(self._folder / name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(self._folder / name, error) from error
        return found

    def _damaged(self, path: Path, error: Exception) -> StoreCorrupted:
        return StoreCorrupted(
            f"{path} cannot be read ({first_line(error)}); two processes may have written there at once: delete the "
            f"folder {self._folder} and run the same command again, which computes it anew"
        )
