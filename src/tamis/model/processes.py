"""Which process of how many this is, over Accelerate; the same calls work in a script that nobody launched."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

__all__ = ["barrier", "collective_device", "counts_of_all", "is_main", "local_rank", "rank", "world_size"]

# Of a wait for others. Their shares of a long stage may differ by more than the minutes that backends allow, and what
# the main process does alone may take hours. No failure needs one: launchers end the processes beside one that fails.
_TIME_OUT = timedelta(days=7)


def rank() -> int:
    """0 to ``world_size() - 1``."""
    return int(_state().process_index)


def local_rank() -> int:
    """The process's number on its own machine; picks its device."""
    return int(_state().local_process_index)


def world_size() -> int:
    """Processes of the run, over all machines."""
    return int(_state().num_processes)


def is_main() -> bool:
    """True in exactly one process of the run."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    _state().wait_for_everyone()


def counts_of_all(mine: int) -> list[int]:
    """A number of every process, in the order of processes. Each process must call it."""
    if world_size() == 1:
        return [mine]
    there = torch.tensor([mine], dtype=torch.int64, device=collective_device())
    parts = [torch.empty_like(there) for _ in range(world_size())]
    dist.all_gather(parts, there)
    return [int(part) for part in parts]


def collective_device() -> torch.device:
    """Where a tensor must lie for the backend of a launched run to see it."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _state() -> PartialState:
    # Several processes without an accelerator speak gloo, but Accelerate starts it only if it is told so; otherwise
    # each of them would take itself for the only one and do all the work.
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")
    return PartialState(cpu=launched and (asked or not _has_accelerator()), timeout=_TIME_OUT)


def _has_accelerator() -> bool:
    # torch.accelerator, which knows every kind, came with PyTorch 2.6.
    return bool(getattr(torch, "accelerator", torch.cuda).is_available())
