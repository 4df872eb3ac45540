"""Second-order robust weights of Influence Distillation: whoever picks, picks by a quadratic programme over all rows.

    minimise  -p·w + (η/2) w·Qw + (λ/2) ‖w‖²   over  w >= 0, Σw = n      (equation 7)

At its solution ``λ w_i = (v_i + τ)_+`` with the marginal scores ``v = p - η Q w``: what a row still adds beside those
taken. So its k weights above zero are the k rows that lead by v, and the usual turn-taking by v selects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tamis.errors import InvalidInput
from tamis.maths.second_order import WORTH_HAVING, TermRatio
from tamis.selection.top import block_length
from tamis.solve.quadratic import LowRankQuadratic, landmark_root
from tamis.solve.simplex_qp import solve_simplex_qp, solve_simplex_qp_for_count
from tamis.solve.solution import Status
from tamis.types import Curvature, FloatArray

__all__ = ["ColumnSolution", "notes_of_second_order", "second_order_scores", "second_order_weights"]

_DOUBLE_NUMBERS = 1 << 25  # numbers of U up to which the programme is solved in float64: 256 MB
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ColumnSolution:
    """How one column's programme ended."""

    column: int
    count: int  # weights above zero that were asked for
    lam: float
    gap: float  # relative, certified
    clipped_share: float  # of the curvature among landmarks, in absolute eigenvalues, that was negative
    terms: TermRatio  # at the weights found
    equal_ratio: float  # |T2 / T1| of the landmarks, equally weighted, nothing clipped
    status: Status


def second_order_scores(
    values: Float[np.ndarray, "n M"],
    curvature: Curvature,
    counts: Int[np.ndarray, " M"],
    candidates: Bool[np.ndarray, " n"],
) -> tuple[FloatArray, list[ColumnSolution]]:
    """Marginal scores ``v = p - η Q w`` of every row, and how each column's programme ended.

    Args:
        values: scores p, one column per picker.
        curvature: Q, of as many columns.
        counts: rows that each column is to pick; its λ is the one that leaves so many weights above zero. Columns that
            pick none keep their scores.
        candidates: rows among which weights are shared out: available, and one of each group of copies.

    Raises:
        InvalidInput: the curvature is of other columns than the scores.
    """
    if curvature.products.shape[0] != values.shape[1]:
        raise InvalidInput(
            f"the second-order term is of {curvature.products.shape[0]} columns, the scores are of {values.shape[1]}; "
            "score and select with the same --aggregate"
        )
    marginal = np.array(values, np.float32)
    rows = np.flatnonzero(candidates)
    solutions = []
    for column in np.flatnonzero(counts):
        root, clipped_share = _root(curvature, int(column), len(rows))
        u = _mixed(curvature.coefficients, rows, root)
        p = torch.from_numpy(np.asarray(values[rows, column])).to(u.dtype)
        quadratic = LowRankQuadratic(u)
        found = solve_simplex_qp_for_count(p, quadratic, min(int(counts[column]), len(rows)))
        status = found.status
        if status is Status.COUNT_MISSED:  # v of the whole solution puts its largest weights first; that of a cut not
            found = solve_simplex_qp(p, quadratic, float(found.stats["lambda"]))
        pulled = root.double() @ (u.T @ found.value).double()  # (L,): η/n Q_L C^T w
        step = block_length(len(pulled), _BLOCK_VALUES)
        for start in range(0, len(marginal), step):
            block = torch.from_numpy(np.asarray(curvature.coefficients[start : start + step])).double()
            marginal[start : start + step, column] -= (block @ pulled).float().numpy()
        bent = float((u.T @ found.value).double().square().sum())
        solutions.append(
            ColumnSolution(
                column=int(column),
                count=int(counts[column]),
                lam=float(found.stats["lambda"]),
                gap=float(found.stats["gap"]),
                clipped_share=clipped_share,
                terms=TermRatio(first=float(p.double() @ found.value.double()), second=bent / 2),
                equal_ratio=float(curvature.ratio[column]),
                status=status,
            )
        )
    return marginal, solutions


