"""What a run makes once and its later work hangs on: kept in the store, the same in every process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tamis.collect import Task
from tamis.disk import replace_atomically
from tamis.errors import StoreCorrupted, first_line
from tamis.model.processes import barrier, counts_of_all, is_main

__all__ = ["gradient_size", "kept_once", "kept_tensors"]


def kept_once(path: Path, decide: Callable[[], Any], *, task: Task | None = None) -> Any:
    """What ``decide`` gives, through JSON: decided now by all processes, or read from where an earlier run wrote it.

    What the main process decided counts everywhere: machines may round differently, and work must be shared out alike.

    Args:
        path: of the decision.
        decide: decides.
        task: whose stages ``decide`` computes; their cost is part of the run that only reads the decision, too.
    """
    stages = path.with_suffix(".stages.json")
    # All processes or none: deciding may have barriers.
    if not all(counts_of_all(int(path.exists()))):
        earlier = set() if task is None else set(task.stages)
        decided = decide()
        if is_main():
            if task is not None:
                used = [os.path.relpath(stage, task.store) for stage in task.stages if stage not in earlier]
                replace_atomically(stages, (json.dumps(used, indent=1).encode(),))
            replace_atomically(path, (json.dumps(decided, indent=1).encode(),))
    barrier()
    if task is not None and stages.exists():
        found = [task.store / name for name in _read(stages)]
        task.stages += [stage for stage in found if stage not in task.stages]
    return _read(path)


def kept_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file in the store.

    Raises:
        StoreCorrupted: it cannot be read.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} cannot be read ({first_line(error)}); delete this file and run again to recompute it"
    )


def gradient_size(task: Task, *, include_head: bool = False) -> int:
    """Numbers of one row's gradient, without loading the model again for it: work is shared out by it."""
    spec = {"algorithm": "gradient-size-v1", "include_head": include_head}
    path = task.workdir("gradient-size", spec, uses_target=False) / "size.json"
    found: int = kept_once(path, lambda: sum(layer.numel for layer in task.layers(include_head=include_head)))
    return found
