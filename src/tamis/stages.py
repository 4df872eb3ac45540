"""A stage of work shared by the ranks: who computes which shard, what it cost, when it is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tamis.model.processes import barrier, is_main, rank, world_size
from tamis.store.writer import StageWriter

__all__ = ["StageCost", "Work", "finish", "own_shards", "read_cost", "record_cost", "shards_without_cost"]

Work = Literal["none", "forward", "gradient"]


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage spent, summed over shards and ranks, including the runs before a resume."""

    name: str
    work: Work
    rows: int
    tokens: int
    supervised_tokens: int
    squared_tokens: int  # sum over rows of length squared: what attention pays
    elapsed_s: float
    operations: float | None = None  # counted where the work is not a whole forward or gradient pass


def read_cost(stage: Path, *, paid_by: Collection[str] = ()) -> StageCost | None:
    """Sum of the cost records of a stage, None if it wrote none.

    Shards taken from a stage whose folder is named in ``paid_by`` are left out: their cost is that stage's.
    """
    shards = {record["shard"]: record for record in _records(stage)}
    shards = {shard: record for shard, record in shards.items() if record.get("taken_from") not in paid_by}
    if not shards:
        return None
    records = list(shards.values())
    return StageCost(
        name=stage.name.rsplit("-", 1)[0],
        work=records[0].get("work", "none"),
        rows=sum(r.get("rows", 0) for r in records),
        tokens=sum(r.get("tokens", 0) for r in records),
        supervised_tokens=sum(r.get("supervised_tokens", 0) for r in records),
        squared_tokens=sum(r.get("squared_tokens", 0) for r in records),
        elapsed_s=sum(r["elapsed_s"] for r in records),
        operations=sum(r["operations"] for r in records) if all("operations" in r for r in records) else None,
    )


def _records(stage: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(stage.glob("cost-*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run; its shard is computed again


def shards_without_cost(stage: Path) -> int:
    """How many shards of ``stage`` have no record of what they cost, which only damage can lose."""
    known = {record["shard"] for record in _records(stage)}
    return sum(int(path.stem.removeprefix("shard-")) not in known for path in stage.glob("shard-*.safetensors"))


def record_cost(stage: Path, shard: int, elapsed_s: float, **more: Any) -> None:
    """Note what a shard cost, beside the shards and not in them: a resumed run must write the same bytes.

    Call it before the shard is put in place: after a kill between the two the shard is made, and noted, again. The
    other way round its cost would be lost.
    """
    with (stage / f"cost-{rank()}.jsonl").open("a", encoding="utf-8") as file:
        # The newline in front ends a line that a killed run left unfinished.
        file.write("\n" + json.dumps({"shard": shard, "elapsed_s": round(elapsed_s, 4), **more}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def own_shards(writer: StageWriter, advance: Callable[[int], None]) -> Iterator[int]:
    """This rank's part of what is missing; its part of what is on disk already is reported as progress at once."""
    missing = writer.missing_shards()
    barrier()  # nobody writes before everybody has looked, or the ranks would share out different lists
    present = sorted({*range(writer.num_shards)} - {*missing})
    for shard in present[rank() :: world_size()]:
        first, stop = writer.shard_range(shard)
        advance(stop - first)
    yield from missing[rank() :: world_size()]


def finish(writer: StageWriter) -> None:
    """Close the stage when every rank has written its shards."""
    barrier()  # every rank has written its shards
    if is_main():
        writer.finish()
    barrier()  # the manifest is there for everyone
