"""Robust weights of selected rows: how far each stands above the best row that was left out.

The first-order weights of influence distillation (equation 7 without Q) solved once for whoever picked: a target row
under round robin, a target under the mean. Weights average 1, so that a weighted loss keeps its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from tamis.selection.top import BLOCK_VALUES, block_length
from tamis.solve.simplex_closed_form import weights_for_count
from tamis.types import FloatArray

__all__ = ["RobustWeights", "best_left_out", "notes_of_weights", "robust_weights"]

# How far below picks that tie with the best row left out the bound is put, as a part of the picks' spread.
_HAIR = 1e-6


@dataclass(frozen=True, kw_only=True)
class RobustWeights:
    """Weights of the picked rows, and for each column that picked any how they came about."""

    weights: Float[np.ndarray, " k"]
    columns: Int[np.ndarray, " C"]  # those that picked, ascending
    lambdas: Float[np.ndarray, " C"]  # λ used, of equation 7 with weights that sum to the number of candidates
    intervals: Float[np.ndarray, "C 2"]  # any λ above the first and up to the second keeps exactly these rows
    ties: Int[np.ndarray, " C"]  # picks that are no better than the best row left out


def robust_weights(
    values: Float[np.ndarray, "n M"],
    picked: Int[np.ndarray, " k"],
    column: Int[np.ndarray, " k"],
    left_out: Bool[np.ndarray, " n"],
    *,
    num_candidates: int | None = None,
    block_values: int = BLOCK_VALUES,
) -> RobustWeights:
    """A weight for each picked row, in the order of ``picked``; those that one column picked sum to their number.

    ``w_i = c (v_i - b)_+ / sum_j (v_j - b)_+`` over the c picks of a column, with v its scores and b the best of them
    among the rows left out: the largest λ that leaves exactly these rows weights above zero. Where picks tie with the
    best row left out, no λ does, and b lies a millionth of the picks' spread below them: they weigh next to nothing, as
    they would if they were better by a hair. Where no row is left out, or all picks tie with it, weights are as
    ``weights_for_count`` has them: at most twice each other, or equal.

    Args:
        values: scores, higher helps more; may be a memmap.
        picked: rows that were selected.
        column: who picked each.
        left_out: rows that could have been selected and were not.
        num_candidates: n of equation 7, whose weights sum to n over n rows, by which λ goes; copies count once. None:
            the rows picked and those left out.
        block_values: score values read at a time.
    """
    bounds = best_left_out(values, left_out, block_values=block_values)
    candidates = len(picked) + int(np.count_nonzero(left_out)) if num_candidates is None else num_candidates
    weights = np.ones(len(picked), np.float32)
    takers = np.unique(column)
    lambdas, intervals, ties = np.empty(len(takers)), np.empty((len(takers), 2)), np.zeros(len(takers), np.int64)
    for place, taker in enumerate(takers):
        mine = np.flatnonzero(column == taker)
        count, bound = len(mine), float(bounds[taker])
        scores = np.asarray(values[picked[mine], taker], np.float64)
        if np.isfinite(bound):
            ties[place] = np.count_nonzero(scores <= bound)
            lowest, spread = float(scores.min()), float(scores.max() - scores.min())
            # Picks come first, so that of rows that all tie with the bound they are the ones that count.
            scores = np.append(scores, min(bound, lowest - _HAIR * spread) if bound >= lowest else bound)
        found = weights_for_count(scores, count, break_ties=True)
        weights[mine] = found.value[:count] * (count / found.value[:count].sum())
        # λ times the number of rows that weights sum to is one and the same for every pool around these picks.
        scale = len(scores) / candidates
        lambdas[place] = float(found.stats["lambda"]) * scale
        intervals[place] = float(found.stats["lambda_low"]) * scale, float(found.stats["lambda_high"]) * scale
    return RobustWeights(weights=weights, columns=takers, lambdas=lambdas, intervals=intervals, ties=ties)


def notes_of_weights(
    found: RobustWeights, of_target: Int[np.ndarray, " M"], target_names: Sequence[str]
) -> tuple[str, ...]:
    """A sentence for each target whose rows were picked: λ, the interval it was taken from, and ties.

    Args:
        found: the weights.
        of_target: the target of each column.
        target_names: of all targets.
    """
    sentences = []
    for target, name in enumerate(target_names):
        mine = of_target[found.columns] == target
        if not mine.any():
            continue
        low, high = found.intervals[mine].T
        several = f" (by {int(mine.sum())} target rows)" if mine.sum() > 1 else ""
        sentence = (
            f"Robust weights for target {name}{several}: lambda {_range(found.lambdas[mine])} (of equation 7, whose "
            "weights sum to the number of candidates), the largest that keeps just these rows, as any above "
            f"{_range(low)} does"
        )
        if np.isinf(high).any():
            sentence += (
                " and has no end where no row is left out or all picks tie; weights differ at most twofold there"
            )
        ties = int(found.ties[mine].sum())
        if ties:
            are = "pick ties" if ties == 1 else "picks tie"
            sentence += f"; {ties} {are} with the best row left out, so by scores other rows could stand there"
        sentences.append(sentence)
    return tuple(sentences)


def _range(numbers: Float[np.ndarray, " C"]) -> str:
    least, most = f"{numbers.min():.3g}", f"{numbers.max():.3g}"
    return least if least == most else f"{least} to {most}"


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
