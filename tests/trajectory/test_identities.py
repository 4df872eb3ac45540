"""What holds exactly: against autograd through unrolled training, against PyTorch's optimizers, between forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tamis.gradients.functional import per_sample_gradients, products
from tamis.trajectory.adjoint import renormalised, start_channel, sweep_step
from tamis.trajectory.leave_out import leave_out_effect, weights_without
from tamis.trajectory.replay import Played, mean_gradient, train
from tamis.trajectory.run import HeldTrajectory, State
from tamis.trajectory.secant import SecantWindow
from tamis.trajectory.summary_matrix import SummaryMatrix, draw_masks, scores_of_embeddings
from tamis.trajectory.update_error import ErrorProxy, SecondOrder
from trajectory_case import adjoint_scores, played_all, random_run, random_target, target_loss

TARGET = random_target()
EXACT = {"rtol": 1e-9, "atol": 1e-13}  # float64; the identities hold to 1e-12 of the largest score

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.25},
    "groups": {"decays": (0.1, 0.0), "rates": (1.0, 0.3), "clip": 0.3},
    "accumulated and weighted": {"micro_sizes": (2, 3), "even": False},
    "high rate": {"lr": 0.1},
    "large eps": {"eps": 1e-3},
    "L2 in the gradient": {"kind": "adam", "decays": (0.1, 0.0), "rates": (1.0, 0.5), "clip": 0.3},
    "SGD": {"kind": "sgd", "momentum": 0.0, "decays": (0.0,), "lr": 0.1},
    "SGD with momentum, decay and clip": {"kind": "sgd", "momentum": 0.9, "decays": (0.05,), "clip": 0.4, "lr": 0.1},
}


def unrolled_scores(run: HeldTrajectory, step: int) -> Tensor:
    """``dℓ/dε`` with every weight of the step turned down by ``ε w_i``, by autograd through the training itself."""
    problem, rule = run.problem, run.rule
    dial = torch.zeros(len(run.steps[step].weights), dtype=torch.float64, requires_grad=True)
    state = run.states[0]
    theta, moments = state.theta.clone().requires_grad_(), state.moments
    for number, one in enumerate(run.steps):
        weights = one.weights * (1 - dial) if number == step else one.weights
        first, total = 0, torch.zeros((), dtype=torch.float64)
        for micro in one.micros:
            losses = problem.predict(problem.layout.named(theta), micro).losses()
            total = total + losses @ weights[first : first + len(losses)]
            first += len(losses)
        raw = torch.autograd.grad(total, theta, create_graph=True)[0]
        if rule.clip is not None:
            raw = raw * torch.clamp(rule.clip / (raw.norm() + 1e-6), max=1.0)
        g = rule.seen(theta, raw)
        settings: Any = rule._settings(g, number + 1, one.rates)
        theta, *rest = settings.apply((theta, *moments), g)
        moments = tuple(rest)
    return torch.autograd.grad(target_loss(run, theta, TARGET), dial)[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_adjoint_is_autograd_through_the_unrolled_training(name: str) -> None:
    run = random_run(**SETTINGS[name])
    method = "sgd-influence" if run.rule.kind == "sgd" else "adamw-influence"
    scores, _ = adjoint_scores(run, TARGET, method=method)
    scale = float(torch.stack(scores).abs().max())
    for step in (0, 3, run.num_steps - 1):
        error = (scores[step] - unrolled_scores(run, step)).abs().max()
        assert error <= 1e-12 * scale, f"step {step}: {error / scale:.1e} of the largest score"


def torch_run(run: HeldTrajectory, weights: dict[int, Tensor]) -> Tensor:
    """The end of the same training by ``torch.optim``, with other weights in some steps."""
    rule, problem, steps = run.rule, run.problem, run.steps
    parts = [part.clone().requires_grad_() for part in run.states[0].theta.split([g.numel for g in rule.groups])]
    groups: list[dict[str, Any]] = [
        {"params": [part], "weight_decay": group.decay} for part, group in zip(parts, rule.groups, strict=True)
    ]
    first = rule.groups[0]
    if rule.kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, momentum=first.beta1)
    else:
        kind = torch.optim.AdamW if rule.kind == "adamw" else torch.optim.Adam
        optimizer = kind(groups, lr=1.0, betas=(first.beta1, first.beta2), eps=first.eps)
    for step in steps:
        for group, rate in zip(optimizer.param_groups, step.rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        at, own = 0, weights.get(step.index, step.weights)
        for micro in step.micros:
            losses = problem.predict(problem.layout.named(torch.cat(parts)), micro).losses()
            (losses @ own[at : at + len(losses)]).backward()
            at += len(losses)
        if rule.clip is not None:
            torch.nn.utils.clip_grad_norm_(parts, rule.clip)
        optimizer.step()
    return torch.cat(parts).detach()


@pytest.mark.parametrize("name", SETTINGS)
def test_replay_is_the_training_of_torch_optim(name: str) -> None:
    run = random_run(**SETTINGS[name])
    end = played_all(run)[-1].after.theta
    torch.testing.assert_close(end, torch_run(run, {}), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["clipped", "groups", "accumulated and weighted", "L2 in the gradient"])
def test_scores_are_differences_of_real_optimizer_runs(name: str) -> None:
    run = random_run(**SETTINGS[name])
    scores, _ = adjoint_scores(run, TARGET)
    for step, place in ((1, 0), (4, 2)):
        ends = []
        for eps in (1e-5, -1e-5):
            weights = run.steps[step].weights.clone()
            weights[place] *= 1 - eps
            ends.append(target_loss(run, torch_run(run, {step: weights}), TARGET))
        difference = float((ends[0] - ends[1]) / 2e-5)
        # Central differences of size 1e-5: an error of 1e-10 relative to the third derivative, and 1e-16/1e-5 rounding.
        assert difference == pytest.approx(float(scores[step][place]), rel=1e-5, abs=1e-9)


def test_sgd_influence_is_the_product_of_hessians() -> None:
    run = random_run(**SETTINGS["SGD"], steps=4)
    played = played_all(run)
    eye = torch.eye(run.problem.layout.numel, dtype=torch.float64)
    product = eye
    for step in reversed(played[2:]):
        _, hessian = products(run.problem, step.before.theta, step.step.micros, step.step.weights, eye, "exact")
        product = product @ (eye - step.step.rates[0] * hessian)
    grads = per_sample_gradients(run.problem, played[1].before.theta, played[1].step.micros[0])
    moved = played[1].step.rates[0] / len(grads) * grads @ product.T
    _, goal = mean_gradient(run.problem, played[-1].after.theta, TARGET)
    scores, _ = adjoint_scores(run, TARGET, method="sgd-influence")
    torch.testing.assert_close(scores[1], moved @ goal, **EXACT)


def test_adamw_with_a_huge_eps_is_sgd_with_momentum() -> None:
    scale = 1e6
    plain = {"steps": 5, "decays": (0.0,), "seed": 2}
    # Torch's SGD does not divide its moment by 1/(1-β1); without bias correction AdamW's is that times (1-β1).
    adam = random_run(**plain, eps=scale, lr=scale * 1e-2)
    played = played_all(adam)
    derivative = played[-1].derivative()
    raw_sum = sum(0.9 ** (4 - t) * p.g for t, p in enumerate(played)) * 0.1 / (1 - 0.9**5)
    expected = -played[-1].step.rates[0] / scale * raw_sum
    moved = played[-1].after.theta - played[-1].before.theta
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)
    k_theta: Any = derivative.k_theta  # type: ignore[union-attr]
    torch.testing.assert_close(
        k_theta, torch.full_like(k_theta, -played[-1].step.rates[0] / scale * 0.1 / (1 - 0.9**5)), rtol=1e-5, atol=0
    )


def test_in_the_last_step_every_curvature_gives_the_same() -> None:
    found = [adjoint_scores(random_run(), TARGET, curvature=c)[0][-1] for c in ("exact", "ggn", "fisher", "none")]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **EXACT)


def test_fisher_is_the_sum_of_outer_products_and_ggn_that_of_the_logits() -> None:
    run = random_run(micro_sizes=(2, 3), even=False)
    step, theta = run.steps[0], run.states[0].theta
    eye = torch.eye(len(theta), dtype=torch.float64)
    grads = torch.cat([per_sample_gradients(run.problem, theta, micro) for micro in step.micros])
    inner, fisher = products(run.problem, theta, step.micros, step.weights, eye, "fisher")
    torch.testing.assert_close(inner, grads.T, **EXACT)
    torch.testing.assert_close(fisher, grads.T @ (grads * step.weights[:, None]), **EXACT)
    ggn = torch.zeros_like(fisher)
    first = 0
    for micro in step.micros:

        def logits(flat: Tensor, micro: Any = micro) -> Tensor:
            return run.problem.predict(run.problem.layout.named(flat), micro).logits

        jacobian = torch.autograd.functional.jacobian(logits, theta)  # (B, C, P)
        soft = torch.softmax(logits(theta), dim=1)
        for row, (part, pi) in enumerate(zip(jacobian, soft, strict=True)):
            ggn += step.weights[first + row] * part.T @ (torch.diag(pi) - torch.outer(pi, pi)) @ part
        first += len(soft)
    for directions in (eye, eye[:1]):  # many at once and one alone take different ways
        _, found = products(run.problem, theta, step.micros, step.weights, directions, "ggn")
        torch.testing.assert_close(found, (ggn @ directions.T).T, **EXACT)


def test_renormalised_removal_is_the_score_centred_in_its_batch() -> None:
    run = random_run(clip=0.3)
    scores, _ = adjoint_scores(run, TARGET)
    found = renormalised(scores[2][:, None], run.steps[2].weights)[:, 0]
    torch.testing.assert_close(found, 5 / 4 * (scores[2] - scores[2].mean()), **EXACT)
    weighted = random_run(even=False, micro_sizes=(2, 3))
    scores, _ = adjoint_scores(weighted, TARGET)
    step = weighted.steps[3]
    eps, place = 1e-5, 1
    others = weights_without(step.weights, place, renormalise=True)
    ends = [
        target_loss(weighted, torch_run(weighted, {3: step.weights + e * (others - step.weights)}), TARGET)
        for e in (eps, -eps)
    ]
    found = renormalised(scores[3][:, None], step.weights)[:, 0]
    assert float((ends[0] - ends[1]) / (2 * eps)) == pytest.approx(float(found[place]), rel=1e-5)


def backwards(run: HeldTrajectory) -> list[tuple[Played, Tensor]]:
    return [
        (played, torch.cat([per_sample_gradients(run.problem, played.before.theta, m) for m in played.step.micros]))
        for played in reversed(played_all(run))
    ]


@pytest.mark.parametrize("name", ["plain", "clipped", "groups", "accumulated and weighted"])
def test_the_summary_matrix_is_the_adjoint_with_fisher(name: str) -> None:
    run = random_run(**SETTINGS[name])
    scores, _ = adjoint_scores(run, TARGET, curvature="fisher")
    _, goal = mean_gradient(run.problem, played_all(run)[-1].after.theta, TARGET)
    matrix = SummaryMatrix(mask=torch.arange(len(goal)), like=goal)
    for played, grads in backwards(run):
        found = scores_of_embeddings(matrix.embed(played, grads), goal[None], matrix.mask)[:, 0]
        torch.testing.assert_close(found, scores[played.step.index], **EXACT)


def test_disjoint_masks_add_up_where_there_is_no_curvature() -> None:
    """In the last step, and everywhere once the rank-B update is left out."""
    run = random_run(clip=0.25)
    plain, _ = adjoint_scores(run, TARGET, curvature="none")
    _, goal = mean_gradient(run.problem, played_all(run)[-1].after.theta, TARGET)
    masks = draw_masks(len(goal), count=4, seed=1)
    assert torch.equal(torch.cat(masks).sort().values, torch.arange(len(goal)))
    matrices = [SummaryMatrix(mask=mask, like=goal) for mask in masks]
    for played, grads in backwards(run):
        total = torch.zeros(len(grads), dtype=torch.float64)
        for matrix in matrices:
            before = matrix.rows
            total += scores_of_embeddings(matrix.embed(played, grads), goal[None], matrix.mask)[:, 0]
            matrix.rows = played.derivative().at(matrix.mask).back(before, 0.0)  # type: ignore[union-attr]
        torch.testing.assert_close(total, plain[played.step.index], **EXACT)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_finite_removal_over_all_steps_comes_close_to_retraining(clip: float | None, renormalise: bool) -> None:
    run = random_run(clip=clip, lr=1e-3, micro_sizes=(3, 2))
    _, goal = mean_gradient(run.problem, played_all(run)[-1].after.theta, TARGET)
    channel = start_channel("it", "adamw-influence", "exact", goal[None], moments=2)
    window = SecantWindow(run.num_steps)
    for played, grads in backwards(run):
        window.enter(played, channel.adjoint)
        found = window.scores(played, grads, played.step.weights, renormalise=renormalise)[:, 0]
        first_order = sweep_step(run.problem, played, channel)
        if renormalise:
            first_order = renormalised(first_order, played.step.weights)
        if played.step.index in (0, 5):
            truth = torch.stack(
                [
                    leave_out_effect(run, played.step.index, place, TARGET, renormalise=renormalise).mean()
                    for place in range(5)
                ]
            )
            error, plain = (found - truth).norm() / truth.norm(), (first_order[:, 0] - truth).norm() / truth.norm()
            assert error < 0.03 and error < 0.2 * plain  # what is left is curvature of the loss, of order lr


def test_scores_are_relative() -> None:
    """Clipping keeps only the direction of an update's gradient, and Adam divides by the gradients' size."""
    clipped, _ = adjoint_scores(random_run(clip=1e-3), TARGET)
    for scores in clipped:
        assert float(scores.sum(dim=0).abs().max()) < 1e-5 * float(scores.abs().max())  # PyTorch clips at norm + 1e-6
    plain = torch.cat(adjoint_scores(random_run(), TARGET)[0])
    assert float(plain.sum(dim=0).abs().max()) < 1e-3 * float(plain.abs().sum(dim=0).max())


def test_the_error_proxy_is_the_sum_it_stands_for() -> None:
    run = random_run(clip=0.5, lr=3e-2)
    played = played_all(run)
    proxy, found = ErrorProxy(), {}
    for step, grads in backwards(run):
        proxy.enter(step)
        found[step.step.index] = proxy.norms(step, grads, step.step.weights)
    start = 2
    grads = per_sample_gradients(run.problem, played[start].before.theta, played[start].step.micros[0])
    for row, grad in enumerate(grads):
        change = -played[start].clip.jacobian(grad) / len(grads)
        total = torch.zeros_like(change)
        m, v, nu = 0.1 * change, 2 * 0.001 * played[start].g * change, 0.001 * change**2
        for step in played[start:]:
            if step is not played[start]:
                m, v, nu = 0.9 * m, 0.999 * v, 0.999 * nu
            d: Any = step.derivative()
            s = d.settings
            m_hat, v_hat = s.c1 * m, s.c2 * v
            second = d.m_hat * (d.d**2 / (4 * d.root**3) + d.d**3 / (2 * d.root**2)) / 2
            r = -s.c2 * d.e * nu - d.d**2 / (2 * d.root) * m_hat * v_hat + second * v_hat**2
            total += step.step.rates[0] * r
        torch.testing.assert_close(found[start][row], total.norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["plain", "clipped", "L2 in the gradient"])
def test_exact_second_order_is_that_of_the_retrained_parameters(name: str) -> None:
    run = random_run(**SETTINGS[name], steps=5)
    played, start, place, eps = played_all(run), 1, 2, 1e-3
    grads = per_sample_gradients(run.problem, played[start].before.theta, played[start].step.micros[0])
    sample = SecondOrder.start(played[start], grads[place], float(run.steps[start].weights[place]))
    for step in played[start + 1 :]:
        sample.follow(run.problem, step)
    ends = []
    for e in (eps, -eps):
        weights = run.steps[start].weights.clone()
        weights[place] *= 1 - e
        ends.append(torch_run(run, {start: weights}))
    middle = played[-1].after.theta
    first, half = (ends[0] - ends[1]) / (2 * eps), (ends[0] + ends[1] - 2 * middle) / (2 * eps**2)
    # Differences of size 1e-3 are wrong by 1e-6 times the next derivative, which Adam's roots make large.
    assert (sample.change[0] - first).norm() < 1e-4 * first.norm()
    assert (sample.bend[0] - half).norm() < 1e-3 * half.norm()


def test_inputs_that_never_had_a_gradient_leave_all_numbers_finite() -> None:
    run = random_run(steps=3)
    for step in run.steps:
        for micro in step.micros:
            micro.inputs[:, 2:] = 0.0
    run = train(run.problem, run.rule, run.states[0].theta, run.steps, every=3)
    scores, queries = adjoint_scores(run, TARGET)
    assert all(bool(torch.isfinite(x).all()) for x in [*scores, *queries])
    proxy = ErrorProxy()
    for played, grads in backwards(run):
        proxy.enter(played)
        assert torch.isfinite(proxy.norms(played, grads, played.step.weights)).all()


def test_error_estimates_of_young_coordinates_are_those_of_float64() -> None:
    """A new adapter's first factors have gradients far below eps; second derivatives there pass float32's range."""
    run = random_run(steps=4)
    for step in run.steps:
        for micro in step.micros:
            micro.inputs[:, 2:] *= 1e-11
    run = train(run.problem, run.rule, run.states[0].theta, run.steps, every=4)
    wide, narrow = ErrorProxy(), ErrorProxy()
    for played, grads in backwards(run):
        single = as_float32(played)
        assert not torch.isfinite(single.derivative().root.min() ** -3 * 1e16)
        wide.enter(played)
        narrow.enter(single)
        found = narrow.norms(single, grads.float(), played.step.weights)
        torch.testing.assert_close(found.double(), wide.norms(played, grads, played.step.weights), rtol=1e-3, atol=0)
        if played.step.index == 0:
            continue  # a sign step: its terms cancel, in float32 to noise that later steps' terms drown
        one, other = (
            SecondOrder.start(at, g, 0.2).bend[0].double() for at, g in ((played, grads[0]), (single, grads[0].float()))
        )
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6 * float(one.abs().max()))


def as_float32(played: Played) -> Played:
    def state(own: State) -> State:
        return State(theta=own.theta.float(), moments=tuple(m.float() for m in own.moments), count=own.count)

    clip = replace(played.clip, gradient=played.clip.gradient.float())
    return replace(played, before=state(played.before), after=state(played.after), g=played.g.float(), clip=clip)
