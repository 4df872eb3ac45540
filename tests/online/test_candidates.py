"""Cheaper candidates against plain definitions: what scores a row, what is run for it, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from online_steps import CANDIDATES, TARGET, autograd_rows, calls_of, mean_gradient_of, optimizer_of, row_loss, split
from tamis.errors import InvalidInput, InvalidSettings
from tamis.gradients.jvp import loss_tangents
from tamis.gradients.parameters import param_matrices
from tamis.maths.low_rank import cut_to_rank
from tamis.model.low_rank_linear import Space, put_low_rank_layers
from tamis.model.proxy_folder import ProxyLayout, layout_of, write_layout
from tamis.model.targets import gradient_layers
from tamis.model.trainable import trainable_layers
from tamis.online import METHODS, Anchored, FilterThenWeight, Full, Greats, Less, Tilt, TracIn, Uniform
from tamis.online.adam_state import read_adam
from tamis.online.measure import _jacobian
from tamis.online.methods.choice import Evidence
from tamis.online.proxy import check_proxy, load_proxy
from tamis.online.settings import StepSettings
from tamis.online.step import OnlineStep
from tamis.types import Batch
from tiny_models import random_batch, tiny_model
from tiny_run import byte_tokenizer

TOP = FilterThenWeight(keep=2, oversample=3, filter="top", weights="none")
RAW = {"alignment": "raw", "interactions": "raw", "cold_start": 0}


def dot(rows: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    return sum((rows[name].flatten(1) @ direction[name].flatten() for name in rows), torch.zeros(6).double())


def target_mean(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: grads.mean(dim=0) for name, grads in autograd_rows(model, TARGET, names).items()}


def trainable(model: nn.Module) -> list[str]:
    return [name for name, param in model.named_parameters() if param.requires_grad]


@pytest.mark.parametrize(
    ("family", "tied", "lora", "tolerance"),
    [
        ("gpt2", True, False, 1e-10),
        ("gpt2", False, True, 1e-10),
        ("llama", False, True, 1e-5),
        ("gemma3", True, False, 1e-5),
    ],
)
def test_slopes_of_losses_are_products_with_materialised_gradients(
    family: str, tied: bool, lora: bool, tolerance: float
) -> None:
    """Llama's and Gemma's norms compute in float32 even in a float64 model; GPT-2 has no such cast."""
    model = tiny_model(family, tied=tied, lora=lora)
    generator = torch.Generator().manual_seed(5)
    params = dict(model.named_parameters())
    direction = {n: torch.randn(params[n].shape, generator=generator).double() for n in trainable(model)}
    losses, slopes = loss_tangents(model, CANDIDATES, direction)
    expected = dot(autograd_rows(model, CANDIDATES, trainable(model)), direction)
    torch.testing.assert_close(slopes, expected, rtol=tolerance, atol=tolerance)
    plain = [row_loss(model, CANDIDATES, row) for row in range(6)]
    torch.testing.assert_close(losses, torch.stack(plain).detach(), rtol=tolerance, atol=0)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
@pytest.mark.parametrize("form", ["adam", "raw", "jacobian"])
@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False)])
def test_a_direction_of_low_rank_is_the_direction_with_its_matrices_cut(
    family: str, tied: bool, form: Any, reduction: Any
) -> None:
    """The oracle: materialised gradients times the cut matrices, and whole ones where cutting saves nothing."""
    model = tiny_model(family, tied=tied)
    optimizer = optimizer_of(model)
    method = FilterThenWeight(keep=2, oversample=3, alignment=form, filter="top", weights="none")
    settings = StepSettings(reduction=reduction, target_rank=2)
    found = OnlineStep(model, method, settings).propose(split(CANDIDATES, 4), [TARGET], optimizer)
    whole = OnlineStep(model, method, replace(settings, target_rank=None)).propose([CANDIDATES], [TARGET], optimizer)
    matrices = param_matrices(model, trainable_layers(model))
    moments = read_adam(optimizer, {name: param for matrix in matrices for name, param in matrix.params})
    names = [name for name, _ in model.named_parameters()]
    grads, goal = autograd_rows(model, CANDIDATES, names), target_mean(model, names)
    tokens = CANDIDATES.supervised[:, 1:].sum(dim=1).double()
    sizes = tokens if reduction == "tokens" else torch.ones(6).double()
    shares = sizes / sizes.sum()  # of each row in the gradient of the update that everybody's mean makes
    if form == "adam":
        goal = {name: moments[name].diagonal() * grad for name, grad in goal.items()}
    elif form == "jacobian":
        mean = {name: torch.tensordot(shares, grad, dims=1) for name, grad in grads.items()}
        goal = {name: _jacobian(moments[name], mean[name]) * grad for name, grad in goal.items()}
    cuts = 0
    for matrix in matrices:
        if matrix.is_cut_to(2):
            cuts += 1
            goal |= matrix.split(cut_to_rank(matrix.joined(goal), 2, seed=0).whole())
    assert 0 < cuts < len(matrices)  # norms, and biases, stay whole
    expected = dot(grads, goal) * 6 * shares
    np.testing.assert_allclose(found.alignments, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))
    assert not np.allclose(found.alignments, whole.alignments, rtol=1e-3)


def test_adapters_have_nothing_to_cut_and_are_held_as_without() -> None:
    """One pass over everybody, the smaller form of every gradient, and the same numbers."""
    model = tiny_model("llama", lora=True)
    optimizer = optimizer_of(model)
    cut, whole = (OnlineStep(model, TracIn(keep=2, oversample=3), StepSettings(target_rank=rank)) for rank in (4, None))
    with calls_of(model) as calls:
        found = cut.propose([CANDIDATES], [TARGET], optimizer)
    assert calls == [3, 6]
    expected = whole.propose([CANDIDATES], [TARGET], optimizer)
    assert found.held_bytes == expected.held_bytes
    assert torch.equal(cut.work(), whole.work())
    np.testing.assert_allclose(found.alignments, expected.alignments, rtol=1e-12)
    for name, grad in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("candidates", ["proxy", "sources:1"])
def test_proxies_and_sources_have_their_directions_cut_too(candidates: str) -> None:
    model, small = tiny_model("gpt2"), tiny_model("gpt2", seed=1, blocks=1)
    optimizer, method = optimizer_of(model), TracIn(keep=2, oversample=3)
    is_proxy, source_of = candidates == "proxy", np.array([0, 0, 1, 1, 2, 2])

    def measured(rank: int | None) -> tuple[Any, float]:
        settings = StepSettings(candidates=candidates, target_rank=rank)
        step = OnlineStep(
            model, method, settings, proxy=small if is_proxy else None, sources=None if is_proxy else source_of
        )
        found = step.propose([CANDIDATES], [TARGET], optimizer)
        return found.alignments, float(step.work()[0, 1])

    scorer = small if is_proxy else model
    names = [name for name, _ in scorer.named_parameters()]
    grads, direction = autograd_rows(scorer, CANDIDATES, names), target_mean(scorer, names)
    for matrix in param_matrices(scorer, trainable_layers(scorer)):
        if matrix.is_cut_to(2):
            direction |= matrix.split(cut_to_rank(matrix.joined(direction), 2, seed=0).whole())
    expected = dot(grads, direction).numpy()
    if not is_proxy:  # two rows of each source, of which there are no more
        expected = expected.reshape(3, 2).mean(axis=1)[source_of]
    (whole, dear), (found, cheap) = measured(None), measured(2)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert not np.allclose(found, whole, rtol=1e-3)
    assert cheap < dear


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
@pytest.mark.parametrize("method", [TOP, TracIn(keep=2, oversample=3)], ids=["adam", "raw"])
def test_forward_only_scores_choose_as_exact_ones_and_the_rejected_run_no_backward(method: Any, reduction: Any) -> None:
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    exact = OnlineStep(model, method, StepSettings(reduction=reduction)).propose([CANDIDATES], [TARGET], optimizer)
    step = OnlineStep(model, method, StepSettings(candidates="jvp", reduction=reduction))
    with calls_of(model) as calls:
        found = step.propose([CANDIDATES], [TARGET], optimizer)
    assert calls == [3, 6, 2]  # target, candidates forward only, the chosen
    assert (found.scored, found.by_source) == (6, False)
    np.testing.assert_allclose(found.alignments, exact.alignments, rtol=1e-9)
    assert found.choice.rows.tolist() == exact.choice.rows.tolist()
    assert found.divisor == exact.divisor
    for name, grad in exact.gradient.items():
        torch.testing.assert_close(found.gradient[name], grad, rtol=1e-9, atol=1e-12)


def test_a_window_is_scored_once_and_chosen_from_without_taking_a_row_twice() -> None:
    """The oracle: the method's choice of the kept products of the rows that are left, gradients at today's weights."""
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    method = FilterThenWeight(keep=2, oversample=3)
    names = trainable(model)
    grads, goal = autograd_rows(model, CANDIDATES, names), target_mean(model, names)
    moments = read_adam(optimizer, {n: p for n, p in model.named_parameters() if p.requires_grad})
    b = dot(grads, {n: moments[n].diagonal() * goal[n] for n in names})
    scaled = torch.cat([(grads[n] * moments[n].diagonal().sqrt()).flatten(1) for n in names], dim=1)
    gram = scaled @ scaled.T
    step = OnlineStep(model, method, StepSettings(candidates="reuse:3"))
    left = np.arange(6)
    for number, expected_calls in enumerate(([3, 6], [2], [2])):
        assert step.looks([CANDIDATES], cold=False) == (number == 0)
        with calls_of(model) as calls:
            found = step.propose([CANDIDATES], [TARGET] if number == 0 else [], optimizer)
        assert calls == expected_calls
        seen = Evidence(alignments=b[left].numpy(), interactions=gram[left][:, left].numpy())
        choice = method.choose(seen)
        assert found.choice.rows.tolist() == left[choice.rows].tolist()
        np.testing.assert_allclose(found.choice.weights, choice.weights, rtol=1e-8)
        now = autograd_rows(model, CANDIDATES, names)
        for name, grad in found.gradient.items():
            expected = sum(w * now[name][r] for r, w in zip(found.choice.rows, found.choice.weights, strict=True))
            torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-10)
        assert (found.score_age, found.target_loss is None) == (number, number > 0)
        assert found.scored == (6 if number == 0 else 0)
        left = np.setdiff1d(left, found.choice.rows)
        for name, param in step.params.items():
            param.grad = found.gradient[name] / found.divisor
        optimizer.step()
    assert step.looks([CANDIDATES], cold=False)  # the same rows are a new window after that


def test_a_window_survives_a_checkpoint() -> None:
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    settings = StepSettings(candidates="reuse:3")
    step, again = (OnlineStep(model, FilterThenWeight(keep=2, oversample=3), settings) for _ in range(2))
    step.propose([CANDIDATES], [TARGET], optimizer)
    again.load_state_dict({name: value.clone() for name, value in step.state_dict().items()})
    whole, resumed = (each.propose(split(CANDIDATES, 4), [], optimizer) for each in (step, again))
    assert resumed.choice.rows.tolist() == whole.choice.rows.tolist()
    assert all(torch.equal(resumed.gradient[name], grad) for name, grad in whole.gradient.items())
    assert torch.equal(again.work(), step.work())


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
@pytest.mark.parametrize(
    "method",
    [TracIn(keep=2, oversample=3), Greats(keep=2, oversample=3), FilterThenWeight(keep=2, oversample=3, **RAW)],
    ids=["tracin", "greats", "filter-then-weight"],
)
def test_a_proxys_own_gradients_choose_and_weight(method: Any, reduction: Any) -> None:
    """By tokens, what a row adds to the update is its share of them, of the proxy's gradient and of the model's."""
    model, proxy = tiny_model("gpt2", lora=True), tiny_model("gpt2", seed=1, blocks=1)
    optimizer = optimizer_of(model)
    names = trainable(proxy)
    grads, goal = autograd_rows(proxy, CANDIDATES, names), target_mean(proxy, names)
    tokens = CANDIDATES.supervised[:, 1:].sum(dim=1).double()
    size = tokens if reduction == "tokens" else torch.ones(6).double()
    flat = torch.cat([grads[n].flatten(1) for n in names], dim=1) * (size / size.mean())[:, None]
    b = dot(grads, goal) * size / size.mean()
    seen = Evidence(alignments=b.numpy(), interactions=(flat @ flat.T).numpy(), learning_rate=1e-2)
    expected = method.choose(seen)
    step = OnlineStep(model, method, StepSettings(candidates="proxy", reduction=reduction), proxy=proxy)
    with calls_of(model) as calls, calls_of(proxy) as proxy_calls:
        found = step.propose([CANDIDATES], [TARGET], optimizer)
    assert (calls, proxy_calls) == ([2], [3, 6])
    np.testing.assert_allclose(found.alignments, b.numpy(), rtol=1e-9)
    assert found.choice.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(found.choice.weights, expected.weights, rtol=1e-8)
    own = autograd_rows(model, CANDIDATES, trainable(model))
    for name, grad in found.gradient.items():
        total = sum(w * size[r] * own[name][r] for r, w in zip(expected.rows, expected.weights, strict=True))
        torch.testing.assert_close(grad, total, rtol=1e-7, atol=1e-10)
    assert np.isfinite(found.losses).nonzero()[0].tolist() == sorted(expected.rows.tolist())
    assert all(param.grad is None for param in proxy.parameters())


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Tilt(), {"candidates": "jvp"}, r"candidates='jvp': method 'tilt' keeps all candidates"),
    (Anchored(), {"candidates": "reuse:2"}, r"candidates='reuse:2': method 'anchored' keeps all"),
    (FilterThenWeight(filter="none"), {"candidates": "proxy"}, r"'filter-then-weight' keeps all.*greats, grad-match"),
    (FilterThenWeight(), {"candidates": "jvp"}, r"compares candidates with each other.*filter='top', weights='none'"),
    (FilterThenWeight(), {"candidates": "proxy"}, r"reads Adam's state.*alignment='raw', interactions='raw'"),
    (METHODS["less"](), {"candidates": "jvp"}, r"asks for alignment='cosine'"),
    (METHODS["less"](), {"candidates": "proxy"}, "reads Adam's state"),
    (FilterThenWeight.paper(), {"candidates": "reuse:2"}, "a published form"),
    (TracIn(oversample=4), {"candidates": "reuse:5"}, r"keeps 8 of 32 candidates, too few for that many choices"),
    (Uniform(), {"candidates": "jvp"}, r"'uniform' scores no candidate"),
    (Full(), {"target_rank": 2}, "target_rank=2: method 'full' does not compare candidates"),
    (Less(), {"target_rank": 2}, "alignment='cosine', which is no product with one direction"),
    (FilterThenWeight.paper(), {"target_rank": 2}, "alignment='projected', which is no"),
    (FilterThenWeight.paper(token_level=True), {"target_rank": 2}, "position by position"),
    (TracIn(), {"target_rank": 2, "candidates": "jvp"}, "one derivative along the whole direction"),
    (Full(), {"target_every": 2}, r"target_every=2, target_ema=0: method 'full' scores no candidate"),
    (FilterThenWeight.paper(token_level=True), {"target_ema": 0.5}, "a token-level score compares"),
]


@pytest.mark.parametrize(("method", "settings", "said"), REFUSED)
def test_what_a_method_cannot_do_is_refused_with_what_it_goes_with(method: Any, settings: Any, said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        OnlineStep(tiny_model("gpt2", lora=True), method, StepSettings(**settings))


def test_unreadable_settings_and_missing_or_foreign_proxies_are_refused() -> None:
    for text in ("reuse:1", "reuse", "jvp:2", "proxy:", "cheap", ""):
        with pytest.raises(InvalidSettings, match="expected 'exact', 'reuse:K'"):
            _ = StepSettings(candidates=text).reuse
    with pytest.raises(InvalidSettings, match="target_every=2 with candidates='reuse:2'"):
        StepSettings(candidates="reuse:2", target_every=2)
    with pytest.raises(InvalidSettings, match=r"target_ema=0.5 with candidates='proxy:x': a proxy looks at the target"):
        StepSettings(candidates="proxy:x", target_ema=0.5)
    for values in ({"target_every": 0}, {"target_ema": 1.0}, {"target_rank": 0}, {"target_rank": 2.0}):
        with pytest.raises(InvalidSettings, match=next(iter(values))):
            StepSettings(**values)
    model = tiny_model("gpt2")
    assert check_proxy("proxy:there", None) == "there"
    assert check_proxy("proxy", model) is None
    for text, given in (("proxy", None), ("proxy:there", model), ("exact", model)):
        with pytest.raises(InvalidSettings, match="proxy"):
            check_proxy(text, given)
    proxy = tiny_model("gpt2")
    proxy.resize_token_embeddings(70)  # type: ignore[operator]
    with pytest.raises(InvalidInput, match="the proxy knows 70 tokens and the trained model 64"):
        OnlineStep(model, TracIn(), StepSettings(candidates="proxy"), proxy=proxy)


def test_tables_of_tokens_may_be_padded_but_every_token_must_be_in_the_proxy_s() -> None:
    model = tiny_model("gpt2", lora=True)
    proxy = tiny_model("gpt2")
    for each, height in ((model, 400), (proxy, 398)):
        each.resize_token_embeddings(height)  # type: ignore[operator]
    step = OnlineStep(model, TracIn(keep=2, oversample=3), StepSettings(candidates="proxy"), proxy=proxy)
    assert len(step.propose([CANDIDATES], [TARGET], optimizer_of(model)).choice.rows) == 2
    strange = random_batch((6, 8, 5, 7, 4, 6), seed=1)
    strange.input_ids[0, 1] = 399
    with pytest.raises(InvalidInput, match="a row has token 399 and the proxy knows 398 tokens"):
        step.propose([strange], [TARGET], optimizer_of(model))


def test_a_target_gradient_serves_several_choices_and_its_running_mean_is_adams() -> None:
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    targets: list[Batch] = [random_batch((6, 8, 5), seed=seed) for seed in (4, 5, 6)]
    means = [mean_gradient_of(model, batch) for batch in targets]
    step = OnlineStep(model, TracIn(keep=2, oversample=3), StepSettings(target_every=2, target_ema=0.8))
    grads = autograd_rows(model, CANDIDATES, trainable(model))
    kept: dict[str, Tensor] = {}
    for number in range(5):
        fresh = step.looks([CANDIDATES], cold=False)
        assert fresh == (number % 2 == 0)
        if fresh:
            look = number // 2
            parts = [0.8 ** (look - j) * 0.2 / (1 - 0.8 ** (look + 1)) for j in range(look + 1)]
            kept = {n: sum(p * means[j][n] for j, p in enumerate(parts)) for n in grads}  # type: ignore[misc]
        with calls_of(model) as calls:
            target = [targets[number // 2]] if fresh else []
            found = step.propose([CANDIDATES], target, optimizer, fresh_target=fresh)
        assert calls == ([3, 6] if fresh else [6])
        np.testing.assert_allclose(found.alignments, dot(grads, kept).numpy(), rtol=1e-8)
        assert (found.target_age, found.target_loss is None) == (number % 2, not fresh)
        again = OnlineStep(model, step.method, step.settings)  # resumes with what it remembers
        again.load_state_dict({name: value.clone() for name, value in step.state_dict().items()})
        step = again


@pytest.mark.parametrize("space", ["product", "factors"])
def test_a_proxy_folder_chooses_by_the_gradients_of_its_factors(space: Space, tmp_path: Path) -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    names = [layer.name for layer in gradient_layers(model)]
    put_low_rank_layers(model, dict.fromkeys(names[1:], 2), space=space)  # one layer stays whole
    made = cast(ProxyLayout, layout_of(model))
    cast(Any, model).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    write_layout(made, tmp_path)
    found = load_proxy(str(tmp_path), torch.device("cpu"))
    factors = {f"{name}.{factor}" for name in names[1:] for factor in "AB"}
    assert {layer.name for layer in trainable_layers(found)} == {names[0], *factors}
