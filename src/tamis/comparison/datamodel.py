"""The linear datamodelling score: do the scores of rows, added up, foretell which part of the pool trains better?

After Park and others (TRAK, 2023), but with the mean loss of the held-out rows as the one output: a rank
correlation over random parts of the pool, between the sum of a part's scores and the drop of the loss after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tamis.maths.ranks import rank_correlation
from tamis.seeds import child_seed, raw_words
from tamis.types import IntArray

__all__ = ["Foretold", "foretell"]

_RESAMPLES = 1000
# Below so many, draws of the parts repeat the same few pairs: of three, every interval would be a single number.
_FEWEST_FOR_AN_INTERVAL = 8


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """How well a method's scores foretell the loss."""

    name: str
    correlation: float | None  # Spearman's; None where one of the two does not vary, or rows have no score
    low: float | None  # 95 % interval, parts drawn again with replacement; None below eight parts
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
    correlation = None if np.isnan(foretold).any() or count < 3 else rank_correlation(foretold, gain)
    if correlation is None:
        return Foretold(name=name, correlation=None, low=None, high=None, parts=count)
    if count < _FEWEST_FOR_AN_INTERVAL:
        return Foretold(name=name, correlation=correlation, low=None, high=None, parts=count)
    drawn = (raw_words(child_seed(seed, "resampled parts"), _RESAMPLES * count) % np.uint64(count)).astype(np.int64)
    again = [rank_correlation(foretold[places], gain[places]) for places in drawn.reshape(_RESAMPLES, count)]
    low, high = np.quantile([found for found in again if found is not None], [0.025, 0.975]).tolist()
    return Foretold(name=name, correlation=correlation, low=low, high=high, parts=count)
