"""A recorded run on disk: the format, how it is written and how it is read.

``manifest.json`` says what was trained and how; ``states/<step>.safetensors`` are parameters and moments before a step;
``segments/<first>-<stop>.safetensors`` are the steps between two states, with the rows that they were the first to
use. A segment appears whole and after the state at its end, so a killed run leaves a log that ends at a state.
``end.json`` says that training ended. ``positions.safetensors``, which comes last, says where each row stands in the
training data. ``examples.parquet`` has what the user calls those rows, if that is known. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tamis.disk import disk_errors, make_folder, replace_atomically
from tamis.errors import InvalidInput, StoreCorrupted, StoreMismatch, first_line
from tamis.trajectory.run import State
from tamis.trajectory.token_rows import TokenRow
from tamis.types import IntArray

__all__ = [
    "EXAMPLES",
    "LOG_VERSION",
    "LogReader",
    "LogWriter",
    "LoggedMicro",
    "LoggedStep",
    "mark_finished",
    "read_manifest",
]

LOG_VERSION = 1
EXAMPLES = "examples.parquet"  # the user's rows, by position in the training data
_MANIFEST, _END, _POSITIONS = "manifest.json", "end.json", "positions.safetensors"
_STATE = re.compile(r"(\d{8,})\.safetensors")
_SEGMENT = re.compile(r"(\d{8,})-(\d{8,})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class LoggedMicro:
    """One forward pass of a step."""

    rows: IntArray  # (n,) numbers of rows that carry loss
    weights: tuple[float, ...]  # what each row's mean loss counts in the update's loss
    loss: float  # sum of weighted losses
    width: int  # columns that the batch had
    random_state: Mapping[str, Tensor]  # before the pass; empty without dropout


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """One update."""

    micros: tuple[LoggedMicro, ...]
    rates: tuple[float, ...]  # of each parameter group, in this step
    norm: float  # of the gradient that the optimizer was given


class LogWriter:
    """Writes a run's log; ``open_new`` and ``open_again`` make one."""

    def __init__(self, folder: Path, rows: dict[bytes, int]) -> None:
        self._folder, self._numbers = folder, rows
        self._new: list[TokenRow] = []
        self._first_new = len(rows)

    @classmethod
    def open_new(cls, folder: Path, manifest: Mapping[str, Any], state: State) -> LogWriter:
        """Begin a log; of a run with an owner, in place of one that the same run began and did not finish.

        Raises:
            InvalidInput: the folder holds a log already, or files that are of no log, or cannot be written.
        """
        _refuse_foreign(folder)
        if (folder / _MANIFEST).exists():
            same = read_manifest(folder) == json.loads(json.dumps(manifest))
            if not (manifest.get("owner") and same and not (folder / _END).exists()):
                raise InvalidInput(
                    f"{folder} holds a recorded run already; choose another folder, or resume that run from its "
                    "checkpoint"
                )
            with disk_errors(folder, doing="remove"):
                (folder / _POSITIONS).unlink(missing_ok=True)
                (folder / _MANIFEST).unlink()
        with disk_errors(folder, doing="remove"):
            for path in (*(path for _, _, path in _segments(folder)), *(path for _, path in _states(folder))):
                path.unlink()  # of a run that was killed before it said what it is
        for part in ("states", "segments"):
            make_folder(folder / part)
        found = cls(folder, {})
        found.write_state(0, state)
        _write_json(folder / _MANIFEST, manifest)
        return found

    @classmethod
    def open_again(
        cls, folder: Path, manifest: Mapping[str, Any], step: int, *, state: State | None = None
    ) -> LogWriter:
        """Go on with a log from ``step``, where its trainer resumes; what it has of later steps is taken back.

        ``state`` is what training goes on from; None if that is the log's own.

        Raises:
            StoreMismatch: it was begun by another run, or has no state at that step or another one.
        """
        reader = LogReader(folder)
        for name in ("trained", "dtype", "autocast", "dropout", "groups", "kind", "clip", "frozen", "model", "owner"):
            if reader.manifest.get(name) != json.loads(json.dumps(manifest.get(name))):
                raise StoreMismatch(
                    f"{folder} was recorded from another run: its {name} differs; resume with the same model, "
                    "optimizer and precision, or record into another folder"
                )
        if step not in reader.bounds:
            raise StoreMismatch(
                f"training goes on from update {step} and {folder} has the run up to update {reader.bounds[-1]}"
                f"{'' if reader.bounds[-1] < step else ' without a state there'}; resume from a checkpoint that was "
                "saved while the recorder was on, or record a new run into another folder"
            )
        if state is not None:
            own = reader.state(step)
            if not torch.equal(own.theta, state.theta.cpu()):
                raise StoreMismatch(
                    f"{folder} has other parameters at update {step} than training goes on from: it is the record of "
                    "another run with the same model and optimizer; record into another folder"
                )
            pairs = zip(own.moments, state.moments, strict=True)
            if own.count != state.count or not all(torch.equal(mine, other.cpu()) for mine, other in pairs):
                raise StoreMismatch(
                    f"{folder} has another state of the optimizer at update {step} than training goes on from (was the "
                    "checkpoint saved without it, by save_only_model?); resume from a whole checkpoint, or record into "
                    "another folder"
                )
        with disk_errors(folder, doing="remove"):
            (folder / _END).unlink(missing_ok=True)
            (folder / _POSITIONS).unlink(missing_ok=True)
            # The last ones first: killed in between, the log is a shorter one, without a gap.
            for first, _, path in reversed(_segments(folder)):
                if first >= step:
                    path.unlink()
            for at, path in _states(folder):
                if at > step:
                    path.unlink()
        kept = LogReader(folder)
        return cls(folder, {row.digest(): number for number, row in enumerate(kept.rows())})

    def number_of(self, row: TokenRow) -> int:
        """The row's number: by first use."""
        digest = row.digest()
        if digest not in self._numbers:
            self._numbers[digest] = len(self._numbers)
            self._new.append(row)
        return self._numbers[digest]

    def write_state(self, step: int, state: State) -> None:
        """Parameters and moments before ``step``."""
        tensors = {"theta": state.theta, **{f"moment{i}": moment for i, moment in enumerate(state.moments)}}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        tensors["count"] = torch.tensor(state.count)
        replace_atomically(self._folder / "states" / f"{step:08d}.safetensors", (save(tensors),))

    def write_segment(self, first: int, steps: Sequence[LoggedStep], state: State) -> None:
        """The steps from ``first``, and the state after them."""
        stop = first + len(steps)
        self.write_state(stop, state)
        micros = [micro for step in steps for micro in step.micros]
        tensors = {
            "row_lengths": _ints([len(row.ids) for row in self._new]),
            "ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *(row.ids for row in self._new)])),
            "supervised": torch.from_numpy(
                np.concatenate([np.zeros(0, np.bool_), *(row.supervised for row in self._new)])
            ),
            "first_row": _ints([self._first_new]),
            "micros": _ints([len(step.micros) for step in steps]),
            "rates": torch.tensor([step.rates for step in steps], dtype=torch.float64),
            "norms": torch.tensor([step.norm for step in steps], dtype=torch.float64),
            "micro_sizes": _ints([len(micro.rows) for micro in micros]),
            "widths": _ints([micro.width for micro in micros]),
            "losses": torch.tensor([micro.loss for micro in micros], dtype=torch.float64),
            "rows": _ints([int(row) for micro in micros for row in micro.rows]),
            "weights": torch.tensor([w for micro in micros for w in micro.weights], dtype=torch.float64),
        }
        for number, micro in enumerate(micros):
            for device, numbers in micro.random_state.items():
                tensors[f"random.{device}.{number}"] = numbers
        replace_atomically(self._folder / "segments" / f"{first:08d}-{stop:08d}.safetensors", (save(tensors),))
        self._new, self._first_new = [], len(self._numbers)

    @property
    def known(self) -> Mapping[bytes, int]:
        """All rows so far, by digest."""
        return self._numbers

    def finish(self, steps: int) -> None:
        """Training has ended."""
        _write_json(self._folder / _END, {"steps": steps, "rows": len(self._numbers)})

    def write_positions(self, positions: Sequence[int]) -> None:
        """Where each row stands in the training data, -1 for unknown."""
        replace_atomically(self._folder / _POSITIONS, (save({"position": _ints(positions)}),))


