"""The gradient that the optimizer gets: put together in float32, clipped, without rows that are broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from online_steps import CANDIDATES, TARGET, autograd_rows, optimizer_of, split
from tamis.maths.adam import adam_direction, adam_jacobian
from tamis.maths.low_rank import cut_to_rank
from tamis.model.loss import per_sample_losses
from tamis.online import FilterThenWeight, Full, Tilt
from tamis.online import measure as online_measure
from tamis.online.adam_state import learning_rate, read_adam
from tamis.online.step import OnlineStep, StepSettings
from tiny_models import random_batch, tiny_model

SLOWER = 0.4  # the learning rate of one group in units of the other's


def _in_one(gradient: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([gradient[name].double().flatten() for name in names])


@pytest.mark.parametrize("lora", [False, True])
def test_under_autocast_many_passes_add_up_as_well_as_ordinary_backward_passes(lora: bool) -> None:
    """A pass a row: a running sum in bfloat16 would lose what every further row adds."""
    model = tiny_model("llama", lora=lora, dtype=torch.float32)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    optimizer = optimizer_of(model)
    batch = random_batch([12 + i % 5 for i in range(64)], seed=7)

    def proposed() -> Tensor:
        found = OnlineStep(model, Full(keep=16, oversample=4)).propose(split(batch, 1), [], optimizer)
        assert {grad.dtype for grad in found.gradient.values()} == {torch.float32}
        return _in_one(found.gradient, names) / found.divisor

    exact = proposed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = proposed()
    for row in split(batch, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = per_sample_losses(model, row).sum() / 64
        loss.backward()
    params = dict(model.named_parameters())
    plain = torch.cat([params[name].grad.double().flatten() for name in names])  # type: ignore[union-attr]
    assert 0 < (ours - exact).norm() <= 1.15 * (plain - exact).norm()


def test_a_direction_is_cut_to_a_low_rank_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("llama", dtype=torch.float32), list[torch.dtype]()

    def watched(whole: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = cut_to_rank(whole, *args, **kwargs)
        seen.extend((found.left.dtype, found.right.dtype))
        return found

    monkeypatch.setattr(online_measure, "cut_to_rank", watched)
    optimizer, method = optimizer_of(model), FilterThenWeight(keep=3, oversample=2, cold_start=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        OnlineStep(model, method, StepSettings(target_rank=1)).propose([CANDIDATES], [TARGET], optimizer)
    assert seen and {*seen} == {torch.float32}


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("form", ["jacobian", "secant", "cosine"])
def test_forms_that_are_not_linear_are_taken_at_the_gradient_that_the_optimizer_gets(
    form: Any, clip: float | None, reduction: Any
) -> None:
    """K at the clipped mean of the rows, or of their tokens; the step of a candidate alone, clipped as it would be."""
    model = tiny_model("gpt2", tied=True)
    optimizer = _with_slower_mlps(model)
    moments = read_adam(optimizer, OnlineStep(model, Full()).params)
    names = list(moments)
    rows, goal = autograd_rows(model, CANDIDATES, names), autograd_rows(model, TARGET, names)
    tokens = CANDIDATES.supervised[:, 1:].sum(dim=1).double()
    size = tokens / tokens.mean() if reduction == "tokens" else torch.ones(6, dtype=torch.float64)
    if form == "jacobian":
        mean = {name: torch.tensordot(size / size.sum(), rows[name], dims=1) for name in names}
        taken = {name: grad[None] for name, grad in _clipped(mean, clip).items()}
    else:
        alone = [_clipped({name: rows[name][row] for name in names}, clip) for row in range(6)]
        taken = {name: torch.stack([one[name] for one in alone]) for name in names}
    expected, squares = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for name, state in moments.items():
        of = {"step": state.step, "beta1": state.beta1, "beta2": state.beta2, "eps": state.eps}
        t = goal[name].mean(dim=0)
        if form == "jacobian":
            step = rows[name] * adam_jacobian(taken[name][0], state.exp_avg, state.exp_avg_sq, **of)
        else:
            step = adam_direction(taken[name], state.exp_avg, state.exp_avg_sq, **of)
        step = step * (SLOWER if ".mlp." in name else 1.0)
        expected += (step * t).flatten(1).sum(dim=1)
        squares += step.square().flatten(1).sum(dim=1)
    expected = expected / squares.sqrt() if form == "cosine" else expected * size
    method = FilterThenWeight(keep=3, oversample=2, cold_start=1, alignment=form, filter="top", weights="none")
    step = OnlineStep(model, method, StepSettings(reduction=reduction), clip=clip)
    found = step.propose(split(CANDIDATES, 2), [TARGET], optimizer).alignments
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def _with_slower_mlps(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups of other learning rates, after a few ordinary steps."""
    named = list(model.named_parameters())
    slow = [param for name, param in named if ".mlp." in name]
    rest = [param for name, param in named if ".mlp." not in name]
    optimizer = torch.optim.AdamW([{"params": slow, "lr": SLOWER * 1e-2}, {"params": rest}], lr=1e-2)
    for seed in (100, 101, 102):
        per_sample_losses(model, random_batch((6, 7), seed=seed)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learning_rate(optimizer) == 1e-2, "the largest, which the others are measured by"
    return optimizer


def _clipped(gradient: dict[str, Tensor], clip: float | None) -> dict[str, Tensor]:
    """By PyTorch."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in gradient.values()]
    for param, grad in zip(params, gradient.values(), strict=True):
        param.grad = grad.clone()
    if clip is not None:
        assert float(torch.nn.utils.clip_grad_norm_(params, clip)) > 2 * clip, "the case must clip"
    return {name: param.grad for name, param in zip(gradient, params, strict=True)}  # type: ignore[misc]


class _Broken(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``factor`` at some rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, factor: float) -> Tensor:
        ctx.rows, ctx.factor = rows, factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        scale = torch.ones_like(grad).index_fill(0, ctx.rows, ctx.factor)
        return grad * scale, None, None


def _break_gradient(model: nn.Module, row: int, factor: float) -> None:
    """From now on that of a row of ``CANDIDATES``, behind the first block; its loss stays as it is."""
    start, broken = CANDIDATES.input_ids[row, :4].clone(), dict[str, Tensor]()

    def find(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        broken["rows"] = (kwargs["input_ids"][:, :4] == start).all(dim=1).nonzero()[:, 0]

    model.register_forward_pre_hook(find, with_kwargs=True)
    model.model.layers[0].register_forward_hook(  # type: ignore[union-attr, index]
        lambda module, args, out: _Broken.apply(out, broken["rows"], factor) if out.requires_grad else out
    )


@pytest.mark.parametrize("method", [FilterThenWeight, Tilt])
@pytest.mark.parametrize("rows_of_a_pass", [2, 6])
def test_a_row_with_a_finite_loss_and_a_broken_gradient_is_left_out_of_the_jacobians_mean(
    method: Any, rows_of_a_pass: int
) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    optimizer = optimizer_of(model)
    _break_gradient(model, 2, float("nan"))
    chooses = method(keep=3, oversample=2, cold_start=1, alignment="jacobian")
    proposal = OnlineStep(model, chooses).propose(split(CANDIDATES, rows_of_a_pass), split(TARGET, 3), optimizer)
    assert list(proposal.dropped) == [2]
    assert all(bool(torch.isfinite(grad).all()) for grad in proposal.gradient.values())
    kept = [batch for batch in split(CANDIDATES, 1) if int(batch.rows[0]) != int(CANDIDATES.rows[2])]
    without = OnlineStep(model, chooses).propose(kept, split(TARGET, 3), optimizer)
    np.testing.assert_allclose(np.delete(proposal.alignments, 2), without.alignments, rtol=1e-4)


@pytest.mark.parametrize("dim", [None, 4], ids=["exact", "sketched"])
def test_a_row_whose_product_with_itself_alone_overflows_is_left_out(dim: int | None) -> None:
    """A gradient of 1e25 has a finite product with the target and none with itself in float32; without the row the
    same is chosen and weighted.
    """
    model = tiny_model("llama", dtype=torch.float32)
    optimizer = optimizer_of(model)
    _break_gradient(model, 2, 1e25)
    chooses = FilterThenWeight(keep=3, oversample=2, projection_dim=dim)
    proposal = OnlineStep(model, chooses).propose([CANDIDATES], [TARGET], optimizer)
    plain = FilterThenWeight(keep=3, oversample=2, filter="top", weights="none")  # looks at no pairs
    aligned = OnlineStep(model, plain).propose([CANDIDATES], [TARGET], optimizer)
    assert not len(aligned.dropped) and abs(aligned.alignments[2]) > 1e20  # type: ignore[index]
    assert list(proposal.dropped) == [2]
    others = np.array([0, 1, 3, 4, 5])
    kept = [batch for batch in split(CANDIDATES, 1) if int(batch.rows[0]) in others]
    without = OnlineStep(model, chooses).propose(kept, [TARGET], optimizer)
    assert proposal.choice.rows.tolist() == others[without.choice.rows].tolist()
    np.testing.assert_allclose(proposal.choice.weights, without.choice.weights, rtol=1e-3)
    for name, grad in without.gradient.items():
        torch.testing.assert_close(proposal.gradient[name], grad, rtol=1e-3, atol=1e-5)
