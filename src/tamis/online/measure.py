"""Inner products of a step's candidates with the target and with each other, in every form that methods ask for.

``b`` is taken in parameter space and never projected: its direction is one gradient-sized object, made matrix by
matrix. Interactions are exact, or inner products of factorized sketches whose factors carry Adam's ``D`` as one row
and one column scale. Everything is summed over matrices in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import Unsupported
from tamis.gradients.layers import inner_products
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.rows import RowGradients
from tamis.maths.adam import adam_direction, adam_jacobian, row_column
from tamis.maths.clip import clip_factors
from tamis.maths.low_rank import LowRank, cut_to_rank
from tamis.online.adam_state import AdamMoments
from tamis.online.methods.choice import AlignmentForm, InteractionForm
from tamis.projection.factorized import FactorizedProjector

__all__ = [
    "exact_interactions",
    "measure_alignments",
    "measure_lengths",
    "sketched_interactions",
]

_CHUNK = 1 << 24  # gradient numbers formed at once: 64 MB of float32

Moments = Mapping[str, AdamMoments]
Gather = Callable[[Tensor], Tensor]  # rows of every process, in the order of processes


def measure_alignments(
    form: AlignmentForm,
    rows: RowGradients,
    target: Mapping[str, Tensor],
    moments: Moments | None,
    *,
    mean: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
    clip: float | None = None,
) -> Float[Tensor, " n"]:
    """``b`` of every row: positive means that the row's part of the update lowers the target loss.

    Args:
        form: which inner product.
        rows: the candidates' gradients.
        target: the mean target gradient by parameter name.
        moments: Adam's state; None only for the raw form.
        mean: the candidates' mean gradient, clipped as the update's will be, for the Jacobian.
        rank: cut every matrix of the direction to it where that saves operations; not of ``"secant"``, ``"cosine"``.
        clip: the norm to which a candidate's gradient would be clipped if it were the update's, for those two.
    """
    if form in ("secant", "cosine"):
        assert moments is not None, f"alignment {form!r} needs the optimizer's moments"
        return _secants(rows, target, moments, unit=form == "cosine", clip=clip)

    def direction(matrix: ParamMatrix) -> Tensor:
        if form == "raw":
            return matrix.joined(target)
        assert moments is not None, f"alignment {form!r} needs the optimizer's moments"
        if form == "adam":  # FTW, equation 10
            return _joined(matrix, lambda name: moments[name].diagonal() * target[name])
        if form == "jacobian":
            assert mean is not None, "the Jacobian is taken at the candidates' mean gradient"
            return _joined(matrix, lambda name: _jacobian(moments[name], mean[name]) * target[name])
        raise ValueError(f"alignment {form!r} is not measured here")

    def cut(matrix: ParamMatrix) -> Tensor | LowRank:
        whole = direction(matrix)
        return whole if rank is None or not matrix.is_cut_to(rank) else cut_to_rank(whole, rank, seed=0)

    return rows.dots(cut)


def exact_interactions(
    form: InteractionForm, rows: RowGradients, moments: Moments | None, *, gather: Gather
) -> Float[Tensor, "n n"]:
    """``G`` of every pair of rows, of all processes, from the gradients themselves, a few rows of a matrix at a time.

    The first and third form are symmetric and positive semi-definite. ``"token-level"`` is in ``token_level``.
    """
    most = _most_rows(rows, gather)
    total: Tensor | None = None
    for matrix in rows.matrices:
        for block in _blocks(form, matrix, rows, moments, most=most):
            part = _gram(gather(block))
            total = part if total is None else total + part
    assert total is not None
    return total


def sketched_interactions(
    form: InteractionForm,
    rows: RowGradients,
    moments: Moments | None,
    *,
    projector: FactorizedProjector,
    gather: Gather,
) -> Float[Tensor, "n n"]:
    """``G`` from two-sided sketches of every matrix; unbiased but for ``D ≈ row x column``.

    ``D`` enters as scales of both factors, before they are projected, so that it and the projection do not get in each
    other's way. Vectors (norms, biases) enter in full.
    """
    most = _most_rows(rows, gather)
    total: Tensor | None = None
    for matrix in rows.matrices:
        for block in _blocks(form, matrix, rows, moments, most=most, projector=projector):
            part = _gram(gather(block))
            total = part if total is None else total + part
    assert total is not None
    return total


def measure_lengths(
    form: InteractionForm,
    rows: RowGradients,
    moments: Moments | None,
    coefficients: Float[Tensor, " n"],
    *,
    gather: Gather,
    add_up: Callable[[Tensor], Tensor],
    projector: FactorizedProjector | None = None,
) -> tuple[Float[Tensor, " n"], float]:
    """Of this process's rows ``||grad l_i||²``, and of all processes' ``||sum_i c_i grad l_i||²``, in the metric of
    ``form``: the diagonal of ``G`` and ``c^T G c``, without a pair being looked at. Exact, or of sketches if there is
    a ``projector``. Rows with the coefficient 0 take no part in the sum, finite or not.
    """
    most = _most_rows(rows, gather)
    used = coefficients.nonzero()[:, 0]
    squares, total = torch.zeros(len(rows), dtype=torch.float64), 0.0
    for matrix in rows.matrices:
        for block in _blocks(form, matrix, rows, moments, most=most, projector=projector):
            squares += torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square().cpu()
            part = coefficients[used].to(block) @ block[used.to(block.device)]
            total += float(add_up(part).double().square().sum())
    return squares, total


def _most_rows(rows: RowGradients, gather: Gather) -> int:
    """Of any process: blocks are exchanged, so all processes must cut them alike."""
    return int(gather(torch.tensor([len(rows)])).max())


def _blocks(
    form: InteractionForm,
    matrix: ParamMatrix,
    rows: RowGradients,
    moments: Moments | None,
    *,
    most: int,
    projector: FactorizedProjector | None = None,
) -> Iterator[Float[Tensor, "n F"]]:
    """The matrix's gradient of every row, scaled so that plain inner products are those of ``form``, part by part."""
    diagonal = None
    if form in ("metric", "preconditioned"):
        assert moments is not None, f"interactions {form!r} need the optimizer's moments"
        diagonal = _joined(matrix, lambda name: moments[name].diagonal())
    root = form == "metric"
    if projector is not None and matrix.kind != "vector":
        left, right = projector.sides(matrix.layers[0], matrix.params[0][1].device, torch.float32)
        if diagonal is not None:
            # D itself is taken apart, over means of second moments, and the root of each side after that.
            r, q = row_column(diagonal)
            left = _scaled(r.sqrt() if root else r, left)
            right = _scaled(q.sqrt() if root else q, right)
        yield rows.sketches(matrix, left, right)
        return
    scale = diagonal.sqrt() if diagonal is not None and root else diagonal
    outs, ins = matrix.shape
    step = max(1, _CHUNK // max(1, most * ins))
    for first in range(0, outs, step):
        stop = min(outs, first + step)
        part = rows.rows_of(matrix, first, stop)
        yield (part if scale is None else part * scale[first:stop].to(part)).flatten(1)


def _gram(features: Tensor) -> Tensor:
    return inner_products(features, features).double().cpu()


def _scaled(scale: Tensor, side: Tensor | None) -> Tensor:
    return torch.diag(scale) if side is None else scale[:, None] * side.to(scale)


def _secants(
    rows: RowGradients, target: Mapping[str, Tensor], moments: Moments, *, unit: bool, clip: float | None
) -> Tensor:
    """``<Γ_i, grad t>``, over ``||Γ_i||`` if ``unit``; ``Γ_i`` is the step with candidate ``i`` as its gradient."""
    dots = torch.zeros(len(rows), dtype=torch.float64)
    squares = torch.zeros(len(rows), dtype=torch.float64)
    factors = torch.ones(len(rows), dtype=torch.float64) if not clip else _clip_factors(rows, clip)
    for matrix in rows.matrices:
        state = _common_state(matrix, moments)
        goal = matrix.joined(target)
        m = _joined(matrix, lambda name: moments[name].exp_avg)
        v = _joined(matrix, lambda name: moments[name].exp_avg_sq)
        outs, ins = matrix.shape
        step = max(1, _CHUNK // max(1, len(rows) * ins))
        for first in range(0, outs, step):
            part = slice(first, min(outs, first + step))
            grads = rows.rows_of(matrix, part.start, part.stop)
            if clip:
                grads = grads * factors.to(grads)[:, None, None]
            gamma = adam_direction(
                grads, m[part].to(grads), v[part].to(grads), step=state.step, beta1=state.beta1, beta2=state.beta2,
                eps=state.eps,
            )  # fmt: skip
            gamma = gamma.mul_(state.rate).flatten(1)
            dots += inner_products(gamma, goal[part].to(gamma).reshape(1, -1))[:, 0].double().cpu()
            if unit:
                squares += gamma.double().square().sum(dim=1).cpu()
    return dots / squares.sqrt().clamp_min(1e-300) if unit else dots


def _clip_factors(rows: RowGradients, clip: float) -> Tensor:
    """What clipping to the norm ``clip`` multiplies every row's gradient by."""
    squares = torch.zeros(len(rows), dtype=torch.float64)
    for matrix in rows.matrices:
        for block in _blocks("raw", matrix, rows, None, most=len(rows)):
            squares += torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square().cpu()
    return clip_factors(squares.sqrt(), clip)


def _common_state(matrix: ParamMatrix, moments: Moments) -> AdamMoments:
    first = moments[matrix.params[0][0]]
    for name, _ in matrix.params:
        other = moments[name]
        _no_amsgrad(name, other)
        _no_coupled_decay(name, other)
        same = (first.step, first.beta1, first.beta2, first.eps, first.rate)
        if same != (other.step, other.beta1, other.beta2, other.eps, other.rate):
            raise Unsupported(
                f"'{matrix.params[0][0]}' and '{name}' belong to one layer but have other steps, betas, eps or "
                "learning rates; put them into groups that agree, or use alignment='adam'"
            )
    return first


def _jacobian(moments: AdamMoments, mean: Tensor) -> Tensor:
    _no_amsgrad("a parameter", moments)
    _no_coupled_decay("a parameter", moments)
    k = adam_jacobian(
        mean, moments.exp_avg, moments.exp_avg_sq,
        step=moments.step, beta1=moments.beta1, beta2=moments.beta2, eps=moments.eps,
    )  # fmt: skip
    return k * moments.rate


def _no_amsgrad(name: str, moments: AdamMoments) -> None:
    if moments.largest_exp_avg_sq is not None:
        raise Unsupported(f"{name} is trained with AMSGrad, for which only alignment='adam' and 'raw' are defined")


def _no_coupled_decay(name: str, moments: AdamMoments) -> None:
    """Its decay is part of every gradient, so a candidate's own step is not made of the candidate's gradient alone."""
    if moments.decay_is_coupled and moments.decay:
        raise Unsupported(
            f"{name} is trained by Adam with weight_decay={moments.decay}, which it adds to gradients; use AdamW, or "
            "alignment='adam' or 'raw'"
        )


def _joined(matrix: ParamMatrix, tensor_of: Callable[[str], Tensor]) -> Tensor:
    return matrix.joined({name: tensor_of(name) for name, _ in matrix.params})