def mark_finished(folder: Path, positions: Mapping[bytes, int]) -> None:
    """Say of a log that its run has ended and where its rows stand, if it does not; for runs killed before they did.

    ``positions`` has where each row stands in the training data, by digest.
    """
    reader = LogReader(folder)
    if not reader.is_finished:
        rows = {row.digest(): number for number, row in enumerate(reader.rows())}
        writer = LogWriter(folder, rows)
        writer.finish(reader.bounds[-1])
        writer.write_positions([positions.get(digest, -1) for digest in rows])


class LogReader:
    """Reads a run's log.

    Raises:
        InvalidInput: the folder holds no recorded run, or one of another version.
        StoreCorrupted: a part between two others is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._paths = _segments(folder)
        self.bounds = [0]
        for first, stop, path in self._paths:
            if first != self.bounds[-1]:
                raise StoreCorrupted(f"{path} follows update {self.bounds[-1]}: the log lacks the updates between them")
            self.bounds.append(stop)
        end = folder / _END
        try:
            self.end: dict[str, Any] | None = json.loads(end.read_text(encoding="utf-8")) if end.is_file() else None
        except ValueError as error:
            raise StoreCorrupted(f"{end} cannot be read ({first_line(error)}); record the run again") from error
        self._loaded: tuple[int, list[LoggedStep]] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be written: the run has ended, and its rows were looked for in the data."""
        return self.end is not None and (self.folder / _POSITIONS).is_file()

    def require_complete(self) -> None:
        """Refuse a run that did not come to its end, or never began.

        Raises:
            InvalidInput: that is so.
        """
        if self.end is None or self.end["steps"] != self.bounds[-1]:
            wanted = self.manifest["planned"] if self.end is None else self.end["steps"]
            raise InvalidInput(
                f"{self.folder} is not a whole run: its log ends at update {self.bounds[-1]} of {wanted}; wait for the "
                "training's end if it still goes on, or resume it from its last checkpoint with the recorder on"
            )
        if self.end["steps"] == 0:
            raise InvalidInput(f"{self.folder} is the record of a run that made no update; record one that trains")

    def state(self, step: int) -> State:
        """The state before ``step``."""
        tensors = _load(self.folder / "states" / f"{step:08d}.safetensors")
        moments = tuple(tensors[f"moment{i}"] for i in range(len(tensors) - 2))
        return State(theta=tensors["theta"], moments=moments, count=int(tensors["count"]))

    def step(self, index: int) -> LoggedStep:
        """The step ``index``; its whole segment is kept until another is asked for."""
        place = next(i for i, (first, stop, _) in enumerate(self._paths) if first <= index < stop)
        if self._loaded is None or self._loaded[0] != place:
            self._loaded = (place, _steps_of(_load(self._paths[place][2])))
        return self._loaded[1][index - self._paths[place][0]]

    def positions(self) -> IntArray:
        """Where each row first stands in the training data; -1 where that is not known."""
        if self.end is not None and not self.is_finished:  # killed between the two
            return np.full(self.end["rows"], -1, dtype=np.int64)
        found: IntArray = _load(self.folder / _POSITIONS)["position"].numpy()
        return found

    def rows(self) -> list[TokenRow]:
        """All rows by number."""
        found: list[TokenRow] = []
        for _, _, path in self._paths:
            tensors = _load(path)
            if int(tensors["first_row"][0]) != len(found):
                raise StoreCorrupted(f"{path} begins with row {int(tensors['first_row'][0])}, {len(found)} were before")
            lengths = tensors["row_lengths"].tolist()
            ids, supervised = (torch.split(tensors[name], lengths) for name in ("ids", "supervised"))
            found += [TokenRow(ids=i.numpy(), supervised=s.numpy()) for i, s in zip(ids, supervised, strict=True)]
        return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a recorded run says of itself.

    Raises:
        InvalidInput: there is none, or of a version that this one cannot read.
    """
    path = folder / _MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{folder} holds no recorded run ({_MANIFEST}: {error}); record one first") from error
    if "trained" not in found:
        raise InvalidInput(
            f"{folder} holds no recorded run: its {_MANIFEST} is of something else; give the folder that `tamis train` "
            "was given as --record, not its --out"
        )
    if found.get("version") != LOG_VERSION:
        raise InvalidInput(
            f"{path} is of version {found.get('version')!r} and this tamis reads recorded runs of version {LOG_VERSION}"
        )
    return found


def _steps_of(tensors: Mapping[str, Tensor]) -> list[LoggedStep]:
    sizes = tensors["micro_sizes"].tolist()
    rows, weights = (torch.split(tensors[name], sizes) for name in ("rows", "weights"))
    micros = []
    for number, size in enumerate(sizes):
        random = {
            key.split(".")[1]: value
            for key, value in tensors.items()
            if key.startswith("random.") and key.endswith(f".{number}")
        }
        micros.append(
            LoggedMicro(
                rows=rows[number].numpy()[:size],
                weights=tuple(weights[number].tolist()),
                loss=float(tensors["losses"][number]),
                width=int(tensors["widths"][number]),
                random_state=random,
            )
        )
    found, at = [], 0
    for number, count in enumerate(tensors["micros"].tolist()):
        found.append(
            LoggedStep(
                micros=tuple(micros[at : at + count]),
                rates=tuple(tensors["rates"][number].tolist()),
                norm=float(tensors["norms"][number]),
            )
        )
        at += count
    return found


def _segments(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    for path in (folder / "segments").glob("*.safetensors"):
        match = _SEGMENT.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def _states(folder: Path) -> list[tuple[int, Path]]:
    matches = [(_STATE.fullmatch(path.name), path) for path in (folder / "states").glob("*.safetensors")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder for a new log where something lies that no log made. Hidden files may."""
    manifest = folder / _MANIFEST
    if folder.is_dir() and not manifest.exists():
        strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        strangers = [name for name in strangers if name not in ("states", "segments", EXAMPLES)]
        if strangers:
            raise InvalidInput(
                f"{folder} is not empty and holds no recorded run (but {', '.join(strangers[:3])}); record into a new "
                "or an empty folder"
            )
    found = list[Path]()
    if manifest.exists() and not _is_of_log(manifest):
        found.append(manifest)
    for place, own in (("states", _STATE), ("segments", _SEGMENT)):
        names_there = sorted(path.name for path in (folder / place).glob("*"))
        found += [folder / place / name for name in names_there if not (own.fullmatch(name) or name.startswith("."))]
    if found:
        raise InvalidInput(f"{found[0]} is not of a recorded run that could be replaced; record into another folder")


def _is_of_log(manifest: Path) -> bool:
    try:
        return "trained" in json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StoreCorrupted(f"{path} cannot be read ({error}); record the run again") from error


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_atomically(path, ((json.dumps(value, indent=1, sort_keys=True) + "\n").encode(),))
