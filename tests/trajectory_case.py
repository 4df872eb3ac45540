"""Small trajectories for tests: the method's deterministic reference case, and random ones with every setting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from classifier import Classifier, LabelledRows
from tamis.trajectory.adjoint import start_channel, sweep_step
from tamis.trajectory.replay import Played, mean_gradient, play_segment, train
from tamis.trajectory.run import Group, HeldTrajectory, Rule, Step


class ReferenceNet(nn.Module):
    """``W2 tanh(W1 x + b1) + b2``, 4-3-3, parameters in the order W1, b1, W2, b2."""

    def __init__(self, inputs: int = 4, hidden: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def reference_rows(numbers: Sequence[int]) -> LabelledRows:
    n = torch.tensor(list(numbers), dtype=torch.float64)[:, None]
    inputs = torch.sin(1 + 0.7 * n + 1.9 * torch.arange(4, dtype=torch.float64))
    return LabelledRows(inputs=inputs, labels=torch.tensor([(i + i // 4) % 3 for i in numbers]))


REFERENCE_TARGET = (reference_rows([100, 101]),)


def reference_run(*, clip: float | None = None, every: int = 5) -> HeldTrajectory:
    """Five steps of AdamW on four samples each, under a rising rate."""
    problem = Classifier(ReferenceNet())
    theta = 0.5 * torch.sin(0.3 + 1.1 * torch.arange(27, dtype=torch.float64))
    steps = [
        Step(
            index=t,
            micros=(reference_rows(range(4 * t, 4 * t + 4)),),
            rows=np.arange(4 * t, 4 * t + 4),
            weights=torch.full((4,), 0.25, dtype=torch.float64),
            rates=(0.05 * (t + 1) / 5,),
        )
        for t in range(5)
    ]
    rule = Rule(kind="adamw", groups=(Group(numel=27, decay=0.1),), clip=clip)
    return train(problem, rule, theta, steps, every=every)


def random_run(
    *,
    kind: str = "adamw",
    steps: int = 8,
    clip: float | None = None,
    decays: Sequence[float] = (0.1,),
    rates: Sequence[float] = (1.0,),
    lr: float = 1e-2,
    micro_sizes: Sequence[int] = (5,),
    even: bool = True,
    momentum: float = 0.9,
    eps: float = 1e-8,
    seed: int = 0,
    every: int = 100,
) -> HeldTrajectory:
    """Random data and a tanh network; groups split the parameters, micro-batches the batch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    problem = Classifier(ReferenceNet(5, 4, 3))
    total = problem.layout.numel
    split = [total // len(decays)] * (len(decays) - 1)
    groups = tuple(
        Group(numel=size, decay=decay, eps=eps, beta1=momentum)
        for size, decay in zip([*split, total - sum(split)], decays, strict=True)
    )
    size = sum(micro_sizes)
    found = []
    for t in range(steps):
        x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (size,), generator=generator)
        weights = torch.full((size,), 1 / size, dtype=torch.float64)
        if not even:
            weights = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
            weights = weights / weights.sum()
        parts = zip(x.split(list(micro_sizes)), y.split(list(micro_sizes)), strict=True)
        found.append(
            Step(
                index=t,
                micros=tuple(LabelledRows(inputs=a, labels=b) for a, b in parts),
                rows=np.arange(t * size, (t + 1) * size),
                weights=weights,
                rates=tuple(lr * factor * (steps - t / 2) / steps for factor in rates),
            )
        )
    rule = Rule(kind=kind, groups=groups, clip=clip)  # type: ignore[arg-type]
    return train(problem, rule, problem.start(), found, every=every)


def random_target(count: int = 4, seed: int = 9) -> tuple[LabelledRows, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return (LabelledRows(inputs=x, labels=torch.randint(0, 3, (count,), generator=generator)),)


def played_all(run: HeldTrajectory) -> list[Played]:
    return play_segment(run, 0, run.num_steps)


def target_loss(run: HeldTrajectory, theta: Tensor, target: Sequence[LabelledRows]) -> Tensor:
    return run.problem.predict(run.problem.layout.named(theta), target[0]).losses().mean()


def adjoint_scores(
    run: HeldTrajectory,
    target: Sequence[LabelledRows],
    *,
    method: str = "adamw-influence",
    curvature: str = "exact",
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores (B,) of every step, and ``‖q‖``-carrying adjoints are left to the caller."""
    played = played_all(run)
    _, goal = mean_gradient(run.problem, played[-1].after.theta, target)
    moments = len(played[-1].after.moments)
    channel = start_channel("it", method, curvature, goal[None], moments=moments)  # type: ignore[arg-type]
    scores, queries = [], []
    for step in reversed(played):
        queries.insert(0, step.clip.jacobian(channel.derivative(step).inject(channel.adjoint))[0])
        scores.insert(0, sweep_step(run.problem, step, channel)[:, 0])
    return scores, queries
