"""Similarities of equal token positions only: number 6 of the ablations in section 4.4 of *Filter-then-Weight*.

A gradient of a linear layer is a sum over positions, ``sum_t g_t a_t^T``. The method compares such sums, so that every
position of one row meets every position of the other; here position ``t`` meets position ``t`` alone, in alignments
with the target and in interactions. Positions count from the first token of a row. What has no positions left, or adds
several kinds of them up, enters in full: norms, biases of their own, lookup tables, tables tied to the head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import Unsupported
from tamis.gradients.layers import inner_products, with_bias_column
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.rows import RowGradients
from tamis.model.processes import world_size
from tamis.online.adam_state import AdamMoments
from tamis.online.methods.choice import AlignmentForm
from tamis.online.shadow import ShadowMoments
from tamis.projection.factorized import FactorizedProjector

__all__ = ["position_alignments", "position_interactions"]

Moments = Mapping[str, AdamMoments]


def position_alignments(
    form: AlignmentForm,
    rows: RowGradients,
    target: RowGradients,
    moments: Moments | None,
    *,
    shadow: ShadowMoments | None = None,
) -> Float[Tensor, " n"]:
    """``sum_t <g_it a_it^T, D * mean_v g_vt a_vt^T>`` over target rows ``v``, summed over matrices.

    Args:
        form: ``adam`` (exact ``D``), ``projected`` (both sides sketched, ``D`` of ``shadow``) or ``raw`` (``D`` = 1).
        rows: the candidates, made with ``keep_factors``.
        target: the target's rows, likewise.
        moments: Adam's state; None only for the raw form.
        shadow: the published second moments; None but for the projected form.

    Raises:
        Unsupported: there are several processes.
    """
    _refuse_several()
    total = torch.zeros(len(rows), dtype=torch.float64)
    mean = target.weighted(torch.full((len(target),), 1 / len(target), dtype=torch.float64))
    for matrix in rows.matrices:
        sides: tuple[Tensor | None, Tensor | None] = (None, None)
        if form == "projected":
            assert shadow is not None and moments is not None
            diagonal: Tensor | None = shadow.diagonal(matrix, moments)
            sides = shadow.sides(matrix)
        elif form == "adam":
            assert moments is not None
            states = moments
            diagonal = matrix.joined({name: states[name].diagonal() for name, _ in matrix.params})
        else:
            diagonal = None
        if not _has_positions(matrix):
            goal = _sketched(matrix.joined(mean), *sides)
            goal = goal if diagonal is None else goal * diagonal.to(goal)
            features = rows.sketches(matrix, *sides)
            total += inner_products(features, goal.flatten()[None].to(features))[:, 0].double().cpu()
            continue
        act, grad = _by_position(matrix, rows, *sides)  # (T, n, K)
        goal_act, goal_grad = _by_position(matrix, target, *sides)  # (T, m, K)
        for t in range(min(len(act), len(goal_act))):
            at = goal_grad[t].mT @ goal_act[t] / len(target)  # (O, I)
            at = at if diagonal is None else at * diagonal.to(at)
            total += ((grad[t] @ at) * act[t]).sum(dim=1).cpu()
    return total


def position_interactions(rows: RowGradients, *, projector: FactorizedProjector | None) -> Float[Tensor, "n n"]:
    """``sum_t <g_it a_it^T, g_jt a_jt^T>``, of the factors or of their projections, summed over matrices.

    Raises:
        Unsupported: there are several processes.
    """
    _refuse_several()
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for matrix in rows.matrices:
        sides: tuple[Tensor | None, Tensor | None] = (None, None)
        if projector is not None and matrix.kind != "vector":
            sides = projector.sides(matrix.layers[0], matrix.params[0][1].device, torch.float32)
        if _has_positions(matrix):
            act, grad = _by_position(matrix, rows, *sides)
            total += ((act @ act.mT) * (grad @ grad.mT)).sum(dim=0).cpu()
        else:
            features = rows.sketches(matrix, *sides)
            total += inner_products(features, features).double().cpu()
    return total


def _refuse_several() -> None:
    if world_size() > 1:
        raise Unsupported("token-level similarities are an ablation for one process; run it on one")


def _has_positions(matrix: ParamMatrix) -> bool:
    return matrix.kind in ("linear", "conv1d") and len(matrix.layers) == 1


def _by_position(
    matrix: ParamMatrix, rows: RowGradients, left: Tensor | None, right: Tensor | None
) -> tuple[Float[Tensor, "T n I"], Float[Tensor, "T n O"]]:
    """Inputs and output gradients of every row, positions first, zeros after a row's end; projected if there are
    sides."""
    (layer,) = matrix.layers
    held = rows.factors(layer)
    width = max(part.act.shape[1] for part in held)

    def padded(parts: list[Tensor], side: Tensor | None) -> Tensor:
        same = [torch.nn.functional.pad(part.double(), (0, 0, 0, width - part.shape[1])) for part in parts]
        found = torch.cat(same).transpose(0, 1)
        return found if side is None else found @ side.to(found)

    acts = [with_bias_column(part.act, has_bias=layer.has_bias) for part in held]
    return padded(acts, right), padded([part.grad_out for part in held], left)


def _sketched(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    found = matrix.double()
    found = found if right is None else found @ right.to(found)
    return found if left is None else left.to(found).T @ found
