"""What the processes of a run exchange in an online step; in a run of one process nothing happens.

Tensors come back on the device they came from; on the way they travel where the backend can see them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tamis.model.processes import collective_device, counts_of_all, rank, world_size

__all__ = ["add_up", "as_first", "gather_rows", "offset_of"]


def gather_rows(mine: Tensor) -> Tensor:
    """The rows of every process, in the order of processes; each may have another number of them."""
    if world_size() == 1:
        return mine
    counts = counts_of_all(len(mine))
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    there = padded.to(collective_device()).contiguous()
    parts = [torch.empty_like(there) for _ in counts]
    dist.all_gather(parts, there)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(mine.device)


def add_up(mine: Tensor) -> Tensor:
    """The sum over processes, the same bits in each."""
    if world_size() == 1:
        return mine
    there = mine.to(collective_device(), copy=True).contiguous()
    dist.all_reduce(there)
    return there.to(mine.device)


def as_first(mine: Tensor) -> Tensor:
    """The first process's tensor: decisions are made from one set of bits, or processes could decide differently."""
    if world_size() == 1:
        return mine
    there = mine.to(collective_device(), copy=True).contiguous()
    dist.broadcast(there, src=0)
    return there.to(mine.device)


def offset_of(counts: list[int]) -> int:
    """Where this process's rows begin among those of all."""
    return sum(counts[: rank()])
