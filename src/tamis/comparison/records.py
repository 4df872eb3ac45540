"""Finished training runs, one file each, written whole or not at all: every number of a verdict comes from these."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tamis.disk import make_folder, replace_atomically
from tamis.errors import StoreCorrupted
from tamis.identity import text_sha256

__all__ = ["Records", "Run", "write_rows", "write_runs"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, measured."""

    key: str  # its file's name
    contender: str
    budget: str
    seed: int
    steps: int  # updates
    rows: int  # that it trained on, each counted once
    seen_rows: int  # over all updates
    tokens: int  # over all updates
    supervised_tokens: int
    tflops: float  # of the run, without a selection made before it
    train_seconds: float
    measure_seconds: float
    loss: float  # mean over the held-out rows
    exact_match: float | None  # share of the held-out rows; None where no answer was generated
    row_losses: tuple[float, ...]  # of each held-out row, in their order
    row_matches: tuple[bool, ...]
    answers: tuple[str, ...]  # as generated
    warnings: tuple[str, ...]  # of the training run
    spec: Mapping[str, Any]  # everything that determines the run
    tasks: Mapping[str, float] = field(default_factory=dict)  # of lm-evaluation-harness, by task and metric
    choosing_tflops: float = 0.0  # of ``tflops``: what an online method spends beside the updates on the rows it keeps

    def value(self, metric: str) -> float:
        """``loss`` or ``exact-match``."""
        if metric == "loss":
            return self.loss
        assert self.exact_match is not None
        return self.exact_match

    def row_values(self, metric: str) -> npt.NDArray[np.float64]:
        """The same for each held-out row."""
        return np.asarray(self.row_losses if metric == "loss" else self.row_matches, dtype=np.float64)


class Records:
    """The finished runs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def path(self, key: str) -> Path:
        """Where a run's record is, or will be."""
        return self.folder / f"{key}.json"

    def has(self, key: str) -> bool:
        """Whether the run is finished."""
        return self.path(key).is_file()

    def read(self, key: str) -> Run:
        """A finished run.

        Raises:
            StoreCorrupted: its file is not what was written.
        """
        path = self.path(key)
        try:
            values = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
            seal = values.pop("sha256", None)  # not in records of earlier versions
            if seal not in (None, _seal(values)):
                raise ValueError("it is not what was written")
            for name in ("row_losses", "row_matches", "answers", "warnings"):
                values[name] = tuple(values[name])
            return Run(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreCorrupted(f"{path}: {error}; delete it to repeat that run, then run the same command") from error

    def write(self, run: Run) -> None:
        """Keep a finished run."""
        values = {**vars(run), "spec": dict(run.spec)}
        if not run.tasks:  # records of comparisons without tasks read as ever
            del values["tasks"]
        text = json.dumps({**values, "sha256": _seal(values)}, indent=1, ensure_ascii=False) + "\n"
        replace_atomically(self.path(run.key), (text.encode("utf-8", errors="surrogatepass"),))


def _seal(values: Mapping[str, Any]) -> str:
    """Over everything but the times, which alone may differ between two runs of one key."""
    kept = {name: value for name, value in values.items() if not name.endswith("_seconds")}
    return text_sha256(json.dumps(json.loads(json.dumps(kept)), sort_keys=True))


_COLUMNS = (
    *("key", "contender", "budget", "seed", "steps", "rows", "seen_rows", "tokens", "supervised_tokens"),
    *("tflops", "choosing_tflops", "train_seconds", "measure_seconds", "loss", "exact_match"),
)


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """One line a run, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for run in runs:
        writer.writerow([_written(getattr(run, name)) for name in _COLUMNS])
    replace_atomically(path, (text.getvalue().encode("utf-8"),))


def write_rows(path: Path, runs: Sequence[Run], *, tasks: Sequence[str], ids: Sequence[str]) -> None:
    """One line a run and held-out row, as Parquet: what the tests over rows are made of."""
    count = len(ids)
    matched = [run.row_matches or (None,) * count for run in runs]
    table = pa.table(
        {
            "key": pa.array([run.key for run in runs for _ in range(count)], type=pa.string()).dictionary_encode(),
            "task": pa.array(list(tasks) * len(runs), type=pa.string()).dictionary_encode(),
            "row": pa.array(list(ids) * len(runs), type=pa.string()).dictionary_encode(),
            "loss": pa.array([loss for run in runs for loss in run.row_losses], type=pa.float64()),
            "exact_match": pa.array([match for line in matched for match in line], type=pa.bool_()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    replace_atomically(path, (sink.getvalue().to_pybytes(),))


def _written(value: Any) -> Any:
    return "" if value is None else value
