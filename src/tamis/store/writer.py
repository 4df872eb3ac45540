"""Writing a stage: plan first, shards in any order and by any process, manifest last. Safe to kill at any instant."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tamis import __version__
from tamis.disk import TEMPORARY_SUFFIX, disk_errors, replace_atomically
from tamis.errors import StoreMismatch
from tamis.identity import canonical_json, fingerprint
from tamis.store.manifest import (
    FORMAT,
    MANIFEST_FILE,
    PLAN_FILE,
    ShardRecord,
    StageManifest,
    StagePlan,
    TensorRecord,
    read_manifest,
    read_plan,
    refuse_other_spec,
    stage_path,
    write_manifest,
    write_plan,
)
from tamis.store.shards import Column, ShardHeader, encode_shard, read_header

__all__ = ["StageWriter"]

logger = logging.getLogger(__name__)


class StageWriter:
    """One stage of work on disk, opened to be continued.

    Opening writes ``plan.json``, or reads the one that is there: a resume then takes its ``shard_rows`` and ``fixed``
    from disk, whatever is passed here. Several processes may open the same stage; each shard must be written by one
    of them only.

    Args:
        root: the store's folder; created if needed.
        name: what the stage is, the readable half of its folder's name.
        spec: everything that determines the numbers, as plain JSON.
        num_rows: rows of the finished stage.
        shard_rows: rows per shard; what one kill can cost.
        fixed: what has to be decided once but does not change the numbers beyond rounding.
        rows_digest: which rows in which order, if ``spec`` does not say it.

    Raises:
        StoreMismatch: the folder holds a stage of another spec; the message names the first field that differs.
        StoreCorrupted: its plan is not what was written.
        InvalidInput: the folder cannot be written.

    Example:
        >>> writer = StageWriter(Path("store"), "features", {"seed": 0}, num_rows=1000, shard_rows=256)
        >>> for shard in writer.missing_shards():
        ...     start, stop = writer.shard_range(shard)
        ...     writer.write_shard(shard, {"feature": compute(start, stop)})
        >>> writer.finish()
    """

    def __init__(
        self,
        root: Path,
        name: str,
        spec: Mapping[str, Any],
        *,
        num_rows: int,
        shard_rows: int,
        fixed: Mapping[str, Any] | None = None,
        rows_digest: str = "",
    ) -> None:
        if num_rows < 0 or shard_rows < 1:
            raise ValueError(f"num_rows must be at least 0 and shard_rows at least 1, got {num_rows} and {shard_rows}")
        self.path = stage_path(root, name, spec)
        wanted = StagePlan(
            name=name,
            fingerprint=fingerprint(spec),
            spec=dict(spec),
            rows_digest=rows_digest,
            num_rows=num_rows,
            shard_rows=shard_rows,
            fixed=dict(fixed or {}),
        )
        with disk_errors(self.path, doing="create folder"):
            self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / PLAN_FILE).exists():
            write_plan(self.path, wanted)
        plan = read_plan(self.path)
        if plan is None:
            gone = self.path / PLAN_FILE
            raise StoreMismatch(f"{gone} disappeared while it was read; make sure that no other run deletes the folder")
        _refuse_other_plan(plan, wanted, self.path)
        self.plan = plan

    @property
    def num_rows(self) -> int:
        """Rows of the finished stage."""
        return self.plan.num_rows

    @property
    def num_shards(self) -> int:
        """Files that make the stage whole."""
        return self.plan.num_shards

    @property
    def fixed(self) -> dict[str, Any]:
        """What the first run decided; a resume must use these values and not its own."""
        return dict(self.plan.fixed)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of ``shard`` and the row after its last."""
        return self.plan.shard_range(shard)

    def missing_shards(self) -> list[int]:
        """Shards to be written, ascending. Headers of those that exist are checked, their content on first reading.

        Raises:
            StoreCorrupted: the header of a shard is not what was written.
            StoreMismatch: a shard file belongs to another stage.
        """
        missing = []
        for shard in range(self.num_shards):
            if (self.path / self.plan.shard_file(shard)).exists():
                self._header(shard)
            else:
                missing.append(shard)
        return missing

    def write_shard(self, shard: int, columns: Mapping[str, Column]) -> None:
        """Put one shard in place, whole or not at all; it is on the disk when the call returns.

        Args:
            shard: its number.
            columns: per column a tensor or array of shape (rows, ...), or, if rows differ in length, a list of
                one-dimensional arrays. The same columns, element types and row shapes in every shard.

        Raises:
            ValueError: a column has another number of rows than the shard.
            InvalidInput: the disk is full or the folder cannot be written; earlier shards are untouched.
        """
        start, stop = self.plan.shard_range(shard)
        path = self.path / self.plan.shard_file(shard)
        chunks, _ = encode_shard(columns, fingerprint=self.plan.fingerprint, start=start, stop=stop)
        self._remove_leftovers(path.name)
        replace_atomically(path, chunks)

    def finish(self) -> None:
        """Write the manifest, which makes the stage complete. Call once, in one process, after all shards exist.

        Raises:
            ValueError: a shard is missing.
            StoreMismatch: two shards disagree on columns, element types or row shapes.
        """
        missing = self.missing_shards()
        if missing:
            raise ValueError(f"{self.path} lacks {len(missing)} of {self.num_shards} shards, the first is {missing[0]}")
        tensors: dict[str, TensorRecord] = {}
        shards = []
        for shard in range(self.num_shards):
            header = self._header(shard)
            columns = header.columns()
            tensors = tensors or columns
            if columns != tensors:
                raise StoreMismatch(
                    f"{self.path / self.plan.shard_file(shard)} holds {_listed(columns)}, the shards before it hold "
                    f"{_listed(tensors)}; delete the folder and run again to recompute"
                )
            file = self.plan.shard_file(shard)
            shards.append(ShardRecord(file=file, start=header.start, stop=header.stop, sha256=header.sha256))
        versions = {"store_format": str(FORMAT), "tamis": __version__}
        manifest = StageManifest(plan=self.plan, tensors=tensors, shards=tuple(shards), versions=versions)
        # A stage whose one deleted shard came back bit for bit keeps its old manifest.
        existing = read_manifest(self.path)
        if existing is None or (existing.tensors, existing.shards) != (manifest.tensors, manifest.shards):
            write_manifest(self.path, manifest)
        for name in (PLAN_FILE, MANIFEST_FILE, *(record.file for record in shards)):
            self._remove_leftovers(name)

    def _header(self, shard: int) -> ShardHeader:
        path = self.path / self.plan.shard_file(shard)
        header = read_header(path)
        if header.fingerprint != self.plan.fingerprint or (header.start, header.stop) != self.plan.shard_range(shard):
            raise StoreMismatch(
                f"{path} holds rows {header.start} to {header.stop} of stage {header.fingerprint[:12]}, expected rows "
                f"{self.plan.shard_range(shard)} of stage {self.plan.fingerprint[:12]}; "
                "delete this file and run again to recompute it"
            )
        return header

    def _remove_leftovers(self, file: str) -> None:
        """Temporary files of runs that were killed while writing ``file``."""
        for leftover in self.path.glob(f".{file}.*{TEMPORARY_SUFFIX}"):
            logger.info("removing %s, left over from a run that was killed", leftover)
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _refuse_other_plan(stored: StagePlan, wanted: StagePlan, folder: Path) -> None:
    advice = "choose another output folder, or delete this one and run again to recompute"
    refuse_other_spec(stored.spec, wanted.spec, where=folder, advice=advice)
    for field in ("num_rows", "rows_digest"):
        refuse_other_spec({field: getattr(stored, field)}, {field: getattr(wanted, field)}, where=folder, advice=advice)


def _listed(columns: Mapping[str, TensorRecord]) -> str:
    return canonical_json({name: [c.dtype, list(c.row_shape), c.ragged] for name, c in columns.items()})
