"""The fate of every candidate, as Parquet files that are only ever added: one row per candidate and choice.

Rows are written in parts, each of whole updates, under a temporary name first: a killed run leaves complete parts and
nothing else. A run that resumes takes back the parts of updates it is going to repeat; a new one takes back nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tamis.errors import InvalidInput, StoreCorrupted, first_line
from tamis.online.proposal import Proposal
from tamis.types import IntArray

__all__ = ["CandidateLog", "read_candidates", "refuse_earlier_parts"]

_PART = re.compile(r"part-(\d{8})-(\d{8})\.parquet")

_FROM_THE_START = "only a run from the start writes it again: train into another folder, or delete this run's"

_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # the update, from 1
        ("choice", pa.int64()),  # choices of the run, from 0; several to an update with gradient accumulation
        ("row", pa.int64()),  # position in the training data
        ("source", pa.string()),
        ("tokens", pa.int32()),  # supervised
        ("loss", pa.float32()),  # null if it was not computed
        ("alignment", pa.float64()),  # b; null if it was not measured
        ("kept", pa.bool_()),
        ("weight", pa.float64()),  # 0 if not kept
        ("dropped", pa.bool_()),  # loss or gradient not finite
        ("cold", pa.bool_()),  # a uniform choice before the method started
    ]
)


class CandidateLog:
    """Collects proposals and writes them as parts.

    Args:
        folder: where the parts go.
        first_step: the update that comes next; parts from it on are of a run that was given up, and are removed.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._folder = folder
        self._tables: list[pa.Table] = []
        self._first: int | None = None
        self._last = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                match = _PART.fullmatch(path.name)
                if path.suffix == ".partial" or (match and int(match.group(1)) >= first_step):
                    path.unlink()
        except OSError as error:
            raise InvalidInput(
                f"cannot write the fate of candidates to {folder}: {error.strerror or error}; choose another folder"
            ) from error

    def add(self, proposal: Proposal, *, step: int, choice: int, rows: IntArray, sources: Sequence[str | None]) -> None:
        """Remember what became of the candidates of one choice."""
        n = len(rows)
        weights, kept, dropped = [0.0] * n, [False] * n, [False] * n
        for row, weight in zip(proposal.choice.rows.tolist(), proposal.choice.weights.tolist(), strict=True):
            weights[row], kept[row] = weight, True
        for row in proposal.dropped.tolist():
            dropped[row] = True
        alignments = [None] * n if proposal.alignments is None else proposal.alignments.tolist()
        columns = {
            "step": [step] * n,
            "choice": [choice] * n,
            "row": rows.tolist(),
            "source": list(sources),
            "tokens": proposal.tokens.tolist(),
            "loss": [_known(value) for value in proposal.losses.tolist()],
            "alignment": [_known(value) for value in alignments],
            "kept": kept,
            "weight": weights,
            "dropped": dropped,
            "cold": [proposal.cold] * n,
        }
        self._tables.append(pa.Table.from_pydict(columns, schema=_SCHEMA))
        self._first = step if self._first is None else self._first
        self._last = step

    def flush(self) -> None:
        """Write what was added since, if anything; call between updates only."""
        if self._first is None:
            return
        path = self._folder / f"part-{self._first:08d}-{self._last:08d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(pa.concat_tables(self._tables), partial)
        partial.replace(path)
        self._tables, self._first = [], None


def refuse_earlier_parts(folder: Path) -> None:
    """Refuse to start a new run where the log of another one lies.

    Raises:
        InvalidInput: ``folder`` has parts.
    """
    if folder.is_dir() and any(_PART.fullmatch(path.name) for path in folder.iterdir()):
        raise InvalidInput(
            f"{folder} holds the candidates of an earlier run, which a new one would overwrite; choose another "
            "output_dir, move that folder away, resume from a checkpoint, or set log_candidates=False"
        )


def read_candidates(folder: Path) -> pa.Table:
    """All parts of ``folder``, in the order of updates.

    Raises:
        InvalidInput: there is none.
        StoreCorrupted: one is damaged, or one before the last is not there.
    """
    names = sorted(path.name for path in folder.glob("part-*.parquet"))
    parts = [part for name in names if (part := _PART.fullmatch(name))]
    if not parts:
        raise InvalidInput(f"{folder} holds no candidates; give the folder 'candidates' of an online run's output")
    coming = 1
    for part in parts:
        if int(part[1]) != coming:
            raise StoreCorrupted(f"{folder} has nothing of update {coming}, but of later ones; {_FROM_THE_START}")
        coming = int(part[2]) + 1
    return pa.concat_tables([_part(folder / part[0]) for part in parts])


def _part(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreCorrupted(f"{path} cannot be read ({first_line(error)}); {_FROM_THE_START}") from error


def _known(value: float | None) -> float | None:
    return None if value is None or value != value else value
