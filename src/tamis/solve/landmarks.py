"""Which rows of the pool become landmarks. Uniform is the default, as in the paper, which found others no better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput
from tamis.seeds import child_seed, random_subset, random_uniform
from tamis.types import IntArray

__all__ = ["LANDMARK_RULES", "LandmarkRule", "kmeans_plus_plus", "leverage_landmarks", "uniform_landmarks"]

LandmarkRule = Literal["uniform", "k-means++", "leverage"]


def uniform_landmarks(population: int, count: int, seed: int) -> IntArray:
    """``count`` different rows, each as likely as any other, ascending.

    Raises:
        InvalidInput: more landmarks are wanted than there are rows, or none.
    """
    _check(population, count)
    return random_subset(child_seed(seed, "landmarks", "uniform"), population, count)


def kmeans_plus_plus(embeddings: Float[Tensor, "N E"], count: int, seed: int) -> IntArray:
    """D² sampling (Arthur and Vassilvitskii, 2007): each next row with probability ∝ its squared distance to the
    nearest row taken so far, the first one uniformly. Ascending.

    Once every row left is a copy of one taken, the rest is drawn uniformly. Costs ``count`` passes over the rows.

    Raises:
        InvalidInput: more landmarks are wanted than there are rows, or none.
    """
    n = len(embeddings)
    _check(n, count)
    draws = random_uniform(child_seed(seed, "landmarks", "k-means++"), count)
    squares = embeddings.square().sum(1)
    # Differences of rounding size are copies; the squares they come from say how large rounding is.
    rounding = 64 * torch.finfo(embeddings.dtype).eps * squares
    taken = [int(draws[0] * n)]
    nearest = torch.full_like(squares, float("inf"))
    while len(taken) < count:
        last = taken[-1]
        distances = squares + squares[last] - 2 * (embeddings @ embeddings[last])
        distances[distances <= rounding + rounding[last]] = 0
        distances[last] = 0
        nearest = torch.minimum(nearest, distances)
        cumulative = nearest.double().cumsum(0)
        total = float(cumulative[-1])
        if total == 0:
            break
        place = torch.tensor(draws[len(taken)] * total, dtype=torch.float64, device=cumulative.device)
        row = int(torch.searchsorted(cumulative, place, right=True))
        taken.append(min(row, int(nearest.nonzero()[-1, 0])))  # the product may round up to the total
    rest = np.setdiff1d(np.arange(n), taken)
    filled = random_subset(child_seed(seed, "landmarks", "k-means++", "copies"), len(rest), count - len(taken))
    return np.sort(np.concatenate([np.asarray(taken, dtype=np.int64), rest[filled]]))


def leverage_landmarks(embeddings: Float[Tensor, "N E"], count: int, seed: int) -> IntArray:
    """``count`` different rows, ascending, drawn with probability ∝ ridge leverage ``e_i (E^T E + γI)^{-1} e_i^T``.

    γ is the energy beyond the ``count`` largest singular directions, divided by ``count`` (Cohen, Musco and Musco,
    2017): rows that stand for a direction of their own are likely, rows that resemble many others are not.

    Raises:
        InvalidInput: more landmarks are wanted than there are rows, or none.
    """
    n = len(embeddings)
    _check(n, count)
    covariance = torch.zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    blocks = torch.split(embeddings, 16384)
    for block in blocks:
        covariance += block.double().T @ block.double()
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    gamma = max(float(values[: max(len(values) - count, 0)].sum()) / count, 1e-12 * float(values.sum()))
    leverage = np.ones(n)
    if gamma > 0:
        scaled = vectors / (values + gamma).sqrt()
        leverage = torch.cat([(block.double() @ scaled).square().sum(1) for block in blocks]).cpu().numpy()
    # The first arrivals of exponential clocks are a draw without replacement; rows without leverage come last.
    uniforms = random_uniform(child_seed(seed, "landmarks", "leverage"), n)
    with np.errstate(divide="ignore"):
        arrivals = -np.log1p(-uniforms) / leverage
    arrivals[leverage <= 0] = np.inf
    return np.sort(np.lexsort((uniforms, arrivals))[:count]).astype(np.int64)


def _check(population: int, count: int) -> None:
    if not 1 <= count <= population:
        raise InvalidInput(
            f"the number of landmarks must be between 1 and the {population} rows of the pool, got {count}"
        )


# The rules that look at embeddings; ``uniform`` needs only the number of rows.
LANDMARK_RULES: dict[LandmarkRule, Callable[[Float[Tensor, "N E"], int, int], IntArray]] = {
    "uniform": lambda embeddings, count, seed: uniform_landmarks(len(embeddings), count, seed),
    "k-means++": kmeans_plus_plus,
    "leverage": leverage_landmarks,
}
