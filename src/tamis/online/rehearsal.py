"""Look-ahead scores: train ahead without touching the model, take the target's gradient there, and sweep back.

All of it happens on copies: losses are functions of a flat vector, the live model and optimizer are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.gradients.functional import Problem, per_sample_gradients, weighted_gradient
from tamis.maths.autocast import autocast_off
from tamis.maths.step_derivative import AdamStep
from tamis.online.batches import supervised_tokens
from tamis.online.methods.lookahead import Lookahead
from tamis.trajectory.adjoint import Channel, start_channel, sweep_step
from tamis.trajectory.causal import CausalProblem
from tamis.trajectory.optimizer_state import LiveOptimizer, live_optimizer
from tamis.trajectory.replay import Played, mean_gradient, play
from tamis.trajectory.run import Rule, State, Step
from tamis.trajectory.secant import SecantWindow
from tamis.trajectory.token_rows import TokenMicro
from tamis.types import Batch

__all__ = ["coming_rates", "look_ahead", "rehearse"]


@autocast_off()  # a trainer's own context would compute in 16 bits what no pass of the model does
def rehearse(
    method: Lookahead,
    model: nn.Module,
    optimizer: Any,
    block: Sequence[Sequence[Batch]],
    target: Sequence[Batch],
    *,
    rates: Sequence[tuple[float, ...]],
    clip: float | None,
    reduction: str = "rows",
    autocast: torch.dtype | None = None,
) -> list[Tensor]:
    """Scores of the candidates of every slot of ``block``, float64: positive, the candidate lowers the target loss.

    A candidate whose loss or gradient is not finite has no score, NaN, and no part in the rehearsal.

    Args:
        method: horizon, form and curvature.
        model: as it is before the coming update.
        optimizer: likewise, AdamW or Adam.
        block: the candidates of the coming updates, one list of batches for each; of the "frozen" form, of one.
        target: target rows.
        rates: of every parameter group, for as many coming updates as are looked ahead.
        clip: largest norm of an update's gradient.
        reduction: whether rows or supervised tokens count alike in an update.
        autocast: what the trainer computes in.

    Raises:
        Unsupported: the optimizer's steps cannot be foreseen.
    """
    live = live_optimizer(optimizer, model)
    if live.kind == "sgd":
        raise Unsupported("lookahead goes through the dynamics of Adam's moments, which SGD has not; train by AdamW")
    problem = CausalProblem(model, live.shapes, autocast=autocast)
    state = live.state()
    micros = [TokenMicro(batch=batch) for batch in target]

    def looked_ahead(slots: Sequence[Sequence[Batch]]) -> list[Tensor]:
        steps = [
            _step(index, batches, own, reduction, state.theta)
            for index, (batches, own) in enumerate(zip(slots, rates, strict=False))
        ]
        return look_ahead(method, problem, live.rule(clip), state, steps, micros, rates=rates)

    found = looked_ahead(block)
    if all(bool(torch.isfinite(scores).all()) for scores in found):
        return found
    # One broken row in a block makes all its scores NaN. Seeking it costs a pass for every row, once in a long while.
    good = [_finite_rows(problem, state.theta, batches) for batches in block]
    if all(bool(own.all()) for own in good):
        return found
    usable = list(takewhile(lambda own: bool(own.any()), good))
    found = [torch.full((len(own),), torch.nan, dtype=torch.float64) for own in good]
    if usable:
        again = looked_ahead([_rows_of(batches, own) for batches, own in zip(block, usable, strict=False)])
        for scores, own, these in zip(found, usable, again, strict=False):
            scores[own] = these
    return found


def look_ahead(
    method: Lookahead,
    problem: Problem,
    rule: Rule,
    state: State,
    steps: Sequence[Step],
    target: Sequence[Any],
    *,
    rates: Sequence[tuple[float, ...]],
) -> list[Tensor]:
    """The same of any problem: scores of the candidates of ``steps``, updates on all of them from ``state`` on.

    Args:
        method: horizon, form and curvature.
        problem: what is trained.
        rule: AdamW's or Adam's.
        state: before the first of ``steps``.
        steps: the coming updates; of the "frozen" form, one.
        target: micro-batches of target rows.
        rates: of every parameter group, for as many coming updates as are looked ahead.
    """
    played, now = list[Played](), state
    for step in steps:
        played.append(play(problem, rule, now, step))
        now = played[-1].after
    at = now.theta if method.form == "rehearsal" and method.horizon > 1 else state.theta
    _, goal = mean_gradient(problem, at, target)
    channel = start_channel("ahead", "adamw-influence", method.curvature, goal[None], moments=2)
    if method.form == "frozen":
        _repeat(problem, rule, played[0], channel, rates[1 : method.horizon])
    window = SecantWindow(1) if method.secant else None
    found: list[Tensor] = []
    for one in reversed(played):
        if one is played[0]:
            channel.curvature = "none"  # what it would carry further back is not needed
        if window is not None:
            window.enter(one, channel.adjoint)
            grads = [per_sample_gradients(problem, one.before.theta, micro) for micro in one.step.micros]
            scores = window.scores(one, torch.cat(grads), one.step.weights)
        else:
            scores = torch.zeros(0)
        if window is None or one is not played[0]:
            first_order = sweep_step(problem, one, channel)
            scores = first_order if window is None else scores
        found.insert(0, scores[:, 0].double().cpu())
    return found


def coming_rates(scheduler: Any, live: LiveOptimizer, count: int) -> list[tuple[float, ...]] | None:
    """Learning rates of the coming ``count`` updates, by group; None if the scheduler cannot be foreseen."""
    inner = getattr(scheduler, "scheduler", scheduler)  # Accelerate wraps it
    now = live.rates()
    if count == 1:
        return [now]
    if type(inner) is not torch.optim.lr_scheduler.LambdaLR:
        return None
    used = [i for i, group in enumerate(inner.optimizer.param_groups) if group["params"]]
    return [
        tuple(float(inner.base_lrs[i] * inner.lr_lambdas[i](inner.last_epoch + ahead)) for i in used)
        for ahead in range(count)
    ]


def _repeat(problem: Problem, rule: Rule, first: Played, channel: Channel, rates: Sequence[tuple[float, ...]]) -> None:
    """Carry the adjoint back through later updates that are taken to be as the first one was, but for c1, c2 and η."""
    derivative = first.derivative()
    assert isinstance(derivative, AdamStep)
    for ahead, own in reversed(list(enumerate(rates, start=1))):
        later = derivative.advanced(count=first.after.count + ahead, lr=rule.over(first.g, own))
        sweep_step(problem, first, channel, derivative=later)


def _finite_rows(problem: CausalProblem, theta: Tensor, batches: Sequence[Batch]) -> Tensor:
    """(n,) bool: rows whose own loss and gradient are finite."""
    found = []
    for row in (row for batch in batches for row in batch.split(1)):
        loss, gradient = weighted_gradient(problem, theta, [TokenMicro(batch=row)], theta.new_ones(1))
        found.append(bool(torch.isfinite(loss).all()) and bool(torch.isfinite(gradient).all()))
    return torch.tensor(found)


def _rows_of(batches: Sequence[Batch], chosen: Tensor) -> list[Batch]:
    """The chosen rows alone, in batches as they were; none that is empty."""
    found = []
    sizes = [len(batch.rows) for batch in batches]
    for batch, own in zip(batches, torch.split(chosen, sizes), strict=True):
        if bool(own.any()):
            own = own.to(batch.rows.device)
            found.append(
                Batch(
                    rows=batch.rows[own],
                    input_ids=batch.input_ids[own],
                    attention_mask=batch.attention_mask[own],
                    supervised=batch.supervised[own],
                )
            )
    return found


def _step(index: int, batches: Sequence[Batch], rates: tuple[float, ...], reduction: str, like: Tensor) -> Step:
    tokens = supervised_tokens(batches).double()
    counts = tokens if reduction == "tokens" else torch.ones_like(tokens)
    rows = torch.cat([batch.rows.cpu() for batch in batches]).numpy()
    return Step(
        index=index,
        micros=tuple(TokenMicro(batch=batch) for batch in batches),
        rows=rows,
        weights=(counts / counts.sum()).to(like.device),
        rates=rates,
    )
