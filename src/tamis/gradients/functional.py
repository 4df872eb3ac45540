"""Losses as functions of a flat vector of parameters, and what trajectories need of them: gradients and curvature.

Plain autograd, differentiable twice: unlike the hooks of this room, which are made for one fast pass. A ``Problem``
says how a model maps a micro-batch (rows that went through it together) to logits; its losses are cross-entropies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.errors import InvalidSettings

__all__ = [
    "CURVATURES",
    "Curvature",
    "Layout",
    "Micro",
    "Predictions",
    "Problem",
    "check_curvature",
    "hessian_vector",
    "per_sample_gradients",
    "products",
    "third_derivative",
    "weighted_gradient",
]

# exact   the Hessian of the batch's weighted loss
# ggn     generalised Gauss-Newton: curvature of the loss in the logits, without that of the model
# fisher  empirical Fisher, sum_i w_i g_i g_iᵀ (what the paper calls GGN)
# none    no curvature at all
Curvature = Literal["exact", "ggn", "fisher", "none"]
CURVATURES: tuple[str, ...] = get_args(Curvature)

_MOST_AT_ONCE = 1 << 27  # numbers of per-sample gradients held in one pass


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Logits of a micro-batch where a loss is taken, and how row losses are made of them."""

    logits: Float[Tensor, "n classes"]
    labels: Tensor  # (n,)
    row: Tensor  # (n,) to which row of the micro-batch each belongs
    scale: Float[Tensor, " n"]  # what its cross-entropy is multiplied by in the row's loss: 1 over the row's tokens
    rows: int

    def losses(self) -> Float[Tensor, " B"]:
        """The rows' losses: sums of scaled cross-entropies."""
        each = nn.functional.cross_entropy(self.logits, self.labels, reduction="none")
        return torch.zeros(self.rows, dtype=each.dtype, device=each.device).index_add(0, self.row, each * self.scale)

    def row_sums(self, per_token: Tensor) -> Tensor:
        """``(..., n) -> (..., B)``, scaled as losses are."""
        shape = (*per_token.shape[:-1], self.rows)
        scaled = per_token * self.scale
        return torch.zeros(shape, dtype=scaled.dtype, device=scaled.device).index_add(-1, self.row, scaled)


