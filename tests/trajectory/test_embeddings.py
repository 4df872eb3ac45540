"""Embeddings of a run: by dense matrices that autograd takes from the training itself, and after an interruption."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tamis.gradients.functional import per_sample_gradients
from tamis.trajectory.embeddings import run_embeddings, scores_from_embeddings
from tamis.trajectory.replay import Played
from tamis.trajectory.run import HeldTrajectory
from tamis.trajectory.summary_matrix import draw_masks
from trajectory_case import played_all, random_run


def after_step(played: Played, state: Tensor, raw: Tensor) -> Tensor:
    """``(θ, m, v)`` after the clipped AdamW step from ``state`` on the gradient ``raw``, differentiable in both."""
    theta, m, v = state.chunk(3)
    group, rate, count = played.rule.groups[0], played.step.rates[0], played.after.count
    assert played.rule.clip is not None
    g = raw * torch.clamp(played.rule.clip / (raw.norm() + 1e-6), max=1.0)
    m, v = group.beta1 * m + (1 - group.beta1) * g, group.beta2 * v + (1 - group.beta2) * g * g
    update = m / (1 - group.beta1**count) / ((v / (1 - group.beta2**count)).sqrt() + group.eps)
    return torch.cat([theta - rate * (update + group.decay * theta), m, v])


def dense_embeddings(run: HeldTrajectory, mask: Tensor, scale: float) -> list[Tensor]:
    """``e_i`` by whole Jacobians of every step, of which the coordinates outside of ``mask`` are struck out."""
    numel, found = run.problem.layout.numel, list[Tensor]()
    places = torch.cat([mask + slot * numel for slot in range(3)])
    matrix = torch.eye(len(places), dtype=torch.float64)[: len(mask)]  # dθ_T / d(θ, m, v)
    for played in reversed(played_all(run)):
        state = torch.cat([played.before.theta, *played.before.moments])
        carried, injected = torch.autograd.functional.jacobian(
            lambda state, raw, played=played: after_step(played, state, raw), (state, played.clip.gradient)
        )
        embeddings = []
        grads = torch.cat([per_sample_gradients(run.problem, played.before.theta, m) for m in played.step.micros])
        for weight, grad in zip(played.step.weights, grads, strict=True):
            embeddings.append(weight * matrix @ (injected @ grad)[places])
        matrix = matrix @ carried[places][:, places]
        for embedding, grad in zip(embeddings, grads, strict=True):
            matrix[:, : len(mask)] += scale * torch.outer(embedding, grad[mask])
        found.insert(0, torch.stack(embeddings))
    return found


@pytest.mark.parametrize("rescale", [False, True])
def test_embeddings_are_products_of_dense_jacobians_with_the_share_of_curvature_given_back(rescale: bool) -> None:
    run = random_run(clip=0.3, steps=4, lr=0.1, even=False, micro_sizes=(2, 3))
    numel = run.problem.layout.numel
    masks = draw_masks(numel, count=2, share=1 / 3, seed=1)
    assert [len(mask) for mask in masks] == [round(numel / 3)] * 2 and not torch.equal(*masks)
    found = run_embeddings(run, masks, rescale=rescale)
    for own, mask in zip(found, masks, strict=True):
        expected = dense_embeddings(run, mask, numel / len(mask) if rescale else 1.0)
        for one, other in zip(own, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)  # float64; the same sums in another order


def test_independent_masks_give_the_score_on_average_over_their_draw() -> None:
    """Over all pairs of five coordinates, one mask at a time; two masks are their mean."""
    generator = torch.Generator().manual_seed(0)
    whole, goal = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = [torch.tensor(pair) for pair in itertools.combinations(range(5), 2)]
    found = [scores_from_embeddings([[whole[:, pair]]], [pair], goal, disjoint=False)[0] for pair in pairs]
    torch.testing.assert_close(torch.stack(found).mean(dim=0), -whole @ goal.T)
    both = scores_from_embeddings([[whole[:, pair]] for pair in pairs[:2]], pairs[:2], goal, disjoint=False)[0]
    torch.testing.assert_close(both, (found[0] + found[1]) / 2)


def test_embeddings_that_were_interrupted_go_on_from_the_matrices_they_had_reached(tmp_path: Path) -> None:
    run = random_run(every=3, lr=0.1)
    masks = draw_masks(run.problem.layout.numel, count=2)

    def dies(steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_embeddings(run, masks, folder=tmp_path, advance=dies)
    assert json.loads((tmp_path / "reached.json").read_text()) == {"step": 6}
    resumed, whole = run_embeddings(run, masks, folder=tmp_path), run_embeddings(run, masks)
    for own, other in zip(resumed, whole, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
