"""How well scores agree with the truth of retraining: Spearman's correlation and what chance leaves of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tamis.maths.ranks import mean_ranks
from tamis.seeds import child_seed, random_uniform

__all__ = ["Agreement", "agreement"]

_DRAWS = 1000
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Spearman's correlation over samples, averaged over final values, with an interval of 95 % over samples."""

    spearman: float | None  # None where one side is constant
    low: float | None
    high: float | None
    samples: int
    relative_error: float  # ‖scores - truth‖ / ‖truth‖, over all of them


def agreement(scores: Matrix, truth: Matrix, *, seed: int = 0) -> Agreement:
    """Of ``scores`` and ``truth``, both (samples, final values) and finite.

    The interval is that of the percentile bootstrap over samples, with their ranks as they are among all; with ten
    samples it says little, and says so by its width.
    """
    assert np.isfinite(scores).all() and np.isfinite(truth).all(), "NaN has no rank"
    count = len(scores)
    ranks, true_ranks = (np.stack([mean_ranks(column) for column in part.T], axis=1) for part in (scores, truth))
    draws = []
    uniform = random_uniform(child_seed(seed, "bootstrap"), _DRAWS * count if count > 2 else 0)
    for chosen in np.minimum((uniform * count).astype(np.int64), count - 1).reshape(-1, count):
        found = _mean_correlation(ranks[chosen], true_ranks[chosen])
        if found is not None:
            draws.append(found)
    low, high = (float(x) for x in np.quantile(draws, [0.025, 0.975])) if draws else (None, None)
    scale = float(np.linalg.norm(truth))
    return Agreement(
        spearman=_mean_correlation(ranks, true_ranks),
        low=low,
        high=high,
        samples=count,
        relative_error=float(np.linalg.norm(scores - truth)) / scale if scale else float("nan"),
    )


def _mean_correlation(x: Matrix, y: Matrix) -> float | None:
    """Pearson's of every column, averaged; None if none has spread on both sides."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    known = scale > 0
    return float(np.mean((x * y).sum(axis=0)[known] / scale[known])) if known.any() else None
