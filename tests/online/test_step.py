"""One online step against plain definitions: per-sample autograd, ordinary training with the real AdamW, float64."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oracles import reference_loss
from tamis.errors import InvalidInput, InvalidSettings, NonFinite, Unsupported
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients, hold_gradients
from tamis.model.trainable import trainable_layers
from tamis.online import METHODS, Anchored, FilterThenWeight, Full, Less, TargetOnly, Tilt, TracIn, Uniform
from tamis.online import evidence as online_evidence
from tamis.online.adam_state import read_adam
from tamis.online.measure import exact_interactions, sketched_interactions
from tamis.online.methods.choice import Choice, Evidence, Needs
from tamis.online.step import OnlineStep, Proposal, StepSettings
from tamis.projection.factorized import FactorizedProjector
from tamis.seeds import random_permutation
from tamis.types import Batch
from tiny_models import FAMILIES, one_row, permuted, random_batch, tiny_model

CANDIDATES = random_batch((9, 4, 7, 6, 8, 5), seed=3)
TARGET = random_batch((6, 8, 5), seed=4)
# Llama's norms compute in float32 even in a float64 model; GPT-2 has no such cast.
EXACT, CAST = 1e-10, 3e-6


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Chooses the rows it is told to, with the weights it is told to; measures as another method does."""

    rows: tuple[int, ...] = (0, 2, 5)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    measured: Needs = field(default_factory=lambda: Needs(alignment="raw"))
    name: str = "fixed"
    keep: int = 3
    oversample: int = 2
    cold_start: int = 0
    keeps_all: bool = False

    @property
    def needs(self) -> Needs:
        return self.measured

    def choose(self, evidence: Evidence) -> Choice:
        return Choice(rows=np.array(self.rows), weights=np.array(self.weights), weight_sum=sum(self.weights))


def ordinary_loss(model: nn.Module, batch: Batch, rows: list[int], reduction: str) -> Tensor:
    """Mean over rows of their mean losses, or over all supervised tokens."""
    found = [one_row(batch, row) for row in rows]
    losses = torch.stack([reference_loss(model, one.input_ids[0], one.supervised[0]) for one in found])
    size = torch.tensor([1 if reduction == "rows" else int(one.supervised[0, 1:].sum()) for one in found])
    return (losses * size).sum() / size.sum()


