"""What an update should do to the target loss, to first order, so that it can be held against what it did."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tamis.maths.adam import adam_direction
from tamis.online.adam_state import AdamMoments

__all__ = ["clip_factor", "predicted_drop"]


def clip_factor(gradient: Mapping[str, Tensor], most: float | None) -> float:
    """What clipping to the norm ``most`` (None or 0: no clipping) will multiply ``gradient`` by, as PyTorch clips."""
    if not most:
        return 1.0
    norm = float(torch.stack([grad.double().square().sum().cpu() for grad in gradient.values()]).sum().sqrt())
    return min(1.0, most / (norm + 1e-6))


def predicted_drop(
    target: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    params: Mapping[str, nn.Parameter],
    moments: Mapping[str, AdamMoments],
    *,
    learning_rate: float,
    clipped: float,
) -> float:
    """``<grad t, θ - θ'>``, where ``θ'`` are the parameters after the step of Adam that ``gradient`` will cause.

    Positive: the target loss should fall by that much. Clipping and weight decay, coupled or not, are part of the step,
    and the second moments move with the gradient; only the curvature of the target loss is left out.

    Args:
        target: mean gradient of the target loss, by parameter name.
        gradient: of the update, before clipping.
        params: the parameters as they are.
        moments: Adam's, as they are, without AMSGrad.
        learning_rate: the largest of the coming step's.
        clipped: what clipping will multiply the gradient by, of ``clip_factor``.
    """
    total = 0.0
    for name, goal in target.items():
        state, decay = moments[name], moments[name].decay * params[name].detach()
        taken = gradient[name] * clipped
        direction = adam_direction(
            (taken + decay if state.decay_is_coupled else taken)[None], state.exp_avg, state.exp_avg_sq,
            step=state.step, beta1=state.beta1, beta2=state.beta2, eps=state.eps,
        )[0]  # fmt: skip
        direction = direction if state.decay_is_coupled else direction + decay
        total += state.rate * float((goal * direction).double().sum())
    return learning_rate * total
