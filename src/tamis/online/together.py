"""What the processes of a run exchange in an online step; in a run of one process nothing happens.

Tensors come back on the device they came from; on the way they travel where the backend can see them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tamis.model.processes import rank, world_size

__all__ = ["add_up", "as_first", "counts_of_all", "gather_rows", "offset_of"]


def gather_rows(mine: Tensor) -> Tensor:
    """The rows of every process, in the order of processes; each may have another number of them."""
    if world_size() == 1:
        return mine
    counts = counts_of_all(len(mine))
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    there = padded.to(_device()).contiguous()
    parts = [torch.empty_like(there) for _ in counts]
    dist.all_gather(parts, there)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(mine.device)


def counts_of_all(mine: int) -> list[int]:
    """A number of every process, in the order of processes."""
    if world_size() == 1:
        return [mine]
    there = torch.tensor([mine], dtype=torch.int64, device=_device())
    parts = [torch.empty_like(there) for _ in range(world_size())]
    dist.all_gather(parts, there)
    return [int(part) for part in parts]


def add_up(mine: Tensor) -> Tensor:
    """The sum over processes, the same bits in each."""
    if world_size() == 1:
        return mine
    there = mine.to(_device(), copy=True).contiguous()
    dist.all_reduce(there)
    return there.to(mine.device)


def as_first(mine: Tensor) -> Tensor:
    """The first process's tensor: decisions are made from one set of bits, or processes could decide differently."""
    if world_size() == 1:
        return mine
    there = mine.to(_device(), copy=True).contiguous()
    dist.broadcast(there, src=0)
    return there.to(mine.device)


def offset_of(counts: list[int]) -> int:
    """Where this process's rows begin among those of all."""
    return sum(counts[: rank()])


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
