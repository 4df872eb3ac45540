"""How well scores agree with the truth of retraining: Spearman's correlation and what chance leaves of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tamis.maths.ranks import rank_correlation
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
    """Of ``scores`` and ``truth``, both (samples, final values).

    The interval is that of the percentile bootstrap over samples; with ten samples it says little, and says so by its
    width.
    """
    count = len(scores)
    draws = []
    for number in range(_DRAWS if count > 2 else 0):
        uniform = random_uniform(child_seed(seed, "bootstrap", number), count)
        chosen = np.minimum((uniform * count).astype(np.int64), count - 1)
        found = _mean_spearman(scores[chosen], truth[chosen])
        if found is not None:
            draws.append(found)
    low, high = (float(x) for x in np.quantile(draws, [0.025, 0.975])) if draws else (None, None)
    scale = float(np.linalg.norm(truth))
    return Agreement(
        spearman=_mean_spearman(scores, truth),
        low=low,
        high=high,
        samples=count,
        relative_error=float(np.linalg.norm(scores - truth)) / scale if scale else float("nan"),
    )


def _mean_spearman(scores: Matrix, truth: Matrix) -> float | None:
    found = [rank_correlation(a, b) for a, b in zip(scores.T, truth.T, strict=True)]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None
