"""Robust weights of selected rows: how far each stands above the best row that was left out.

The first-order weights of influence distillation (equation 7 without Q) solved once for whoever picked: a target row
under round robin, a target under the mean. Weights average 1, so that a weighted loss keeps its size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from tamis.selection.top import BLOCK_VALUES, block_length
from tamis.solve.simplex_closed_form import weights_for_count
from tamis.types import FloatArray

__all__ = ["best_left_out", "robust_weights"]


def robust_weights(
    values: Float[np.ndarray, "n M"],
    picked: Int[np.ndarray, " k"],
    column: Int[np.ndarray, " k"],
    left_out: Bool[np.ndarray, " n"],
    *,
    block_values: int = BLOCK_VALUES,
) -> Float[np.ndarray, " k"]:
    """A weight for each picked row, in the order of ``picked``; those that one column picked sum to their number.

    ``w_i = c (v_i - b)_+ / sum_j (v_j - b)_+`` over the c picks of a column, with v its scores and b the best of them
    among the rows left out: the largest λ that leaves exactly these rows weights above zero. Where no row is left out,
    or all picks tie with it, weights are as ``weights_for_count`` has them: at most twice each other, or equal.

    Args:
        values: scores, higher helps more; may be a memmap.
        picked: rows that were selected.
        column: who picked each.
        left_out: rows that could have been selected and were not.
        block_values: score values read at a time.
    """
    bounds = best_left_out(values, left_out, block_values=block_values)
    weights = np.ones(len(picked), np.float32)
    for taker in np.unique(column):
        mine = np.flatnonzero(column == taker)
        scores = np.asarray(values[picked[mine], taker], np.float64)
        if np.isfinite(bounds[taker]):
            # Picks come first, so that of rows that tie with the bound they are the ones that count.
            scores = np.append(scores, min(float(bounds[taker]), float(scores.min())))
        found = weights_for_count(scores, len(mine), break_ties=True).value[: len(mine)]
        weights[mine] = found * (len(mine) / found.sum())
    return weights


def best_left_out(
    values: Float[np.ndarray, "n M"], left_out: Bool[np.ndarray, " n"], *, block_values: int = BLOCK_VALUES
) -> npt.NDArray[np.float64]:
    """The highest score of each column among the rows left out, ``-inf`` if there are none; read in blocks."""
    best: npt.NDArray[np.float64] = np.full(values.shape[1], -np.inf)
    step = block_length(values.shape[1], block_values)
    for start in range(0, len(values), step):
        rows = np.flatnonzero(left_out[start : start + step])
        if len(rows):
            block: FloatArray = np.asarray(values[start : start + step])[rows]
            np.maximum(best, block.max(axis=0), out=best)
    return best
