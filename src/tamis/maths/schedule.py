"""The one learning-rate schedule of every run that this library makes by itself: a line up, then a line down."""

from __future__ import annotations

__all__ = ["linear_rate"]


def linear_rate(step: int, total: int, rising: int) -> float:
    """Share of the peak rate at update ``step`` (from 0) of ``total``, of which the first ``rising`` rise; never 0.

    The rate would be zero one update before the first and one after the last, so that no update is wasted.
    """
    if step < rising:
        return (step + 1) / rising
    return (total - step) / (total - rising)
