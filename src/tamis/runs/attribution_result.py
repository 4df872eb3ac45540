"""What an attribution found: the scores' tables in its folder, and what is said of them in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tamis.runs.outputs import check_files, read_written

__all__ = ["Attribution", "read_attribution"]

_EXTREMES = 5  # samples named at either end


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Scores of a run's samples, also on disk under ``out``. Positive: the sample lowered the final target loss."""

    out: Path  # folder of the result
    uses: pa.Table  # one line per sample and step: step, row, place in the batch, weight, score
    samples: pa.Table  # one line per recorded row: row, its uses, the sum of their scores
    manifest: Mapping[str, Any]  # what determined the result, as manifest.json

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis attribute --json`` prints it with what to type next.

        ``best`` and ``worst`` are the samples at either end, the extreme one first, with the update of its largest use;
        ``sources`` what each source's samples did, by the mean score of a use, where the record knows sources, and by
        that of the uses outside ``outsized_updates``, where there are some. Scores and ``target_loss`` are in nats.
        """
        names = ("method", "updates", "uses", "rows", "target_rows", "target_loss", "outsized_updates", "warnings")
        found = {key: self.manifest[key] for key in names}
        for key in ("curvature_agreement", "curvature_advice"):
            if self.manifest.get(key) is not None:
                found[key] = self.manifest[key]
        return {
            **found,
            "sources": self._by_source(),
            "best": self._extremes("descending"),
            "worst": self._extremes("ascending"),
            "seconds": self.manifest["cost"]["seconds"],
            "scores_by_use": str(self.out / "uses.parquet"),
            "scores_by_sample": str(self.out / "samples.parquet"),
        }

    def _extremes(self, order: str) -> list[dict[str, Any]]:
        few = self.samples.sort_by([("score", order), ("row", "ascending")]).slice(
            0, min(_EXTREMES, len(self.samples) // 2)
        )
        row, step = self.uses["row"].to_numpy(), self.uses["step"].to_numpy()
        size = np.abs(self.uses["score"].to_numpy())
        found = []
        for one in few.to_pylist():
            own = np.flatnonzero(row == one["row"])
            update = int(step[own[np.argmax(size[own])]]) if len(own) else None
            found.append({"sample": _name(one), "uses": one["uses"], "update": update, "score": one["score"]})
        return found

    def _by_source(self) -> list[dict[str, Any]]:
        if "source" not in self.samples.column_names:
            return []
        table = self.samples.group_by("source").aggregate([("row", "count"), ("uses", "sum"), ("score", "sum")])
        found = [
            {
                "source": one["source"],
                "samples": one["row_count"],
                "uses": one["uses_sum"],
                "mean_score": one["score_sum"] / one["uses_sum"],
                **self._mean_of_the_others(one["source"]),
            }
            for one in table.to_pylist()
            if one["source"] is not None  # null: rows that were not found in the training data
        ]
        return sorted(found, key=lambda one: (-one["mean_score"], one["source"]))

    def _mean_of_the_others(self, source: str) -> dict[str, float | None]:
        """The mean score of the source's uses outside the updates that outweigh all others; nothing without such."""
        if not self.manifest["outsized_updates"]:
            return {}
        own = np.isin(self.uses["row"].to_numpy(), self.samples.filter(pc.field("source") == source)["row"].to_numpy())
        own &= ~np.isin(self.uses["step"].to_numpy(), self.manifest["outsized_updates"])
        return {"mean_score_elsewhere": float(self.uses["score"].to_numpy()[own].mean()) if own.any() else None}


def read_attribution(out: Path) -> Attribution:
    """A finished attribution from its folder.

    Raises:
        StoreCorrupted: a table is not the one that was written.
    """
    path = out / "manifest.json"
    todo = f"remove {path} and attribute again, which takes what the sweep has left on disk"
    manifest = read_written(path, todo=todo)
    check_files(out, manifest["files"], todo=todo)
    return Attribution(
        out=out,
        uses=pq.read_table(out / "uses.parquet"),
        samples=pq.read_table(out / "samples.parquet"),
        manifest=manifest,
    )


def _name(sample: Mapping[str, Any]) -> str:
    """What the user calls it, as far as the record knows."""
    if sample.get("id") is not None:
        return str(sample["id"])
    return f"position {sample['position']}" if sample["position"] is not None else f"recorded row {sample['row']}"
