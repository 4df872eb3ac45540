"""What an update should do to the target loss, to first order, so that it can be held against what it did."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tamis.maths.adam import adam_direction
from tamis.online.adam_state import AdamMoments

__all__ = ["predicted_drop"]


def predicted_drop(
    target: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    params: Mapping[str, nn.Parameter],
    moments: Mapping[str, AdamMoments],
    *,
    learning_rate: float,
    decay: Mapping[str, float],
    clip: float | None,
) -> float:
    """``<grad t, θ - θ'>``, where ``θ'`` are the parameters after the AdamW step that ``gradient`` will cause.

    Positive: the target loss should fall by that much. Clipping and decoupled weight decay are part of the step, and
    the second moments move with the gradient; only the curvature of the target loss is left out.

    Args:
        target: mean gradient of the target loss, by parameter name.
        gradient: of the update, before clipping.
        params: the parameters as they are.
        moments: Adam's, as they are.
        learning_rate: the largest of the coming step's.
        decay: weight decay by parameter name.
        clip: largest norm of the gradient, None for no clipping.
    """
    factor = 1.0
    if clip is not None:
        norm = float(torch.stack([grad.double().square().sum().cpu() for grad in gradient.values()]).sum().sqrt())
        factor = min(1.0, clip / (norm + 1e-6))  # as PyTorch clips
    total = 0.0
    for name, goal in target.items():
        state = moments[name]
        direction = adam_direction(
            (gradient[name] * factor)[None], state.exp_avg, state.exp_avg_sq,
            step=state.step, beta1=state.beta1, beta2=state.beta2, eps=state.eps,
        )[0]  # fmt: skip
        direction = direction + decay[name] * params[name].detach()
        total += state.rate * float((goal * direction).double().sum())
    return learning_rate * total
