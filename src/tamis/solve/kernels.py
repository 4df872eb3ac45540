"""From raw embeddings to a kernel between rows: centring, half-whitening, unit rows, bandwidth from the median.

One map, made once from the landmarks, is applied to pool, landmarks and target alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput, InvalidSettings
from tamis.maths.similarity import unit_rows
from tamis.seeds import child_seed, random_subset

__all__ = ["EmbeddingMap", "Kernel", "KernelName", "embedding_map", "kernel_matrix", "median_squared_distance"]

KernelName = Literal["rbf", "laplace", "linear"]

# Singular values below this share of the largest say nothing about a direction.
_DIRECTION_CUTOFF = 1e-6
_MEDIAN_ROWS = 2000


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of unit rows; ``m`` is the median squared distance among the landmarks.

    ``rbf``: ``exp(-‖x-y‖² / (c m))``; ``laplace``: ``exp(-‖x-y‖ / (c √m))``, Euclidean; ``linear``: ``x·y``, without c.
    """

    name: KernelName = "rbf"
    scale: float = 2.0  # c

    def __post_init__(self) -> None:
        if self.name not in get_args(KernelName):
            raise InvalidSettings(f"kernel {self.name!r} is unknown; choose one of {', '.join(get_args(KernelName))}")
        if not 0 < self.scale < float("inf"):
            raise InvalidSettings(f"the kernel's scale must be a positive number, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class EmbeddingMap:
    """``x -> unit(W (x - mean))``; None leaves a step out. Rows that become zero stay zero."""

    mean: Float[Tensor, " E"] | None = None
    # W = I + V (diag(gains) - I) V^T: its scale does not matter, since unit rows follow.
    directions: Float[Tensor, "E R"] | None = None  # V, orthonormal
    gains: Float[Tensor, " R"] | None = None  # at most 1

    def apply(self, embeddings: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Unit rows in float32 at least.

        Raises:
            InvalidInput: the rows have another length than the mean.
        """
        x = embeddings if embeddings.dtype in (torch.float32, torch.float64) else embeddings.float()
        if self.mean is not None:
            if self.mean.shape[0] != x.shape[1]:
                raise InvalidInput(
                    f"embeddings have {x.shape[1]} numbers a row but their mean has {self.mean.shape[0]}; "
                    "embed pool and target alike"
                )
            x = x - self.mean.to(x)
        if self.directions is not None and self.gains is not None:
            directions = self.directions.to(x)
            x = x + ((x @ directions) * (self.gains.to(x) - 1)) @ directions.T
        return unit_rows(x)


def embedding_map(
    sample: Float[Tensor, "N E"], *, mean: Float[Tensor, " E"] | None, half_whitened: bool = False
) -> EmbeddingMap:
    """The map of a pool, from its ``mean`` (None: not centred) and a ``sample`` of raw rows for half-whitening.

    Half-whitening brings every singular value s of the centred sample to its square root: less weight on what all rows
    share. Directions that the sample does not reach are scaled like its weakest one, so that rows outside the sample
    keep all they have. It helps forward-only embeddings and hurts gradients. Without it the sample is not read.
    """
    if not half_whitened:
        return EmbeddingMap(mean=mean)
    x = sample.double() if mean is None else sample.double() - mean.double()
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    kept = sizes > _DIRECTION_CUTOFF * sizes.max() if len(sizes) else sizes > 0
    sizes, directions = sizes[kept], directions[kept]
    gains = (sizes[-1:] / sizes).sqrt()
    dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
    return EmbeddingMap(mean=mean, directions=directions.T.to(dtype), gains=gains.to(dtype))


def median_squared_distance(rows: Float[Tensor, "N E"]) -> float:
    """Median of ``‖x_i - x_j‖²`` over pairs i < j, of 2000 random rows if there are more; 1 if that is zero.

    Zero means that most rows are copies of each other: any bandwidth is as good, and dividing by zero is none.
    """
    if len(rows) > _MEDIAN_ROWS:
        chosen = random_subset(child_seed(0, "median-distance", len(rows)), len(rows), _MEDIAN_ROWS)
        rows = rows[torch.from_numpy(chosen).to(rows.device)]
    if len(rows) < 2:
        return 1.0
    squared = _squared_distances(rows.double(), rows.double())
    first, second = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    ordered = squared[first, second].sort().values
    median = float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    # Copies have a distance of rounding size, not zero.
    return median if median > 1e-12 else 1.0


def kernel_matrix(
    x: Float[Tensor, "N E"], y: Float[Tensor, "M E"], kernel: Kernel, median: float
) -> Float[Tensor, "N M"]:
    """``k(x_i, y_j)`` of rows that went through one map; ``median`` is the landmarks' median squared distance."""
    if kernel.name == "linear":
        return x @ y.T
    if kernel.name == "rbf":
        return _squared_distances(x, y).mul_(-1 / (kernel.scale * median)).exp_()
    # The root of a small difference of large numbers has half the digits: take them in float64.
    distances = _squared_distances(x.double(), y.double()).sqrt_()
    return distances.mul_(-1 / (kernel.scale * median**0.5)).exp_().to(x.dtype)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)
