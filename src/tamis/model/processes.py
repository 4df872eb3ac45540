"""Which process of how many this is, over Accelerate; the same calls work in a script that nobody launched."""

from __future__ import annotations

from typing import TypeVar, cast

import torch.distributed as dist
from accelerate import PartialState

__all__ = ["barrier", "gather_objects", "is_main", "local_rank", "rank", "world_size"]

Obj = TypeVar("Obj")


def rank() -> int:
    """0 to ``world_size() - 1``."""
    return int(PartialState().process_index)


def local_rank() -> int:
    """The process's number on its own machine; picks its device."""
    return int(PartialState().local_process_index)


def world_size() -> int:
    """Processes of the run, over all machines."""
    return int(PartialState().num_processes)


def is_main() -> bool:
    """True in exactly one process of the run."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    PartialState().wait_for_everyone()


def gather_objects(mine: Obj) -> list[Obj]:
    """Every process's object, in rank order, in every process. Each process must call it."""
    size = world_size()
    if size == 1:
        return [mine]
    gathered: list[Obj | None] = [None] * size
    dist.all_gather_object(gathered, mine)
    return cast("list[Obj]", gathered)
