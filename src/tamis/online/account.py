"""What a training run did, told from the log and the candidates that it left on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tamis.online.fate import read_candidates

__all__ = ["Account", "fallback_share", "forecast_correlation", "forecast_pairs", "read_account"]


@dataclass(frozen=True, kw_only=True)
class Account:
    """Counts over all choices of a run."""

    candidates: int  # looked at
    distinct_candidates: int
    kept: int  # with a weight, counted once per choice
    distinct_rows: int  # trained on
    share_by_source: dict[str, float]  # of the weight of all updates, the largest first


def read_account(folder: Path) -> Account:
    """From the candidates' log in ``folder``.

    Raises:
        InvalidInput: there is none.
    """
    table = read_candidates(folder)
    rows = table["row"].to_numpy()
    kept, weight = table["kept"].to_numpy(), np.abs(table["weight"].to_numpy())
    sources = table["source"].combine_chunks().dictionary_encode()
    names, index = sources.dictionary.to_pylist(), sources.indices.to_numpy(zero_copy_only=False)
    total = float(weight.sum())
    by_source = np.bincount(index, weights=weight, minlength=len(names)) / (total or 1.0)
    order = np.argsort(-by_source, kind="stable")
    return Account(
        candidates=len(rows),
        distinct_candidates=len(np.unique(rows)),
        kept=int(kept.sum()),
        distinct_rows=len(np.unique(rows[kept])),
        share_by_source={names[i]: float(by_source[i]) for i in order} if total else {},
    )


def forecast_pairs(log: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    """(pairs, 2): predicted and realised drop of the target loss, of the entries that have both."""
    keys = ("selection/predicted_drop", "selection/realised_drop")
    pairs = [[entry[key] for key in keys] for entry in log if all(entry.get(key) is not None for key in keys)]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def forecast_correlation(log: Sequence[Mapping[str, Any]]) -> tuple[float | None, int]:
    """Pearson's correlation of predicted and realised drop of the target loss, and of how many pairs.

    None where there are fewer than three pairs, or no spread in one of the two.
    """
    pairs = forecast_pairs(log)
    if len(pairs) < 3 or not all(np.ptp(column) > 0 for column in pairs.T):
        return None, len(pairs)
    return float(np.corrcoef(pairs.T)[0, 1]), len(pairs)


def fallback_share(log: Sequence[Mapping[str, Any]]) -> float:
    """Share of the choices in which the method could not do what it does and did something simpler.

    Log entries average over the choices since the one before, so each counts by the updates that it stands for.
    """
    entries = [(entry["step"], entry["selection/fallback"]) for entry in log if "selection/fallback" in entry]
    spans = np.diff([0, *(step for step, _ in entries)])
    return float(np.average([share for _, share in entries], weights=spans)) if entries else 0.0
