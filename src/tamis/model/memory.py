"""When memory runs out: how allocators say it, and how large a forward pass may be from then on, also after a kill."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tamis.disk import disk_errors, replace_atomically
from tamis.errors import StoreCorrupted
from tamis.model.processes import rank

__all__ = ["TokenLimit", "default_batch_tokens", "free_memory", "is_out_of_memory"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens of a batch if nobody says how many: caches are small on a CPU, launches dear on an accelerator."""
    return 2048 if device.type == "cpu" else 16384


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated there now, about; None where nothing says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.is_file():
        return None
    values = dict(line.split(":", 1) for line in known.read_text(encoding="ascii").splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for PyTorch's own class and for the plain errors of its CPU and MPS allocators."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


class TokenLimit:
    """How many padded tokens a forward pass may have: fewer once memory has run out, from that piece of work on.

    Pieces (shards, updates) are numbered and done in order. Where batches are cut moves a number by rounding, so a
    resume has to cut them like the run that was killed: every fall is on disk before its piece is begun again, and a
    piece that is begun again is begun from its first batch.

    Args:
        tokens: the limit before any fall.
        folder: where falls are kept, and where those of earlier runs are found; None: only in memory.

    Raises:
        StoreCorrupted: what is found there is not what was written.
    """

    def __init__(self, tokens: int, folder: Path | None) -> None:
        self.tokens = tokens
        self._file = None if folder is None else folder / f"limits-{rank()}.json"
        self._own: list[tuple[int, int]] = []  # (piece, tokens from there on)
        self._others: list[tuple[int, int]] = []
        # Ranks may share out the pieces anew, so what one of them learned holds for all after a resume.
        for file in [] if folder is None else sorted(folder.glob("limits-*.json")):
            (self._own if file == self._file else self._others).extend(_read(file))

    def at(self, piece: int) -> int:
        """The limit for the batches of ``piece``."""
        return min([self.tokens, *(tokens for start, tokens in self._own + self._others if start <= piece)])

    def lower(self, piece: int, failed: int) -> None:
        """From ``piece`` on at most half of ``failed``, the padded tokens of a pass that did not fit.

        Call it outside the ``except`` block: while the error lives, so do the tensors of the pass that failed.

        Raises:
            InvalidInput: the fall cannot be written.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._own.append((piece, max(1, failed // 2)))
        if self._file is not None:
            with disk_errors(self._file.parent, doing="create folder"):
                self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(self._file, [json.dumps(self._own).encode()])
        logger.warning("out of memory with %d padded tokens; going on with %d", failed, self.at(piece))

    def within_memory(
        self,
        piece: int,
        compute: Callable[[], T],
        *,
        latest: Callable[[], tuple[int, int]],
        refuse: Callable[[], Exception],
    ) -> T:
        """What ``compute`` gives, begun again with a lower limit as often as memory runs out.

        Args:
            piece: what is computed, which goes through batches of at most ``at(piece)`` padded tokens.
            compute: called once more for every fall.
            latest: rows and padded tokens of the batch that did not fit.
            refuse: the error to raise if that was a single row.
        """
        while True:
            try:
                return compute()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                rows, tokens = latest()
                if rows < 2:
                    raise refuse() from error
            self.lower(piece, tokens)


def _read(file: Path) -> list[tuple[int, int]]:
    try:
        with disk_errors(file, doing="read"):
            text = file.read_text(encoding="utf-8")
        return [(int(piece), int(tokens)) for piece, tokens in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise StoreCorrupted(
            f"{file} is not what was written; delete the folder {file.parent} and run again to recompute"
        ) from error
