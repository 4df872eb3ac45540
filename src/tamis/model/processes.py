"""Which process of how many this is, over Accelerate; the same calls work in a script that nobody launched."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

__all__ = ["barrier", "is_main", "local_rank", "rank", "world_size"]


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


def _state() -> PartialState:
    # Several processes without an accelerator speak gloo, but Accelerate starts it only if it is told so; otherwise
    # each of them would take itself for the only one and do all the work.
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")
    return PartialState(cpu=launched and (asked or not _has_accelerator()))


def _has_accelerator() -> bool:
    # torch.accelerator, which knows every kind, came with PyTorch 2.6.
    return bool(getattr(torch, "accelerator", torch.cuda).is_available())
