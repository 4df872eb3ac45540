"""Which rows each contender trains on: selections by the methods, over one store, and random draws."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tamis.budget import parse_budget
from tamis.comparison.contenders import slug
from tamis.data.rows import Rows
from tamis.errors import InvalidSettings, first_line
from tamis.identity import file_sha256, fingerprint
from tamis.model.processes import barrier
from tamis.protocols import Progress
from tamis.runs.select import select_from_settings
from tamis.seeds import child_seed, random_subset, random_uniform
from tamis.selection.choose import choose
from tamis.settings import SelectSettings
from tamis.settings.compare import CompareSettings, MethodText
from tamis.types import IntArray, TargetScores
from tamis.values import to_dict

__all__ = ["Chosen", "PoolTable", "select_rows"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a method selected, and at which price."""

    rows: IntArray  # pool rows, ascending
    folder: Path  # the selection's own, with its report
    tflops: float
    seconds: float
    warnings: tuple[str, ...]
    table: pa.Table  # scores.parquet


def select_rows(
    settings: CompareSettings,
    text: MethodText,
    budget: str,
    *,
    progress: Progress,
    held: Mapping[str, Rows],
    changed: Callable[[SelectSettings], SelectSettings] = lambda settings: settings,
) -> Chosen:
    """The selection of one method, made now or found made. All ranks call this together.

    ``changed`` may put other rows in place of those that ``settings`` name.

    Raises:
        InvalidSettings: the method weights its rows, which runs of a comparison do not.
    """
    own = to_dict(changed(settings.select_settings(text, budget=budget, out="-")))
    # A method with other settings has another folder, so that settings may change from call to call.
    known = {key: value for key, value in own.items() if key not in ("out", "store")}
    folder = Path(settings.out) / "selections" / f"{slug(text.label)}-{slug(budget)}-{fingerprint(known)[:8]}"
    if not _is_whole(folder):
        select_from_settings(
            changed(settings.select_settings(text, budget=budget, out=str(folder))), progress=progress, held=held
        )
    barrier()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    table = pq.read_table(folder / "scores.parquet")
    selected = np.flatnonzero(table["selected"].to_numpy()).astype(np.int64)
    if not bool((table["weight"].to_numpy()[selected] == 1).all()):
        raise InvalidSettings(
            f"{text.label} weights its rows, and runs of a comparison train on all rows alike; "
            f"leave --set {text.label}.weights out"
        )
    return Chosen(
        rows=selected,
        folder=folder,
        tflops=float(manifest["cost"]["total_tflops"]),
        seconds=float(manifest["cost"]["total_seconds"]),
        warnings=tuple(manifest["warnings"]),
        table=table,
    )


def _is_whole(folder: Path) -> bool:
    """Whether ``folder`` has a finished selection as it was written. One that is damaged is said, and made again."""
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))["files"]
        for name, digest in digests.items():
            path = folder / name
            if file_sha256(path) != digest:
                raise ValueError("it is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s); that selection is made again", path, first_line(error))
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class PoolTable:
    """The pool's rows as every selection sees them, for draws that no method makes."""

    tokens: IntArray
    source: Any  # (N,) names
    usable: Any  # (N,) bool: has something to learn, and is not left out as a leak
    first_of: IntArray | None  # the first copy of each row; None: copies are kept

    @classmethod
    def of(cls, table: pa.Table, settings: CompareSettings) -> PoolTable:
        """From any selection's scores."""
        usable = table["supervised_tokens"].to_numpy() > 0
        if settings.drop_leaks:
            usable &= ~table["leaked"].to_numpy()
        column = {"keep": None, "one": "duplicate_of", "near": "near_duplicate_of"}[settings.duplicates]
        first = None
        if column is not None:
            copies = table[column].to_numpy()
            first = np.where(copies < 0, np.arange(len(copies)), copies).astype(np.int64)
        return cls(
            tokens=table["tokens"].to_numpy().astype(np.int64),
            source=np.asarray(table["source"].to_pylist(), dtype=object),
            usable=usable,
            first_of=first,
        )

    def all_rows(self) -> IntArray:
        """What ``full`` trains on."""
        return np.flatnonzero(self.usable).astype(np.int64)

    def uniform(self, budget: str, *, seed: int) -> IntArray:
        """A blind draw within ``budget``, by the rules that hold for selections; ascending."""
        count = len(self.tokens)
        scores = TargetScores(
            rows=np.arange(count),
            values=random_uniform(child_seed(seed, "uniform"), count).astype(np.float32)[:, None],
            group=np.zeros(1, dtype=np.int64),
            target_names=("any",),
        )
        made = choose(
            scores, budget=parse_budget(budget), tokens=self.tokens, first_of=self.first_of, eligible=self.usable
        )
        return np.sort(made.order)

    def same_sources(self, rows: IntArray, *, seed: int) -> IntArray:
        """A blind draw with as many rows of each source as ``rows`` have; ascending."""
        first_of = np.arange(len(self.usable)) if self.first_of is None else self.first_of
        candidates, drawn = self.usable.copy(), []
        for source in sorted(set(self.source[rows]), key=str):
            own = np.flatnonzero(candidates & (self.source == source))
            _, places = np.unique(first_of[own], return_index=True)  # one of all copies that the source has
            own = own[np.sort(places)]
            wanted = min(int((self.source[rows] == source).sum()), len(own))
            drawn.append(own[random_subset(child_seed(seed, "same sources", str(source)), len(own), wanted)])
            candidates &= ~np.isin(first_of, first_of[drawn[-1]])  # other sources may have copies of these
        return np.sort(np.concatenate(drawn)).astype(np.int64)