class Layout:
    """Named tensors as one flat vector, in a fixed order."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]

    @property
    def numel(self) -> int:
        """Length of the vector."""
        return sum(self._sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " P"]:
        """A new vector of all of them."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.shapes])

    def named(self, flat: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """Views of ``flat``. One split, whose derivative is one concatenation, however many tensors there are."""
        parts = torch.split(flat, self._sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class Micro(Protocol):
    """Rows that go through the model together."""

    def __len__(self) -> int: ...

    def apart(self) -> Sequence[Micro] | None:
        """Its rows, each on its own; None if they must go together, or are faster so."""
        ...


class Problem(Protocol):
    """What is trained: a model with some parameters, seen as a function of them."""

    @property
    def layout(self) -> Layout:
        """Of the trained parameters."""
        ...

    def predict(self, params: Mapping[str, Tensor], micro: Any) -> Predictions:
        """Logits of the rows of ``micro`` at ``params``, differentiable twice; the same randomness every time."""
        ...


def check_curvature(name: str) -> None:
    """Refuse a curvature that does not exist.

    Raises:
        InvalidSettings: naming those that do.
    """
    if name not in CURVATURES:
        raise InvalidSettings(f"curvature={name!r} is unknown; choose one of {', '.join(CURVATURES)}")


def weighted_gradient(
    problem: Problem, theta: Float[Tensor, " P"], micros: Sequence[Any], weights: Float[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " P"]]:
    """Losses of all rows, and ``sum_i w_i grad l_i``; ``weights`` run over the micro-batches one after the other."""
    total, found, first = torch.zeros_like(theta), [], 0
    for micro in micros:
        leaf = theta.detach().requires_grad_()
        losses = problem.predict(problem.layout.named(leaf), micro).losses()
        own = weights[first : first + len(losses)].to(losses)
        first += len(losses)
        total += torch.autograd.grad(losses @ own, leaf)[0]
        found.append(losses.detach())
    return torch.cat(found), total


def per_sample_gradients(problem: Problem, theta: Float[Tensor, " P"], micro: Micro) -> Float[Tensor, "B P"]:
    """``grad l_i`` of every row of one micro-batch: row by row, or by one batched backward pass where memory allows.

    That pass takes every row's gradient through all of the micro-batch, B times the operations of going row by row.
    """
    apart = micro.apart() if len(micro) > 1 else None
    if apart is not None:
        return torch.cat([per_sample_gradients(problem, theta, one) for one in apart])
    leaf = theta.detach().requires_grad_()
    losses = problem.predict(problem.layout.named(leaf), micro).losses()
    if len(losses) == 1:
        return torch.autograd.grad(losses[0], leaf)[0][None]
    chunk = max(1, _MOST_AT_ONCE // len(theta))
    eye = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    parts = [_batched(losses, leaf, part) for part in torch.split(eye, chunk)]
    return torch.cat(parts)


def products(
    problem: Problem,
    theta: Float[Tensor, " P"],
    micros: Sequence[Any],
    weights: Float[Tensor, " B"],
    directions: Float[Tensor, "V P"],
    curvature: Curvature,
) -> tuple[Float[Tensor, "V B"], Float[Tensor, "V P"]]:
    """``g_iᵀ q`` of every row and ``H q``, for every direction ``q``; H is of the weighted loss.

    No per-sample gradient is formed. The scale of a direction may be anything: it is taken to length 1 on the way,
    because it drifts by orders of magnitude over long runs.
    """
    # In float64: squares of numbers that float32 still holds may be too large for it.
    lengths = torch.linalg.vector_norm(directions, dim=1, keepdim=True, dtype=torch.float64).to(directions)
    unit = directions / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    aligned, curved, first = [], torch.zeros_like(directions), 0
    for micro in micros:
        leaf = theta.detach().requires_grad_()
        predicted = problem.predict(problem.layout.named(leaf), micro)
        own = weights[first : first + predicted.rows].to(unit)
        first += predicted.rows
        inner, product = (
            _exact(predicted, leaf, own, unit)
            if curvature == "exact"
            else _through_logits(predicted, leaf, own, unit, curvature)
        )
        aligned.append(inner)
        if product is not None:
            curved += product
    return torch.cat(aligned, dim=1) * lengths, curved * lengths


def hessian_vector(
    problem: Problem,
    theta: Float[Tensor, " P"],
    micros: Sequence[Any],
    weights: Float[Tensor, " B"],
    direction: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """``H q`` of the weighted loss, exactly."""
    return products(problem, theta, micros, weights, direction[None], "exact")[1][0]


def third_derivative(
    problem: Problem,
    theta: Float[Tensor, " P"],
    micros: Sequence[Any],
    weights: Float[Tensor, " B"],
    direction: Float[Tensor, " P"],
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """``H q`` and ``½ ∇³L[q, q]`` of the weighted loss: three nested backward passes, for single directions."""
    curved, third, first = torch.zeros_like(theta), torch.zeros_like(theta), 0
    for micro in micros:
        leaf = theta.detach().requires_grad_()
        losses = problem.predict(problem.layout.named(leaf), micro).losses()
        own = weights[first : first + len(losses)].to(losses)
        first += len(losses)
        gradient = torch.autograd.grad(losses @ own, leaf, create_graph=True)[0]
        product = torch.autograd.grad(gradient @ direction, leaf, create_graph=True)[0]
        curved += product.detach()
        if product.requires_grad:
            found = torch.autograd.grad(product @ direction, leaf, allow_unused=True)[0]
            third += 0 if found is None else found / 2
    return curved, third


def _exact(predicted: Predictions, leaf: Tensor, weights: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """With ``φ = qᵀ sum_i w_i g_i``: ``∂φ/∂w`` is every ``g_iᵀ q`` and ``∂φ/∂θ`` is ``H q``."""
    dial = weights.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(predicted.losses() @ dial, leaf, create_graph=True)[0]
    if len(unit) == 1:
        inner, product = torch.autograd.grad(gradient @ unit[0], (dial, leaf))
        return inner[None], product[None]
    inners, rows = [], []
    for part in torch.split(unit, max(1, _MOST_AT_ONCE // (8 * len(leaf)))):
        inner, product = torch.autograd.grad(gradient, (dial, leaf), part, is_grads_batched=True, retain_graph=True)
        inners.append(inner)
        rows.append(product)
    return torch.cat(inners), torch.cat(rows)


def _through_logits(
    predicted: Predictions, leaf: Tensor, weights: Tensor, unit: Tensor, curvature: Curvature
) -> tuple[Tensor, Tensor | None]:
    """The change of the logits along every direction gives all ``g_iᵀ q``, and what is sent back the curvature."""
    logits = predicted.logits
    # Jᵀu is linear in u, so its derivative in u along q is J q wherever u stands: a forward pass by two backward ones.
    dial = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, leaf, dial, create_graph=True)[0]
    inners, rows = [], []
    soft = torch.softmax(logits.detach(), dim=1)
    residual = soft.clone()
    residual[torch.arange(len(soft), device=soft.device), predicted.labels] -= 1
    chunk = max(1, _MOST_AT_ONCE // (8 * max(len(leaf), logits.numel())))
    for part in torch.split(unit, chunk):
        if len(part) == 1:
            change = torch.autograd.grad(pulled @ part[0], dial, retain_graph=True)[0][None]
        else:
            change = torch.autograd.grad(pulled, dial, part, is_grads_batched=True, retain_graph=True)[0]
        inner = predicted.row_sums((change * residual).sum(dim=-1))  # (V, B)
        inners.append(inner)
        if curvature == "none":
            continue
        per_token = (weights * (inner if curvature == "fisher" else 1))[..., predicted.row] * predicted.scale
        if curvature == "fisher":
            sent = per_token[..., None] * residual  # of sum_i w_i s_i l_i, s_i held fixed
        else:
            sent = per_token[..., None] * soft * (change - (soft * change).sum(dim=-1, keepdim=True))
        if len(part) == 1:
            rows.append(torch.autograd.grad(logits, leaf, sent.reshape(logits.shape), retain_graph=True)[0][None])
        else:
            rows.append(_batched(logits, leaf, sent))
    return torch.cat(inners), torch.cat(rows) if rows else None


def _batched(outputs: Tensor, leaf: Tensor, cotangents: Tensor) -> Tensor:
    found: Tensor = torch.autograd.grad(outputs, leaf, cotangents, is_grads_batched=True, retain_graph=True)[0]
    return found