def autograd_rows(model: nn.Module, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    rows = []
    for row in range(len(batch.rows)):
        loss = ordinary_loss(model, batch, [row], "rows")
        rows.append(torch.autograd.grad(loss, [params[name] for name in names], allow_unused=True))
    return {
        name: torch.stack([torch.zeros_like(params[name]) if r[i] is None else r[i] for r in rows])
        for i, name in enumerate(names)
    }


def optimizer_of(model: nn.Module, steps: int = 3, **settings: Any) -> torch.optim.Optimizer:
    """AdamW in two groups after a few ordinary steps."""
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        ordinary_loss(model, random_batch((6, 7), seed=100 + step), [0, 1], "rows").backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def apply(step: OnlineStep, proposals: list[Proposal], optimizer: torch.optim.Optimizer, *, clip: float | None) -> None:
    """What a trainer does with proposals: add up, divide, clip, step."""
    divisor = sum(proposal.divisor for proposal in proposals)
    for name, param in step.params.items():
        param.grad = sum(proposal.gradient[name] for proposal in proposals) / divisor
    if clip is not None:
        nn.utils.clip_grad_norm_(step.params.values(), clip)
    optimizer.step()


def assert_same_params(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        # Adam divides by the root of its second moment, so a step's error is that of the gradient, not of its size.
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


MODELS = [(family, tied, lora) for family in FAMILIES for tied, lora in ((False, False), (True, False), (False, True))]


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
@pytest.mark.parametrize(("family", "tied", "lora"), MODELS)
def test_weight_one_on_a_fixed_choice_is_ordinary_training_on_those_samples(
    family: str, tied: bool, lora: bool, reduction: Any
) -> None:
    ours, plain = (tiny_model(family, tied=tied, lora=lora) for _ in range(2))
    our_optimizer, plain_optimizer = optimizer_of(ours), optimizer_of(plain)
    step = OnlineStep(ours, Fixed(), StepSettings(reduction=reduction))
    proposal = step.propose([CANDIDATES], [TARGET], our_optimizer)
    apply(step, [proposal], our_optimizer, clip=0.05)
    ordinary_loss(plain, CANDIDATES, [0, 2, 5], reduction).backward()
    nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.05)
    plain_optimizer.step()
    assert_same_params(ours, plain, 1e-12 if family == "gpt2" else 1e-7)


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
def test_several_choices_make_one_accumulated_update(reduction: Any) -> None:
    ours, plain = (tiny_model("gpt2", tied=True) for _ in range(2))
    our_optimizer, plain_optimizer = optimizer_of(ours), optimizer_of(plain)
    more = random_batch((5, 9, 4, 6, 7, 8), seed=8)
    step = OnlineStep(ours, Fixed(), StepSettings(reduction=reduction))
    proposals = [step.propose([batch], [TARGET], our_optimizer) for batch in (CANDIDATES, more)]
    apply(step, proposals, our_optimizer, clip=None)
    rows = [one_row(batch, row) for batch in (CANDIDATES, more) for row in (0, 2, 5)]
    losses = torch.stack([reference_loss(plain, one.input_ids[0], one.supervised[0]) for one in rows])
    size = torch.tensor([1 if reduction == "rows" else int(one.supervised[0, 1:].sum()) for one in rows])
    ((losses * size).sum() / size.sum()).backward()  # num_items_in_batch counts over the whole update
    plain_optimizer.step()
    assert_same_params(ours, plain, 1e-12)


def test_weights_multiply_the_rows_and_their_sum_divides_them() -> None:
    ours, plain = (tiny_model("gpt2") for _ in range(2))
    our_optimizer, plain_optimizer = optimizer_of(ours), optimizer_of(plain)
    step = OnlineStep(ours, Fixed(weights=(0.3, 1.9, 0.8)))
    apply(step, [step.propose([CANDIDATES], [TARGET], our_optimizer)], our_optimizer, clip=None)
    losses = [ordinary_loss(plain, CANDIDATES, [row], "rows") for row in (0, 2, 5)]
    ((0.3 * losses[0] + 1.9 * losses[1] + 0.8 * losses[2]) / 3.0).backward()
    plain_optimizer.step()
    assert_same_params(ours, plain, 1e-12)


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
def test_published_weights_are_used_as_they_come_over_the_rows_kept_or_their_tokens(reduction: Any) -> None:
    """Ordinary autograd on the rows times those weights, and the real AdamW's step."""
    ours, plain = (tiny_model("gpt2") for _ in range(2))
    our_optimizer, plain_optimizer = optimizer_of(ours), optimizer_of(plain)
    method = FilterThenWeight.paper(keep=3, oversample=2, alignment="raw", projection_dim=None)
    step = OnlineStep(ours, method, StepSettings(reduction=reduction))
    proposal = step.propose([CANDIDATES], [TARGET], our_optimizer)
    apply(step, [proposal], our_optimizer, clip=None)
    rows, weights = proposal.choice.rows.tolist(), torch.from_numpy(proposal.choice.weights)
    assert len(rows) == 3 and abs(float(weights.sum()) - 3) > 0.3
    losses = torch.stack([ordinary_loss(plain, CANDIDATES, [row], "rows") for row in rows])
    tokens = CANDIDATES.supervised[rows, 1:].sum(dim=1)
    size = tokens if reduction == "tokens" else torch.ones_like(tokens)
    ((weights * size * losses).sum() / size.sum()).backward()
    plain_optimizer.step()
    assert_same_params(ours, plain, 1e-12)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("interactions", ["metric", "raw", "preconditioned"])
@pytest.mark.parametrize(
    ("family", "tied", "lora"), [("gpt2", True, False), ("gpt2", False, True), ("llama", True, False)]
)
def test_inner_products_equal_the_definitions_over_every_trainable_parameter(
    family: str, tied: bool, lora: bool, interactions: Any, passes: int
) -> None:
    model = tiny_model(family, tied=tied, lora=lora)
    optimizer = optimizer_of(model)
    method = FilterThenWeight(keep=3, oversample=2, interactions=interactions, cold_start=1)
    seen: list[Evidence] = []
    step = OnlineStep(model, _Watched(method, seen))
    proposal = step.propose(_split(CANDIDATES, passes), _split(TARGET, passes), optimizer)

    names = list(step.params)
    candidates, goal = autograd_rows(model, CANDIDATES, names), autograd_rows(model, TARGET, names)
    moments = read_adam(optimizer, step.params)
    b, gram = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for name in names:
        d = moments[name].diagonal()
        x = candidates[name].flatten(1)
        b += x @ (d * goal[name].mean(dim=0)).flatten()
        scale = {"raw": torch.ones_like(d), "metric": d, "preconditioned": d * d}[interactions]
        gram += (x * scale.flatten()) @ x.T
    tolerance = EXACT if family == "gpt2" else CAST
    np.testing.assert_allclose(seen[0].alignments, b, rtol=0, atol=tolerance * float(b.abs().max()))
    np.testing.assert_allclose(seen[0].gram, gram, rtol=0, atol=tolerance * float(gram.abs().max()))
    expected = method.choose(Evidence(alignments=b.numpy(), interactions=gram.numpy()))
    assert proposal.choice.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(proposal.choice.weights, expected.weights, rtol=1e-8 if family == "gpt2" else 1e-3)
    assert proposal.target_loss == pytest.approx(
        float(ordinary_loss(model, TARGET, [0, 1, 2], "rows").detach()), rel=1e-6
    )


def test_nonlinear_alignments_equal_their_definitions_on_a_model() -> None:
    from tamis.maths.adam import adam_direction, adam_jacobian

    model = tiny_model("gpt2", tied=True)
    optimizer = optimizer_of(model)
    moments = read_adam(optimizer, OnlineStep(model, Full()).params)
    names = list(moments)
    candidates, goal = autograd_rows(model, CANDIDATES, names), autograd_rows(model, TARGET, names)
    secant, squares, jacobian = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    for name, state in moments.items():
        settings = {"step": state.step, "beta1": state.beta1, "beta2": state.beta2, "eps": state.eps}
        x, t = candidates[name], goal[name].mean(dim=0)
        gamma = adam_direction(x, state.exp_avg, state.exp_avg_sq, **settings)
        secant += (gamma * t).flatten(1).sum(dim=1)
        squares += gamma.square().flatten(1).sum(dim=1)
        k = adam_jacobian(x.mean(dim=0), state.exp_avg, state.exp_avg_sq, **settings)
        jacobian += (x * k * t).flatten(1).sum(dim=1)
    for form, expected in (("secant", secant), ("cosine", secant / squares.sqrt()), ("jacobian", jacobian)):
        seen: list[Evidence] = []
        OnlineStep(model, _Watched(Fixed(measured=Needs(alignment=form)), seen)).propose(  # type: ignore[arg-type]
            _split(CANDIDATES, 2), [TARGET], optimizer
        )
        np.testing.assert_allclose(seen[0].alignments, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_sketched_interactions_are_unbiased() -> None:
    model = tiny_model("gpt2", tied=True)
    rows = RowGradients(param_matrices(model, trainable_layers(model)))
    hold_gradients(model, random_batch((4, 3, 5), seed=3), rows)
    exact = exact_interactions("raw", rows, None, gather=lambda x: x)
    draws = torch.stack(
        [
            sketched_interactions(
                "raw", rows, None, projector=FactorizedProjector(dim=8, seed=seed), gather=lambda x: x
            )
            for seed in range(100)
        ]
    )
    spread = draws.std(dim=0) / 100**0.5
    assert (spread > 0).all()
    # 6 distinct entries at 4 standard errors: passed by chance less than once in a thousand runs; the seeds are fixed.
    assert ((draws.mean(dim=0) - exact).abs() <= 4 * spread).all()


@pytest.mark.parametrize(("lora", "least"), [(True, 0.99), (False, 0.95)])
def test_row_and_column_scales_stand_for_the_metric(lora: bool, least: float) -> None:
    """Wide enough a sketch leaves every side whole, so that only the rank-one form of ``D`` is left of the error."""
    model = tiny_model("llama", lora=lora)
    optimizer = optimizer_of(model, steps=12)
    exact = _gram(model, optimizer, StepSettings(gram="exact"), interactions="metric")
    cheap = _gram(model, optimizer, StepSettings(gram="sketch", sketch_dim=64), interactions="metric")
    raw = _gram(model, optimizer, StepSettings(gram="exact"))
    off = ~torch.eye(6, dtype=torch.bool)
    with_cheap, with_raw = (torch.corrcoef(torch.stack([exact[off], other[off]]))[0, 1] for other in (cheap, raw))
    assert with_cheap > least > with_raw
    # The length too: a root of mean moments for a mean of roots loses up to a third, leaving D out far more.
    assert 0.6 < float(cheap.trace() / exact.trace()) < 1.1
    assert float(raw.trace() / exact.trace()) < 0.5


def _gram(model: nn.Module, optimizer: Any, settings: StepSettings, interactions: Any = "raw") -> Tensor:
    seen: list[Evidence] = []
    needs = Needs(alignment="raw", interactions=interactions)
    OnlineStep(model, _Watched(Fixed(measured=needs), seen), settings).propose([CANDIDATES], [TARGET], optimizer)
    return torch.from_numpy(seen[0].gram)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_makes_a_step_that_needs_the_stated_number_of_forward_passes(name: str) -> None:
    model = tiny_model("llama", lora=True)
    optimizer = optimizer_of(model)
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    method = METHODS[name](keep=2, oversample=3)  # type: ignore[call-arg]
    step = OnlineStep(model, method)
    proposal = step.propose([CANDIDATES], [TARGET], optimizer)
    # One over the candidates and one over the target; without alignments only what was chosen, and no target.
    expected = {"uniform": [2], "full": [6], "target-only": [3]}.get(name, [3, 6])
    assert calls == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == proposal.gradient.keys()
    assert all(torch.isfinite(grad).all() for grad in proposal.gradient.values())
    assert all(param.grad is None for param in model.parameters())
    assert not model.training


def test_candidates_in_several_passes_give_the_same_proposal() -> None:
    model = tiny_model("gpt2", tied=True)
    optimizer = optimizer_of(model)
    step = OnlineStep(model, Anchored(keep=2, oversample=3))
    whole = step.propose([CANDIDATES], [TARGET], optimizer)
    parts = step.propose(_split(CANDIDATES, 4), _split(TARGET, 2), optimizer)
    np.testing.assert_allclose(parts.choice.weights, whole.choice.weights, rtol=1e-9)
    for name, grad in whole.gradient.items():
        torch.testing.assert_close(parts.gradient[name], grad, rtol=1e-9, atol=1e-12)
    assert 0 < parts.held_bytes <= whole.held_bytes  # less padding


def test_uniform_and_cold_choices_are_the_seeds_own_and_only_they_are_computed() -> None:
    model = tiny_model("llama", lora=True)
    optimizer = optimizer_of(model)
    expected = np.sort(random_permutation(11, 6)[:2])
    for method, cold in ((Uniform(keep=2, oversample=3), False), (FilterThenWeight(keep=2, oversample=3), True)):
        proposal = OnlineStep(model, method).propose(_split(CANDIDATES, 2), [], optimizer, cold=cold, seed=11)
        assert proposal.choice.rows.tolist() == expected.tolist()
        assert np.isfinite(proposal.losses).nonzero()[0].tolist() == expected.tolist()
        assert proposal.cold is cold
    cold = OnlineStep(model, Tilt(keep=2, oversample=3)).propose([CANDIDATES], [], optimizer, cold=True)
    assert cold.choice.rows.tolist() == [0, 1, 2, 3, 4, 5]  # what keeps all candidates starts as plain training


def test_cold_uniform_choice_is_ordinary_training_on_it() -> None:
    ours, plain = (tiny_model("gpt2", tied=True) for _ in range(2))
    our_optimizer, plain_optimizer = optimizer_of(ours), optimizer_of(plain)
    step = OnlineStep(ours, FilterThenWeight(keep=3, oversample=2), StepSettings(reduction="tokens"))
    proposal = step.propose(_split(CANDIDATES, 3), [], our_optimizer, cold=True, seed=5)
    apply(step, [proposal], our_optimizer, clip=None)
    ordinary_loss(plain, CANDIDATES, proposal.choice.rows.tolist(), "tokens").backward()
    plain_optimizer.step()
    assert_same_params(ours, plain, 1e-12)


def test_target_only_trains_on_the_target() -> None:
    ours, plain = (tiny_model("gpt2") for _ in range(2))
    our_optimizer, plain_optimizer = optimizer_of(ours), optimizer_of(plain)
    step = OnlineStep(ours, TargetOnly(keep=2, oversample=3))
    apply(step, [step.propose([CANDIDATES], [TARGET], our_optimizer)], our_optimizer, clip=None)
    ordinary_loss(plain, TARGET, [0, 1, 2], "rows").backward()
    plain_optimizer.step()
    assert_same_params(ours, plain, 1e-12)


def test_a_candidate_that_is_not_finite_is_dropped_and_named() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    optimizer = optimizer_of(model)
    spoil = {"rows": 6}

    def break_row(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if len(output) != spoil["rows"]:
            return output  # the target's pass
        scale = torch.ones(len(output), 1, 1)
        scale[min(3, len(output) - 1)] = float("nan")
        return output * scale

    model.model.layers[0].register_forward_hook(break_row)
    for method in (FilterThenWeight(keep=3), Anchored(keep=3), Less(keep=3), TracIn(keep=3)):
        proposal = OnlineStep(model, method).propose([CANDIDATES], [TARGET], optimizer)
        assert proposal.dropped.tolist() == [3]
        assert 3 not in proposal.choice.rows
        assert all(torch.isfinite(grad).all() for grad in proposal.gradient.values())
    spoil["rows"] = 3
    with pytest.raises(NonFinite, match="NaN or infinite"):
        OnlineStep(model, TracIn(keep=3)).propose([CANDIDATES], [TARGET], optimizer)


def test_published_second_moments_follow_the_updates_and_can_be_saved() -> None:
    model = tiny_model("llama", lora=True)
    optimizer = optimizer_of(model)
    method = FilterThenWeight(keep=2, oversample=3, alignment="projected", interactions="raw", cold_start=1)
    step = OnlineStep(model, method, StepSettings(sketch_dim=4))
    first = step.propose([CANDIDATES], [TARGET], optimizer, cold=True, seed=1)
    step.observe({name: grad / first.divisor for name, grad in first.gradient.items()}, optimizer)
    proposal = step.propose([CANDIDATES], [TARGET], optimizer)
    again = OnlineStep(model, method, StepSettings(sketch_dim=4))
    again.load_state_dict(step.state_dict())
    np.testing.assert_array_equal(again.propose([CANDIDATES], [TARGET], optimizer).alignments, proposal.alignments)
    # At a width that leaves every side whole, the moments of one update are Adam's own after its first step.
    whole = OnlineStep(model, method, StepSettings(sketch_dim=64))
    fresh = torch.optim.AdamW(whole.params.values(), lr=1e-3)
    gradient = {name: grad / first.divisor for name, grad in first.gradient.items()}
    whole.observe(gradient, fresh)
    got = whole.propose([CANDIDATES], [TARGET], fresh).alignments
    for name, param in whole.params.items():
        param.grad = gradient[name]
    lr, fresh.param_groups[0]["lr"] = fresh.param_groups[0]["lr"], 0.0
    fresh.step()
    fresh.param_groups[0]["lr"] = lr
    exact = OnlineStep(model, FilterThenWeight(keep=2, interactions="raw")).propose([CANDIDATES], [TARGET], fresh)
    np.testing.assert_allclose(got, exact.alignments, rtol=1e-6)


def test_what_cannot_be_done_is_refused_with_its_reason() -> None:
    model = tiny_model("llama", lora=True)
    params = [param for param in model.parameters() if param.requires_grad]
    sgd = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(Unsupported, match="SGD is not an Adam"):
        OnlineStep(model, FilterThenWeight()).propose([CANDIDATES], [TARGET], sgd)
    OnlineStep(model, TracIn(keep=2)).propose([CANDIDATES], [TARGET], sgd)  # looks at no moments
    with pytest.raises(InvalidInput, match="needs target rows at every step"):
        OnlineStep(model, TracIn()).propose([CANDIDATES], [], sgd)
    with pytest.raises(InvalidInput, match="no candidate of this step has a supervised token"):
        OnlineStep(model, TracIn()).propose([], [TARGET], sgd)
    with pytest.raises(InvalidSettings, match=r"projection_dim=256.*gram='exact'"):
        OnlineStep(model, FilterThenWeight.paper(), StepSettings(gram="exact"))
    with pytest.raises(InvalidSettings, match="reduction='mean': expected one of rows, tokens"):
        StepSettings(reduction="mean")  # type: ignore[arg-type]


# Section 4.4 of the paper, in its order and as docs/methods/online-filter-then-weight.md has it.
ABLATIONS = {
    "hard filter + reweight": FilterThenWeight.paper(keep=2, oversample=3, filter="top"),
    "optimizer-aware filter only": FilterThenWeight.paper(keep=2, oversample=3, filter="top", weights="none"),
    "vanilla filter only": FilterThenWeight.paper(keep=2, oversample=3, alignment="raw", filter="top", weights="none"),
    "vanilla filter + reweight": FilterThenWeight.paper(keep=2, oversample=3, alignment="raw"),
    "unbounded weights": FilterThenWeight.paper(keep=2, oversample=3, weights="unbounded"),
    "token-level score": FilterThenWeight.paper(keep=2, oversample=3, token_level=True),
    "ours": FilterThenWeight.paper(keep=2, oversample=3),
    "full data": Full(keep=2, oversample=3),
}


def test_the_guides_table_of_ablations_is_what_is_tested() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "methods" / "online-filter-then-weight.md").read_text()
    rows = re.findall(r"^\| (\d)\. [^|]*\| `([^`]*)` \|", guide, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 9))
    names = {"p": partial(FilterThenWeight.paper, keep=2, oversample=3), "Full": partial(Full, keep=2, oversample=3)}
    assert [eval(code, names) for _, code in rows] == list(ABLATIONS.values())


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_ablations_of_the_paper_make_a_step(name: str) -> None:
    method = ABLATIONS[name]
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    step = OnlineStep(model, method)
    cold = step.propose([CANDIDATES], [], optimizer, cold=True)
    step.observe({key: grad / cold.divisor for key, grad in cold.gradient.items()}, optimizer)
    proposal = step.propose([CANDIDATES], [TARGET], optimizer)
    assert len(proposal.choice.rows) == (6 if name == "full data" else 2)
    assert proposal.choice.fallback is None
    assert all(torch.isfinite(grad).all() for grad in proposal.gradient.values())
    unweighted = "only" in name or name == "full data"
    assert (set(proposal.choice.weights.tolist()) == {1.0}) == unweighted


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
@pytest.mark.parametrize("keep_all", [False, True])
def test_weights_are_solved_for_the_combination_that_is_applied(reduction: Any, keep_all: bool) -> None:
    """The target is made of two candidates of 3 and 12 tokens: matching finds its direction whatever rows count by."""
    model = tiny_model("gpt2")
    optimizer = optimizer_of(model)
    batch = random_batch((4, 13), seed=5)
    settings = {"interactions": "raw", "alignment": "raw", "ridge": 1e-3, "weights": "nnls", "normalise": False}
    method = FilterThenWeight(keep=2, oversample=1, filter="none" if keep_all else "top", **settings)
    proposal = OnlineStep(model, method, StepSettings(reduction=reduction)).propose([batch], [batch], optimizer)
    assert proposal.tokens[0] < proposal.tokens[1]
    assert proposal.target_gradient is not None
    update = torch.cat([proposal.gradient[name].flatten() for name in proposal.gradient])
    goal = torch.cat([proposal.target_gradient[name].flatten() for name in proposal.gradient])
    assert float(torch.cosine_similarity(update, goal, dim=0)) > 1 - 1e-5  # but for the ridge of 1e-3


def test_token_counts_scale_what_methods_see_and_leave_cosines_alone() -> None:
    model = tiny_model("gpt2")
    optimizer = optimizer_of(model)
    found: dict[str, list[Evidence]] = {"rows": [], "tokens": []}
    for form in ("raw", "cosine"):
        needs = Needs(alignment=form, interactions="raw", lengths="raw")  # type: ignore[arg-type]
        for reduction, seen in found.items():
            step = OnlineStep(model, _Watched(Fixed(measured=needs), seen), StepSettings(reduction=reduction))  # type: ignore[arg-type]
            tokens = step.propose([CANDIDATES], [TARGET], optimizer).tokens
    size = tokens / tokens.mean()
    (raw, cosine), (scaled, same) = found["rows"], found["tokens"]
    np.testing.assert_allclose(scaled.alignments, raw.alignments * size, rtol=1e-12)
    np.testing.assert_allclose(scaled.gram, raw.gram * np.outer(size, size), rtol=1e-12)
    np.testing.assert_array_equal(same.alignments, cosine.alignments)
    for evidence in (raw, scaled):
        assert evidence.lengths is not None
        np.testing.assert_allclose(evidence.lengths.squares, np.diag(evidence.gram), rtol=1e-9)
        inside = evidence.alignments > 0
        assert evidence.lengths.aligned == pytest.approx(evidence.gram[np.ix_(inside, inside)].sum(), rel=1e-9)


@pytest.mark.parametrize("settings", [StepSettings(), StepSettings(gram="sketch", sketch_dim=4)])
def test_a_tilt_builds_no_interactions(settings: StepSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2", tied=True)
    optimizer = optimizer_of(model)
    needs = Needs(alignment="adam", interactions="metric")
    watched: list[Evidence] = []
    OnlineStep(model, _Watched(Fixed(measured=needs), watched), settings).propose([CANDIDATES], [TARGET], optimizer)
    b, gram = watched[0].alignments, watched[0].gram
    inside = b > 0
    scale = gram[np.ix_(inside, inside)].sum() / b[inside].sum()
    expected = np.maximum(0, 1 + scale * b / (4 * np.diag(gram).mean()))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("interactions were measured")

    monkeypatch.setattr(online_evidence, "exact_interactions", refuse)
    monkeypatch.setattr(online_evidence, "sketched_interactions", refuse)
    choice = OnlineStep(model, Tilt(keep=2, oversample=3), settings).propose([CANDIDATES], [TARGET], optimizer).choice
    np.testing.assert_allclose(choice.weights, 6 * expected / expected.sum(), rtol=1e-6)


def test_candidates_without_any_finite_loss_stop_the_run() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    optimizer = optimizer_of(model)

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * float("nan") if len(output) == 6 else output  # not the target's pass

    model.model.layers[0].register_forward_hook(spoil)
    for method in (TracIn(keep=3), Tilt(keep=3)):
        with pytest.raises(NonFinite, match="none of the 6 candidates of a step has a finite loss and gradient"):
            OnlineStep(model, method).propose([CANDIDATES], [TARGET], optimizer)


def test_a_candidate_whose_length_alone_is_not_finite_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    optimizer = optimizer_of(model)
    measure, inside = online_evidence.measure_lengths, []

    def overflowing(form: Any, rows: Any, moments: Any, coefficients: Tensor, **more: Any) -> tuple[Tensor, float]:
        inside.append(coefficients.clone())
        squares, aligned = measure(form, rows, moments, coefficients, **more)
        squares[4] = float("inf")
        return squares, aligned

    monkeypatch.setattr(online_evidence, "measure_lengths", overflowing)
    proposal = OnlineStep(model, Tilt(keep=2, oversample=3)).propose([CANDIDATES], [TARGET], optimizer)
    assert proposal.dropped.tolist() == [4]
    assert len(inside) == 2 and inside[1][4] == 0  # the sum is taken again without it


def test_weights_whose_sum_times_lengths_is_not_positive_become_equal() -> None:
    model = tiny_model("gpt2")
    optimizer = optimizer_of(model)
    tokens = OnlineStep(model, Full(keep=3)).propose([CANDIDATES], [], optimizer).tokens
    long, short = int(tokens.argmax()), int(tokens.argmin())
    fixed = Fixed(rows=(short, long), weights=(1.5, -0.5))
    proposal = OnlineStep(model, fixed, StepSettings(reduction="tokens")).propose([CANDIDATES], [TARGET], optimizer)
    assert 1.5 * tokens[short] <= 0.5 * tokens[long]
    assert proposal.choice.fallback == "the weights have no positive sum"
    assert proposal.divisor == tokens[short] + tokens[long]


class _Watched:
    """A method whose evidence is kept for a look."""

    def __init__(self, method: Any, seen: list[Evidence]) -> None:
        self._method, self._seen = method, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def choose(self, evidence: Evidence) -> Choice:
        self._seen.append(evidence)
        return self._method.choose(evidence)


def _split(batch: Batch, passes: int) -> list[Batch]:
    return [permuted(batch, part.tolist()) for part in torch.arange(len(batch.rows)).tensor_split(passes)]
