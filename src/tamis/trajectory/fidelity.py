"""How well scores agree with the truth of retraining: Spearman's correlation and what chance leaves of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tamis.maths.bootstrap import rank_agreement

__all__ = ["Fidelity", "fidelity"]

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Spearman's correlation over samples, averaged over final values, with an interval of 95 % over samples."""

    spearman: float | None  # None where one side is constant
    low: float | None  # None below eight samples, and where every draw says the same
    high: float | None
    samples: int
    relative_error: float  # ‖scores - truth‖ / ‖truth‖, over all of them


def fidelity(scores: Matrix, truth: Matrix, *, seed: int = 0) -> Fidelity:
    """Of ``scores`` and ``truth``, both (samples, final values) and finite.

    A final value that is the same for all samples has no ranking, and is left out of the mean.
    """
    assert np.isfinite(scores).all() and np.isfinite(truth).all(), "NaN has no rank"
    found = rank_agreement(scores, truth, seed=seed)
    low, high = found.middle or (None, None)
    if low is not None and high is not None and high - low < 1e-9:
        low = high = None  # samples in the very same order: no certainty, but the end of what draws can tell
    scale = float(np.linalg.norm(truth))
    return Fidelity(
        spearman=found.mean,
        low=low,
        high=high,
        samples=len(scores),
        relative_error=float(np.linalg.norm(scores - truth)) / scale if scale else float("nan"),
    )
