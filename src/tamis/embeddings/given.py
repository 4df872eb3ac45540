"""Embeddings that somebody else computed: a folder of vectors and the ids of the rows that they belong to."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tamis.disk import disk_errors, make_folder, replace_atomically
from tamis.errors import InvalidInput, InvalidSettings, NonFinite, first_line
from tamis.identity import file_sha256
from tamis.maths.similarity import unit_rows

__all__ = ["Given", "save_embeddings"]

_IDS = "ids.json"
# A file written so lately may be written again without a clock of the file system noticing.
_FRESH_NS = 2 * 10**9
_FILES = ("embeddings.npy", "embeddings.safetensors")


@dataclass(frozen=True, kw_only=True)
class Given:
    """Vectors from a folder with ``ids.json``, a list of row ids, and one row per id in the same order in
    ``embeddings.npy`` or in the tensor ``embeddings`` of ``embeddings.safetensors``.

    Rows are found by their id, never by their place. The folder may hold more rows than a run asks for: one folder can
    serve pool and target, if no id stands for two different rows.

    Args:
        path: the folder; :func:`save_embeddings` writes one from an array.
    """

    name: ClassVar[str] = "given"
    path: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise InvalidSettings(f"embedding 'given' needs path, a folder with {_IDS} and {' or '.join(_FILES)}")

    @property
    def identity(self) -> dict[str, Any]:
        """SHA-256 of the two files.

        Raises:
            InvalidInput: one of them is not there.
        """
        vectors = self._file
        return {"algorithm": "given-v1", "vectors": _sha256(vectors), "ids": _sha256(vectors.with_name(_IDS))}

    def rows(self, ids: Sequence[str]) -> Float[Tensor, "n d"]:
        """The vectors of these rows, in this order, scaled to length 1.

        Raises:
            InvalidInput: the folder is not as described, or lacks a row.
            NonFinite: a vector has NaN or infinite entries.
        """
        if missing := self.missing(ids):
            shown = ", ".join(repr(id) for id in missing[:3])
            raise InvalidInput(
                f"{self.path} has no embedding for {len(missing)} of {len(ids)} rows (first: {shown}); compute them, "
                f"or write the rows' own ids into {_IDS}"
            )
        taken = np.array([self._places[id] for id in ids], np.int64)
        values = torch.from_numpy(np.ascontiguousarray(self._vectors[taken]))
        good = torch.isfinite(values).all(dim=1)
        if not bool(good.all()):
            bad = int((~good).nonzero()[0])
            raise NonFinite(f"{self._file}: the embedding of row {ids[bad]!r} has NaN or infinite entries")
        return unit_rows(values).float()

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of these rows that the folder has no vector for; no vector is read.

        Raises:
            InvalidInput: the folder is not as described.
        """
        return [id for id in ids if id not in self._places]

    @cached_property
    def _file(self) -> Path:
        folder = Path(self.path)
        found = [folder / name for name in _FILES if (folder / name).is_file()]
        if not (folder / _IDS).is_file() or len(found) != 1:
            raise InvalidInput(f"{folder} must hold {_IDS} and one of {' and '.join(_FILES)}")
        return found[0]

    @cached_property
    def _vectors(self) -> npt.NDArray[Any]:
        try:
            if self._file.suffix == ".npy":
                values: npt.NDArray[Any] = np.load(self._file, mmap_mode="r", allow_pickle=False)
            else:
                with safe_open(self._file, framework="pt") as file:
                    tensor = file.get_tensor("embeddings")
                values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        except (OSError, ValueError, SafetensorError) as error:
            raise InvalidInput(f"{self._file} cannot be read: {first_line(error)}") from error
        if values.ndim != 2 or values.dtype.kind != "f" or not values.shape[1]:
            raise InvalidInput(
                f"{self._file} holds {values.dtype} of shape {values.shape}; expected floating-point (rows, numbers)"
            )
        return values

    @cached_property
    def _places(self) -> dict[str, int]:
        file = Path(self.path) / _IDS
        rows = len(self._vectors)
        try:
            ids = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InvalidInput(f"{file} is not valid JSON: {error}") from error
        if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
            raise InvalidInput(f"{file} must hold a list of row ids, all strings")
        if len(ids) != rows:
            raise InvalidInput(f"{file} names {len(ids)} rows but {self._file.name} holds {rows}; they must be equal")
        places = {id: place for place, id in enumerate(ids)}
        if len(places) != rows:
            twice = next(id for place, id in enumerate(ids) if places[id] != place)
            raise InvalidInput(f"{file} names row {twice!r} more than once; an id must stand for one row")
        return places


def _sha256(file: Path) -> str:
    """Read once in a process, as long as the file is not written: a run asks for it at every stage."""
    found = file.stat()
    if time.time_ns() - found.st_mtime_ns < _FRESH_NS:
        return file_sha256(file)
    return _sha256_of_state(file.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=32)
def _sha256_of_state(file: Path, size: int, modified: int, inode: int) -> str:
    return file_sha256(file)


def save_embeddings(folder: str | Path, ids: Sequence[str], values: npt.ArrayLike) -> None:
    """Write an array, one row per id, as a folder that ``Given`` reads.

    Raises:
        InvalidInput: ids and rows differ in number, the array is not of two axes, or the folder cannot be written.
    """
    array = np.asarray(values, np.float32)
    if array.ndim != 2 or len(array) != len(ids):
        raise InvalidInput(f"got {len(ids)} ids for an array of shape {array.shape}; expected one row per id")
    folder = Path(folder)
    make_folder(folder)
    with disk_errors(folder / _FILES[0]):
        np.save(folder / _FILES[0], array)
    replace_atomically(folder / _IDS, (json.dumps(list(ids)).encode(),))
