"""MNIST runs of the trajectory attribution paper (app. D.1): one epoch, batches of 64, a constant rate.

``mlp`` and ``cnn`` are the paper's networks. They have ReLU and max pooling, whose kinks no derivative sees;
``mlp-tanh`` and ``cnn-tanh`` are the same with tanh and average pooling, and have none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamis.trajectory.replay import train
from tamis.trajectory.run import Group, HeldTrajectory, Rule, Step

# Shared with the tests: the package itself trains language models only.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from classifier import Classifier as Classifier
from classifier import LabelledRows

BATCH, STEPS = 64, 94
TARGETS_AT_ONCE = 125


class Mlp(nn.Module):
    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Cnn(nn.Module):
    """Two convolutions, each with ``after`` behind it, and a linear layer.

    With ``channels_last`` its images lie as CPUs take them fastest. That cannot be differentiated in batches of
    cotangents; the numbers are the same but for rounding.
    """

    def __init__(self, *after: Callable[[], nn.Module], channels_last: bool = False) -> None:
        super().__init__()
        order: list[nn.Module] = [ChannelsLast()] if channels_last else []
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), *order, *(make() for make in after),
            nn.Conv2d(32, 64, 3, padding=1), *order, *(make() for make in after), nn.Flatten(), nn.Linear(64 * 49, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class Network:
    make: Callable[[], nn.Module]
    train: Callable[[], nn.Module]  # the same, faster where only gradients of batches are asked for
    dtype: torch.dtype  # float64 where it can be paid: effects of 1e-9 at the smallest rates are no noise then
    together: bool  # many small networks are trained faster in one batched pass; many convolutions are not


def dense(activation: type[nn.Module]) -> Network:
    def make() -> nn.Module:
        return Mlp(activation)

    return Network(make=make, train=make, dtype=torch.float64, together=True)


def convolutional(*after: Callable[[], nn.Module]) -> Network:
    return Network(
        make=lambda: Cnn(*after), train=lambda: Cnn(*after, channels_last=True), dtype=torch.float32, together=False
    )


NETWORKS = {
    "mlp": dense(nn.ReLU),
    "mlp-tanh": dense(nn.Tanh),
    "cnn": convolutional(lambda: nn.MaxPool2d(2), nn.ReLU),  # in the other order the same, for four times the ReLUs
    "cnn-tanh": convolutional(nn.Tanh, lambda: nn.AvgPool2d(2)),
}


@dataclass(frozen=True, kw_only=True)
class Images(LabelledRows):
    """Rows of which some can be taken."""

    def at(self, places: Sequence[int]) -> Images:
        index = list(places)
        return Images(inputs=self.inputs[index], labels=self.labels[index])

    def first(self, count: int) -> Images:
        return Images(inputs=self.inputs[:count], labels=self.labels[:count])

    def split(self, count: int) -> tuple[Images, ...]:
        return tuple(self.at(range(first, min(first + count, len(self)))) for first in range(0, len(self), count))


@dataclass(frozen=True, kw_only=True)
class Mnist:
    """A tenth of MNIST, standardised: 6,000 training and 1,000 test images."""

    train: Images
    test: Images


def load_mnist(folder: Path, dtype: torch.dtype) -> Mnist:
    data = np.load(folder / "mnist10.npz")

    def rows(split: str) -> Images:
        images = torch.from_numpy(data[f"x_{split}"]).to(dtype)[:, None] / 255
        labels = torch.from_numpy(data[f"y_{split}"]).long()
        return Images(inputs=((images - 0.1307) / 0.3081), labels=labels)

    return Mnist(train=rows("train"), test=rows("test"))


def started(network: str, seed: int) -> tuple[Classifier, Classifier]:
    """The network before training, as it is trained and as it is differentiated further."""
    own = NETWORKS[network]

    def problem(make: Callable[[], nn.Module]) -> Classifier:
        torch.manual_seed(seed)
        return Classifier(make().to(own.dtype))

    return problem(own.train), problem(own.make)


def training_run(
    data: Mnist, network: str, optimizer: str, rate: float, *, seed: int, steps: int, targets: int
) -> tuple[HeldTrajectory, Classifier, tuple[Any, ...]]:
    """A run of ``steps`` updates of the epoch (94 are all of it), what to differentiate, and test images as targets."""
    problem, further = started(network, seed)
    order = np.random.default_rng(1000 + seed).permutation(len(data.train))
    tests = np.random.default_rng(2000 + seed).permutation(len(data.test))[:targets].tolist()
    found = []
    for t in range(min(steps, -(-len(order) // BATCH))):
        index = order[t * BATCH : (t + 1) * BATCH]
        weights = torch.full((len(index),), 1 / len(index), dtype=torch.float64)
        micro = data.train.at(index.tolist())
        found.append(Step(index=t, micros=(micro,), rows=index, weights=weights, rates=(rate,)))
    if optimizer == "adamw":
        rule = Rule(kind="adamw", groups=(Group(numel=problem.layout.numel, decay=0.01),))
    else:
        rule = Rule(kind="sgd", groups=(Group(numel=problem.layout.numel, beta1=0.0),))
    return train(problem, rule, problem.start(), found, every=1), further, data.test.at(tests).split(TARGETS_AT_ONCE)
