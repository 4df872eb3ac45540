"""The scores of all samples of all steps, in one sweep from the end of a run to its beginning (the adjoint form).

For a final value ``ℓ(θ_T)`` the sweep carries its derivative in the state, ``(a, b, c)`` for Adam's ``(θ, m, v)``. With
the step's derivative (``maths.step_derivative``) and the clip Jacobian J, the influence of removing sample i is::

    q   = J (K_θ a + K_m b + K_v c)      derivative in the raw gradient of the step
    I_i = -w_i g_iᵀ q                    positive: removing the sample raises the loss, so the sample helps
    (a, b, c) ← A⁰ᵀ (a, b, c) + (H q, 0, 0)

``H`` is the exact Hessian of the step's loss, its Gauss-Newton part, the empirical Fisher, or left out. AdamW-influence
is this with the derivative of AdamW; SGD-influence (Hara et al., 2019) with that of plain SGD at the same rates; both
with the derivative of the run's clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidSettings
from tamis.gradients.functional import Curvature, Problem, check_curvature, products
from tamis.maths.step_derivative import StepDerivative
from tamis.trajectory.replay import Played
from tamis.trajectory.run import Step

__all__ = [
    "Channel",
    "InfluenceMethod",
    "final_values",
    "refuse_lone_sample",
    "renormalised",
    "start_channel",
    "steps_back",
    "sweep_step",
    "tracin_step",
]

InfluenceMethod = Literal["adamw-influence", "sgd-influence"]


@dataclass(kw_only=True)
class Channel:
    """One way to score, and its adjoint on the way back; V final values at once."""

    name: str
    method: InfluenceMethod
    curvature: Curvature
    adjoint: tuple[Float[Tensor, "V P"], ...]  # after the step that comes next on the way back

    def __post_init__(self) -> None:
        check_curvature(self.curvature)
        if self.method not in ("adamw-influence", "sgd-influence"):
            raise InvalidSettings(f"method={self.method!r} has no adjoint; choose adamw-influence or sgd-influence")

    def derivative(self, played: Played) -> StepDerivative:
        """Of the step, as the channel's method sees it."""
        if self.method == "sgd-influence":
            return played.rule.as_plain_sgd(played.g, played.step.rates)
        return played.derivative()


def steps_back(curvature: str, *, values: int = 1) -> float:
    """Training steps on the same rows that the way back over one update is as dear as; measured.

    With several final ``values`` the pass that builds the graph, one step, is shared; the rest is paid for each.
    """
    return 1 + values * {"none": 1.0, "exact": 2.0}.get(curvature, 1.5)


def start_channel(
    name: str, method: InfluenceMethod, curvature: Curvature, goal: Float[Tensor, "V P"], *, moments: int
) -> Channel:
    """At the end of the run, where the final values depend on the parameters alone.

    ``goal`` holds the gradients of the final values, ``moments`` is how many the run's optimizer keeps.
    """
    slots = 1 if method == "sgd-influence" else moments
    adjoint = (goal, *(torch.zeros_like(goal) for _ in range(slots)))
    return Channel(name=name, method=method, curvature=curvature, adjoint=adjoint)


def sweep_step(
    problem: Problem, played: Played, channel: Channel, *, derivative: StepDerivative | None = None
) -> Float[Tensor, "B V"]:
    """Scores of the step's samples; the channel's adjoint moves to before the step.

    ``derivative`` stands in for the step's own where it is taken for another step.
    """
    derivative = channel.derivative(played) if derivative is None else derivative
    q = played.clip.jacobian(derivative.inject(channel.adjoint))
    step = played.step
    inner, curved = products(problem, played.before.theta, step.micros, step.weights, q, channel.curvature)
    channel.adjoint = derivative.back(channel.adjoint, 0.0 if channel.curvature == "none" else curved)
    return -(inner * step.weights.to(inner)).T


def tracin_step(problem: Problem, played: Played, goal: Float[Tensor, "V P"]) -> Float[Tensor, "B V"]:
    """``w_i η_t <g_i, ∇ℓ>`` with both gradients before the step: TracIn along the run (Pruthi et al., 2020).

    ``goal`` holds the target gradients at the step's own parameters.
    """
    step = played.step
    pulled = -played.rule.as_plain_sgd(played.g, step.rates).inject((goal, torch.zeros_like(goal)))
    inner, _ = products(problem, played.before.theta, step.micros, step.weights, pulled, "none")
    return (inner * step.weights.to(inner)).T


def renormalised(scores: Float[Tensor, "B V"], weights: Float[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """The same under the other reading of removal, in which the rest of the batch takes over the sample's weight.

    ``(W I_i - w_i sum_j I_j) / (W - w_i)`` with ``W = sum_j w_j``; for equal weights, the score centred within its
    batch times ``B / (B - 1)``. Such scores cannot be compared across steps. A batch of one sample has no rest: NaN,
    which ``refuse_lone_sample`` prevents.
    """
    w = weights.to(scores)[:, None]
    total, rest = w.sum(), w.sum() - w
    found = (total * scores - w * scores.sum(dim=0, keepdim=True)) / rest
    return torch.where(rest.abs() > 1e-12 * total.abs(), found, torch.full_like(found, torch.nan))


def refuse_lone_sample(step: Step) -> None:
    """Refuse what has no meaning under the other reading of removal.

    Raises:
        InvalidSettings: the step has one sample only.
    """
    if len(step.rows) == 1:
        raise InvalidSettings(
            f"update {step.index + 1} was made of one sample, whose weight no other can take over; use removal=subtract"
        )


def final_values(problem: Problem, theta: Tensor, micros: Sequence[object]) -> Tensor:
    """Losses of the target rows."""
    with torch.no_grad():
        parts = [problem.predict(problem.layout.named(theta), micro).losses() for micro in micros]
    return torch.cat(parts)
