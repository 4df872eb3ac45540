"""What in the scores themselves says that they are not to be believed, without retraining anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from tamis.report.wording import counted
from tamis.settings import AttributeSettings

__all__ = ["doubts"]

_FIRST = 10  # updates, while Adam's moments are fresh
_TIMES = 10  # as large as in an ordinary update is out of the ordinary
_PART = 0.5  # of all scores by absolute value decides what sums and means say


def doubts(uses: pa.Table, settings: AttributeSettings, *, moved: float) -> dict[str, Any]:
    """``outsized_updates``, whose scores outweigh all others, and ``warnings``, in words.

    Args:
        uses: of an attribution.
        settings: that it was made with.
        moved: length of the way that the parameters went in the run.
    """
    found, said = [] if settings.method == "tracin" else _outsized(uses), list[str]()  # TracIn differentiates no run
    if found:
        share, times = _weight_of(uses, found)
        can_follow = settings.method == "adamw-influence" and not settings.secant
        advice = (
            "score again with --secant 10, which follows a removal exactly through the next updates"
            if can_follow
            else "see what tamis verify says of them, or record a run at a lower rate"
        )
        said.append(
            f"{_listed(found)} {'has' if len(found) == 1 else 'have'} {share:.0%} of all scores by absolute value, "
            f"{times:.0f} times as much per use as an ordinary update. Scores of first updates are often far too "
            f"large, and sums and means are then theirs alone: {advice}, or leave these updates out (column step of "
            "uses.parquet)"
        )
    if "error_proxy" in uses.column_names:
        error, step = uses["error_proxy"].to_numpy(), uses["step"].to_numpy()
        beyond = error > moved
        if beyond.any():
            steps = sorted(set(step[beyond].tolist()))
            said.append(
                f"{counted(int(beyond.sum()), 'use')} of {_listed(steps).lower()} with an error_proxy above the length "
                f"of the whole run's way, {moved:.3g}: no derivative is right for them"
            )
    return {"outsized_updates": found, "warnings": said}


def _outsized(uses: pa.Table) -> list[int]:
    """Updates among the first whose scores are far larger than usual and together outweigh all others."""
    step, size = uses["step"].to_numpy(), np.abs(uses["score"].to_numpy())
    steps = np.unique(step)
    if len(steps) < 4:  # too few to tell what is usual
        return []
    means = np.array([size[step == one].mean() for one in steps])
    large = steps[(means > _TIMES * np.median(means)) & (steps <= _FIRST)]
    return large.tolist() if size[np.isin(step, large)].sum() > _PART * size.sum() else []


def _weight_of(uses: pa.Table, steps: list[int]) -> tuple[float, float]:
    step, size = uses["step"].to_numpy(), np.abs(uses["score"].to_numpy())
    own = np.isin(step, steps)
    ordinary = np.median([size[step == one].mean() for one in np.unique(step)])
    return float(size[own].sum() / size.sum()), float(size[own].mean() / max(ordinary, np.finfo(np.float64).tiny))


def _listed(steps: list[int]) -> str:
    """Updates by number: ``Update 1``, ``Updates 1, 2 and 3``, no more than five of them."""
    if len(steps) == 1:
        return f"Update {steps[0]}"
    if len(steps) > 5:
        return f"Updates {steps[0]} to {steps[-1]}"
    return f"Updates {', '.join(map(str, steps[:-1]))} and {steps[-1]}"
