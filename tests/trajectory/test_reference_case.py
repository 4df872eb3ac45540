"""The numbers of the method's deterministic reference case: AdamW, decay, a rising rate, with and without clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.gradients.functional import per_sample_gradients
from tamis.trajectory.adjoint import start_channel, sweep_step
from tamis.trajectory.leave_out import leave_out_effect
from tamis.trajectory.replay import mean_gradient
from tamis.trajectory.secant import SecantWindow
from tamis.trajectory.update_error import SecondOrder
from trajectory_case import REFERENCE_TARGET, adjoint_scores, played_all, reference_run

RTOL = 1e-6  # the case states eight digits

SCORES = {
    (None, "adamw-influence", "exact", 0): [1.7228487e-02, -8.1982589e-02, 5.1920986e-02, 3.9491659e-02],
    (None, "adamw-influence", "fisher", 0): [1.6986837e-02, -8.0761420e-02, 5.1579427e-02, 3.9301969e-02],
    (None, "sgd-influence", "exact", 0): [7.3121007e-04, -2.6141655e-03, 1.9840116e-03, 1.4235049e-03],
    (None, "adamw-influence", "exact", 1): [3.3638299e-03, -4.9787148e-03, 1.1389229e-02, -1.9749278e-02],
    (None, "adamw-influence", "exact", 2): [-7.5158037e-03, 4.6142188e-02, 4.8752023e-02, -1.0104355e-01],
    (None, "adamw-influence", "ggn", 2): [-7.7589602e-03, 4.6010434e-02, 4.7710810e-02, -1.0023272e-01],
    (None, "adamw-influence", "fisher", 2): [-7.4501524e-03, 4.5793617e-02, 4.8273098e-02, -1.0103556e-01],
    (None, "adamw-influence", "none", 4): [-3.9249668e-03, -1.5087327e-03, -1.4337285e-02, 1.5951831e-02],
    (0.35, "adamw-influence", "exact", 1): [5.7724994e-03, 5.0109519e-04, 7.0880321e-03, -1.3361634e-02],
    (0.35, "adamw-influence", "fisher", 1): [5.9074310e-03, 2.7814133e-04, 6.7754915e-03, -1.2961070e-02],
    (0.35, "adamw-influence", "exact", 3): [1.6254427e-02, -9.9921681e-03, -1.2000570e-03, -5.0622004e-03],
    (0.35, "adamw-influence", "exact", 4): [-1.8539985e-03, -8.3807603e-04, -1.8175232e-02, 2.0867293e-02],
}
SECANT = {
    (None, 3, 0): [1.5348151e-02, -9.3823710e-02, 7.0891895e-02, 6.2492735e-02],
    (None, 1, 2): [-4.5971669e-03, 4.2540658e-02, 4.5430837e-02, -9.7858688e-02],
    (0.35, 1, 4): [-5.9509765e-03, -1.9577058e-03, -1.7888680e-02, 1.5404078e-02],
}
TRUTH = {
    (None, 2): [-5.5225102e-03, 4.0647725e-02, 4.4946774e-02, -7.9565347e-02],
    (None, 4): [-3.8469862e-03, -1.9124387e-03, -1.5570955e-02, 1.3642978e-02],
    (0.35, 4): [-6.0382131e-03, -1.9348540e-03, -1.7600105e-02, 1.5586774e-02],
}


def close(found: Tensor, expected: list[float], rtol: float = RTOL) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-9)


def test_the_run_itself() -> None:
    played = played_all(reference_run())
    theta = played[-1].after.theta
    close(theta.norm(), 1.5819921)  # type: ignore[arg-type]
    close(theta[:3], [0.24428738, 0.53434592, 0.19898926])
    close(torch.stack([p.losses.mean() for p in played]), [1.1278162, 1.4441791, 1.0740419, 1.1856975, 1.2719074])
    norms = torch.tensor([p.clip.norm for p in played], dtype=torch.float64)
    close(norms, [0.31569640, 0.71624403, 0.28733511, 0.47489698, 0.41959818])


def test_the_clipped_run() -> None:
    played = played_all(reference_run(clip=0.35))
    close(played[-1].after.theta.sum(), 0.72477164)  # type: ignore[arg-type]
    assert [p.clip.is_active for p in played] == [False, True, False, True, True]


def test_derivatives_in_the_gradient_have_the_stated_lengths() -> None:
    _, queries = adjoint_scores(reference_run(), REFERENCE_TARGET)
    lengths = torch.stack([q.norm() for q in queries])
    close(lengths, [0.28874637, 0.15298553, 0.31583758, 0.12699301, 0.10548657])


@pytest.mark.parametrize("case", SCORES, ids=str)
def test_scores_are_those_of_the_case(case: tuple[float | None, str, str, int]) -> None:
    clip, method, curvature, step = case
    scores, _ = adjoint_scores(reference_run(clip=clip), REFERENCE_TARGET, method=method, curvature=curvature)
    close(scores[step], SCORES[case])


@pytest.mark.parametrize("case", SECANT, ids=str)
def test_finite_removal_is_that_of_the_case(case: tuple[float | None, int, int]) -> None:
    clip, width, wanted = case
    run = reference_run(clip=clip)
    played = played_all(run)
    _, goal = mean_gradient(run.problem, played[-1].after.theta, REFERENCE_TARGET)
    channel = start_channel("it", "adamw-influence", "exact", goal[None], moments=2)
    window = SecantWindow(width)
    for step in reversed(played):
        window.enter(step, channel.adjoint)
        if step.step.index == wanted:
            grads = per_sample_gradients(run.problem, step.before.theta, step.step.micros[0])
            close(window.scores(step, grads, step.step.weights)[:, 0], SECANT[case])
        sweep_step(run.problem, step, channel)


@pytest.mark.parametrize("case", TRUTH, ids=str)
def test_retraining_without_a_sample_gives_the_case_s_truth(case: tuple[float | None, int]) -> None:
    clip, index = case
    run = reference_run(clip=clip, every=2)
    found = torch.stack([leave_out_effect(run, index, place, REFERENCE_TARGET).mean() for place in range(4)])
    close(found, TRUTH[case])


def test_exact_second_order_has_the_stated_norms() -> None:
    run = reference_run()
    played = played_all(run)
    grads = per_sample_gradients(run.problem, played[2].before.theta, played[2].step.micros[0])
    norms = []
    for grad in grads:
        sample = SecondOrder.start(played[2], grad, 0.25)
        for step in played[3:]:
            sample.follow(run.problem, step)
        norms.append(sample.bend[0].norm())
    close(torch.stack(norms), [7.2250428e-02, 3.0732787e-02, 6.0944128e-02, 7.6147058e-02])
