"""The linear datamodelling score: do the scores of rows, added up, foretell which part of the pool trains better?

After Park and others (TRAK, 2023), but with the mean loss of the held-out rows as the one output: a rank
correlation over random parts of the pool, between the sum of a part's scores and the drop of the loss after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tamis.maths.bootstrap import rank_agreement
from tamis.types import IntArray

__all__ = ["Foretold", "foretell"]


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
    if np.isnan(foretold).any() or len(parts) < 3:
        return Foretold(name=name, correlation=None, low=None, high=None, parts=len(parts))
    found = rank_agreement(foretold[:, None], gain[:, None], seed=seed)
    low, high = found.middle or (None, None)
    return Foretold(name=name, correlation=found.mean, low=low, high=high, parts=len(parts))
