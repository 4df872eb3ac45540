"""Rows whose own loss is unusually high among rows like them: likely wrong answers.

Inside a source, a row's own loss tells wrong answers from right ones better than any score that knows the target.
Across sources and lengths it does not (hard sources and short answers have high losses), so each row is compared with
rows of its own kind only. A flag is a hint to look; nothing is dropped for it unless the user asks.

How far to trust it, measured with a 135M-parameter model on 600 rows of 17 sources, some with the answer of another row
of their source (``benchmarks/flags.py``): 4 % of the rows are flagged when no answer is wrong. With 5 % wrong answers a
third of the flags are right, and a third of the wrong answers are flagged; with 20 %, three quarters and a quarter.
Other spreads, groups and logarithms trade one for the other and none is much better at both, since many right answers
have the loss of a wrong one. Most wrong answers go unflagged, and most flags are right answers unless many are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from tamis.errors import InvalidSettings, NonFinite
from tamis.types import FloatArray

__all__ = ["HighLoss", "LossFlags", "flag_high_losses"]

_ONE_STD_BELOW = 0.15865525393145707  # share of a normal distribution more than one standard deviation below its mean
_MEAN_DEVIATION_TO_STD = 1.2533141373155003  # of a normal distribution: √(π/2)


@dataclass(frozen=True, kw_only=True)
class HighLoss:
    """When a loss counts as unusually high.

    ``threshold`` is in robust standard deviations above the median of the row's group. Groups below ``min_group`` rows
    are too small for a median and a spread and give way to a larger one.
    """

    threshold: float = 2.25
    min_group: int = 20

    def __post_init__(self) -> None:
        if not np.isfinite(self.threshold) or self.threshold <= 0:
            raise InvalidSettings(f"high-loss threshold is {self.threshold:g}; expected a number above zero")
        if self.min_group < 3:
            raise InvalidSettings(f"high-loss min_group is {self.min_group}; expected at least 3")


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """``flagged`` where ``z`` exceeds the threshold."""

    flagged: npt.NDArray[np.bool_]  # (n,)
    z: FloatArray  # (n,) robust standard deviations above the group's median; 0 where there was no group


def flag_high_losses(
    losses: Float[np.ndarray, " n"],
    sources: Int[np.ndarray, " n"],
    supervised: Int[np.ndarray, " n"],
    settings: HighLoss | None = None,
) -> LossFlags:
    """Flag the rows whose loss is far above that of rows like them.

    ``z = (loss − median) / (median − 16th percentile)`` within the row's source and supervised length (lengths that
    share their power of two go together, since short answers have higher and wider losses); within its source, if
    those are fewer than ``min_group`` rows; among all rows, if the source is as small; and no judgement at all below
    that. The spread is taken below the median, where wrong answers are not: around the median (MAD) it grows with
    every wrong answer and hides them. If a third of a group has the very same loss, it may be 0, and the mean
    absolute deviation (times √(π/2)) takes its place.

    Raises:
        NonFinite: a loss is NaN or infinite (names the place in ``losses``).
    """
    settings = settings or HighLoss()
    if not np.isfinite(losses).all():
        place = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NonFinite(f"the loss at place {place} is {losses[place]}; expected a finite number")
    n = len(losses)
    length_bin = np.floor(np.log2(np.maximum(supervised, 1))).astype(np.int64)
    groupings = (
        np.unique(np.stack([sources, length_bin]), axis=1, return_inverse=True)[1].reshape(-1),
        np.unique(sources, return_inverse=True)[1],
        np.zeros(n, np.int64),
    )
    z = np.zeros(n, np.float32)
    is_judged = np.zeros(n, np.bool_)
    for groups in groupings:
        order = np.argsort(groups, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            waiting = members[~is_judged[members]]
            if len(members) >= settings.min_group and len(waiting):
                z[waiting] = _robust_z(losses[members].astype(np.float64), losses[waiting].astype(np.float64))
                is_judged[waiting] = True
    return LossFlags(flagged=z > settings.threshold, z=z)


def _robust_z(group: npt.NDArray[np.float64], losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How many robust standard deviations of ``group`` each of ``losses`` lies above its median."""
    median = np.median(group)
    spread = median - np.quantile(group, _ONE_STD_BELOW)
    if spread == 0:
        spread = _MEAN_DEVIATION_TO_STD * np.mean(np.abs(group - median))
    if spread == 0:
        return np.zeros_like(losses)
    return np.asarray((losses - median) / spread)