def second_order_weights(
    values: Float[np.ndarray, "n M"],
    curvature: Curvature,
    solutions: Sequence[ColumnSolution],
    picked: Int[np.ndarray, " k"],
    column: Int[np.ndarray, " k"],
    *,
    num_candidates: int,
) -> FloatArray:
    """A weight for each picked row: the same programme at the same λ with only a column's own picks in play.

    Where the picks are the rows with weights above zero, that is the programme's own solution. Where others stand in,
    since another column took a row first, some may get none at that λ: then it is the λ that leaves all of them some.
    Weights of a column average 1.
    """
    weights = np.ones(len(picked), np.float32)
    for solution in solutions:
        mine = np.flatnonzero(column == solution.column)
        if not len(mine):
            continue
        root, _ = _root(curvature, solution.column, num_candidates)
        # Σw = n over m rows is Σu = m with w = (n/m) u: then Q and λ grow by n/m.
        scale = num_candidates / len(mine)
        u = _mixed(curvature.coefficients, picked[mine], root).double() * scale**0.5
        p = torch.from_numpy(np.asarray(values[picked[mine], solution.column])).double()
        quadratic = LowRankQuadratic(u)
        found = solve_simplex_qp(p, quadratic, solution.lam * scale).value
        if not bool((found > 0).all()):
            found = solve_simplex_qp_for_count(p, quadratic, len(mine)).value
        weights[mine] = found.float().numpy()
    return weights


def notes_of_second_order(
    solutions: Sequence[ColumnSolution],
    of_target: Int[np.ndarray, " M"],
    target_names: Sequence[str],
    *,
    eta: float,
) -> tuple[str, ...]:
    """A sentence for each target whose rows were picked."""
    sentences = []
    for target, name in enumerate(target_names):
        mine = [solution for solution in solutions if of_target[solution.column] == target]
        if not mine:
            continue
        several = f" ({len(mine)} target rows)" if len(mine) > 1 else ""
        ratios = [solution.terms.ratio for solution in mine]
        missed = sum(solution.status is Status.COUNT_MISSED for solution in mine)
        sentence = (
            f"Second-order weights for target {name}{several}: eta {eta:.3g}, lambda "
            f"{_range([s.lam for s in mine])}; relative gap at most {max(s.gap for s in mine):.1e}; second- over "
            f"first-order term {_range(ratios)} at these weights, {_range([s.equal_ratio for s in mine])} with "
            f"equally weighted landmarks; {max(s.clipped_share for s in mine):.0%} of the landmarks' curvature was "
            "negative and clipped"
        )
        if missed:
            sentence += f"; for {missed} of them no lambda leaves exactly the rows wanted, and the largest were kept"
        if not any(s.terms.worth_having or s.equal_ratio > WORTH_HAVING for s in mine):
            sentence += "; below 5 %, so first-order weights would have done"
        sentences.append(sentence)
    return tuple(sentences)


def _root(curvature: Curvature, column: int, pool_size: int) -> tuple[Float[Tensor, "L R"], float]:
    """``U = C root``, ``η Q = U U^T`` for a pool of that many rows, and the share of the curvature that was clipped."""
    products = torch.from_numpy(np.array(curvature.products[column])).double()
    landmarks = len(products)
    found = landmark_root(products / landmarks, eta=curvature.eta, pool_size=pool_size)
    root = found.root if found.root.shape[1] else products.new_zeros(landmarks, 1)  # nothing bends upwards
    return root, found.clipped_share


def _mixed(
    coefficients: Float[np.ndarray, "n L"], rows: Int[np.ndarray, " m"], root: Float[Tensor, "L R"]
) -> Float[Tensor, "m R"]:
    """``U`` of some rows, block by block; float64 while it is small."""
    dtype = torch.float64 if len(rows) * root.shape[1] <= _DOUBLE_NUMBERS else torch.float32
    u = torch.empty(len(rows), root.shape[1], dtype=dtype)
    step = block_length(coefficients.shape[1], _BLOCK_VALUES)
    for start in range(0, len(rows), step):
        block = torch.from_numpy(np.asarray(coefficients[rows[start : start + step]]))
        u[start : start + step] = (block.double() @ root).to(dtype)
    return u


def _range(numbers: Sequence[float]) -> str:
    least, most = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
    return least if least == most else f"{least} to {most}"
