"""Paired differences, whether chance alone could have made them, and the correction for looking at many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["PairedTest", "area_under_curve", "holm", "paired_test"]


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Mean of ``n`` paired differences, and a two-sided t-test of whether it is zero."""

    difference: float
    std: float | None  # of the differences, n - 1 in the denominator; None below two pairs
    n: int
    t: float | None  # None below two pairs, and where all differences are equal
    p: float | None  # None below two pairs: nothing is known of chance
    low: float | None  # 95 % confidence interval of the mean difference; None where t is
    high: float | None


def paired_test(a: npt.ArrayLike, b: npt.ArrayLike) -> PairedTest:
    """Student's paired t-test of ``a - b``, entry by entry.

    Differences that are all equal have no spread to measure their mean by, which two or three runs of a share of right
    answers easily give. Their p is that of the sign test, 1 over 2 to the power of n - 1: so often would n fair coins
    fall alike. It is 1 if all are zero.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    difference = first - second
    n, mean = len(difference), float(difference.mean()) if len(difference) else float("nan")
    if n < 2:
        return PairedTest(difference=mean, std=None, n=n, t=None, p=None, low=None, high=None)
    # Shares like 3/20 have no exact binary form, so that equal differences of them may differ in their last bits.
    rounding = 8 * float(np.finfo(np.float64).eps) * float(max(np.abs(first).max(), np.abs(second).max()))
    if float(np.ptp(difference)) <= rounding:
        p = 1.0 if abs(mean) <= rounding else 2.0 ** (1 - n)
        return PairedTest(difference=mean, std=0.0, n=n, t=None, p=p, low=None, high=None)
    std = float(difference.std(ddof=1))
    error = std / math.sqrt(n)
    t = mean / error
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(t), n - 1))
    return PairedTest(difference=mean, std=std, n=n, t=t, p=p, low=mean - reach, high=mean + reach)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of p-values that are looked at together, in their own order.

    Adjusted values below a level keep the chance of even one false finding below that level, whatever the dependence
    between the tests. None (no test could be made) stays None and does not count.
    """
    known = sorted((value, index) for index, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for place, (value, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * value))
        adjusted[index] = largest
    return adjusted


def area_under_curve(higher: npt.ArrayLike, lower: npt.ArrayLike) -> float | None:
    """How often a member of ``higher`` has the greater value than one of ``lower``, ties counting half; None if empty.

    0.5 is what a score that cannot tell them apart gives.
    """
    a, b = np.asarray(higher, dtype=np.float64), np.asarray(lower, dtype=np.float64)
    if not len(a) or not len(b):
        return None
    ranks = stats.rankdata(np.concatenate([a, b]))
    return float((ranks[: len(a)].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))
