"""The linear datamodelling score: do the scores of rows, added up, foretell which part of the pool trains better?

After Park and others (TRAK, 2023), but with the mean loss of the held-out rows as the one output: a rank
correlation over random parts of the pool, between the sum of a part's scores and the drop of the loss after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from tamis.seeds import child_seed, raw_words
from tamis.types import IntArray

__all__ = ["Foretold", "foretell"]

_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """How well a method's scores foretell the loss."""

    name: str
    correlation: float | None  # Spearman's; None where one of the two does not vary, or rows have no score
    low: float | None  # 95 % interval, parts drawn again with replacement
    high: float | None
    parts: int


def foretell(
    name: str,
    score: npt.NDArray[np.float64],
    parts: Sequence[IntArray],
    losses: Sequence[float],
    *,
    seed: int = 0,
) -> Foretold:
    """The linear datamodelling score of ``score``, one number for each pool row (NaN: not scored).

    Args:
        name: of the method.
        score: positive where training on the row should lower the loss.
        parts: pool rows of each part.
        losses: mean held-out loss after training on each.
        seed: of the interval.
    """
    foretold = np.array([float(score[rows].sum()) for rows in parts])
    gain = -np.asarray(losses, dtype=np.float64)
    count = len(parts)
    if np.isnan(foretold).any() or count < 3 or not np.ptp(foretold) or not np.ptp(gain):
        return Foretold(name=name, correlation=None, low=None, high=None, parts=count)
    drawn = (raw_words(child_seed(seed, "resampled parts"), _RESAMPLES * count) % np.uint64(count)).astype(np.int64)
    again = [
        _spearman(foretold[places], gain[places])
        for places in drawn.reshape(_RESAMPLES, count)
        if np.ptp(foretold[places]) and np.ptp(gain[places])
    ]
    low, high = np.quantile(again, [0.025, 0.975]).tolist()
    return Foretold(name=name, correlation=_spearman(foretold, gain), low=low, high=high, parts=count)


def _spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
