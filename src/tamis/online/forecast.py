"""What an update should do to the target loss, to first order, so that it can be held against what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.maths.adam import adam_direction
from tamis.maths.clip import clip_factor
from tamis.model.loss import per_sample_losses
from tamis.online.adam_state import AdamMoments, learning_rate, read_adam
from tamis.online.together import add_up
from tamis.types import Batch

__all__ = ["Forecaster", "predicted_drop"]


class Forecaster:
    """Predicts what some updates do to the target rows they were made for, and looks afterwards.

    Args:
        every: updates between forecasts; 0 for none.
        clip: largest norm of an update's gradient; None or 0 for any.
        say_once: tells the user why there are none.
    """

    def __init__(self, *, every: int, clip: float | None, say_once: Callable[[str], None]) -> None:
        self._every, self._clip, self._say_once = every, clip, say_once
        self._waiting: tuple[Sequence[Batch], float, float] | None = None  # target batches, their loss, predicted drop

    def forget(self) -> None:
        """A new run begins."""
        self._waiting = None

    def is_due(self, update: int) -> bool:
        """For update number ``update``, from 1."""
        return self._every > 0 and update % self._every == 0

    def predict(
        self,
        target: Sequence[Batch],
        loss: float,
        target_gradient: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        params: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Before the update: what ``gradient`` should do to this process's ``target`` rows, whose mean is ``loss``."""
        moments = self._moments(optimizer, params)
        if moments is not None:
            drop = predicted_drop(
                target_gradient,
                gradient,
                params,
                moments,
                learning_rate=learning_rate(optimizer),
                clipped=clip_factor(gradient, self._clip),
            )
            self._waiting = (target, loss, drop)

    def compare(self, model: nn.Module, device: torch.device) -> tuple[float, float] | None:
        """After it: the drop that was predicted and the one that came; None if nothing was. All processes must call."""
        if self._waiting is None:
            return None
        batches, before, predicted = self._waiting
        self._waiting = None
        with torch.no_grad():
            losses = [per_sample_losses(model, batch.to(device)) for batch in batches]
        here = sum(float(part.double().sum()) for part in losses)  # 0 in a process without target rows
        count = sum(len(batch.rows) for batch in batches)
        sums = add_up(torch.tensor([here, count], dtype=torch.float64))
        return predicted, before - float(sums[0] / sums[1])

    def _moments(
        self, optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]
    ) -> dict[str, AdamMoments] | None:
        """None, and a line in the log, for an optimizer whose next step is not known from Adam's moments."""
        try:
            moments = read_adam(optimizer, params)
        except Unsupported as error:
            self._say_once(f"no forecast of the target loss: {error}")
            return None
        if any(state.largest_exp_avg_sq is not None for state in moments.values()):
            self._say_once("no forecast of the target loss: it is not defined for AMSGrad")
            return None
        return moments


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
