"""Embeddings of all samples of a run, made before any target is known: the summary matrix over a whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tamis.gradients.functional import per_sample_gradients
from tamis.trajectory.replay import play_segment, segments
from tamis.trajectory.run import Trajectory
from tamis.trajectory.segment_store import SegmentStore
from tamis.trajectory.summary_matrix import SummaryMatrix, require_adam, scores_of_embeddings

__all__ = ["run_embeddings", "scores_from_embeddings"]


def run_embeddings(
    trajectory: Trajectory,
    masks: Sequence[Tensor],
    *,
    rescale: bool = False,
    folder: Path | None = None,
    tolerance: float | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[list[Tensor]]:
    """``e_i`` of every sample: for each mask a list over steps of (B, K).

    Raises:
        StoreMismatch: the replay is not the recorded run.
        InvalidSettings: the run was not trained by Adam.
    """
    require_adam(trajectory.rule)
    theta = trajectory.state(trajectory.num_steps).theta
    matrices = [SummaryMatrix(mask=mask.to(theta.device), like=theta, rescale=rescale) for mask in masks]
    parts, done = segments(trajectory), SegmentStore(folder)
    left = parts
    if done.reached is not None:
        left = [part for part in parts if part[1] <= done.reached]
        saved = done.tensors(theta)
        for number, matrix in enumerate(matrices if saved else ()):
            matrix.rows = (saved[f"{number}.0"], saved[f"{number}.1"], saved[f"{number}.2"])
        advance(trajectory.num_steps - done.reached)
    for start, stop in reversed(left):
        found: dict[int, dict[str, Tensor]] = {}
        for played in reversed(play_segment(trajectory, start, stop, tolerance=tolerance)):
            micros, problem = played.step.micros, trajectory.problem
            grads = torch.cat([per_sample_gradients(problem, played.before.theta, micro) for micro in micros])
            found[played.step.index] = {
                str(number): matrix.embed(played, grads).cpu() for number, matrix in enumerate(matrices)
            }
        rows = {f"{number}.{i}": part for number, m in enumerate(matrices) for i, part in enumerate(m.rows)}
        done.write(start, stop, [found[index] for index in range(start, stop)], rows if start else {})
        advance(stop - start)
    by_mask = done.all(parts)
    return [by_mask[str(number)] for number in range(len(masks))]


def scores_from_embeddings(
    embeddings: Sequence[Sequence[Tensor]], masks: Sequence[Tensor], goal: Tensor, *, disjoint: bool
) -> list[Tensor]:
    """Scores (B, V) of every step from final values with gradients ``goal``, (V, P).

    Parts of disjoint masks add up. Independent masks of K coordinates are averaged and multiplied by P / K, so that
    without curvature the score is right on average over their draw.
    """
    share = 1.0 if disjoint else sum(map(len, masks)) / goal.shape[1]  # of masks together, in units of all coordinates
    found = []
    for step in range(len(embeddings[0])):
        parts = [scores_of_embeddings(own[step], goal.cpu(), mask) for own, mask in zip(embeddings, masks, strict=True)]
        found.append(torch.stack(parts).sum(dim=0) / share)
    return found
