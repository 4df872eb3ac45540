"""Decisions of a run that its later work hangs on: taken once, kept in the store, the same in every process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tamis.collect import Task
from tamis.disk import replace_atomically
from tamis.model.processes import barrier, counts_of_all, is_main

__all__ = ["gradient_size", "kept_once"]


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
        found = [task.store / name for name in json.loads(stages.read_text(encoding="utf-8"))]
        task.stages += [stage for stage in found if stage not in task.stages]
    return json.loads(path.read_text(encoding="utf-8"))


def gradient_size(task: Task, *, include_head: bool = False) -> int:
    """Numbers of one row's gradient, without loading the model again for it: work is shared out by it."""
    spec = {"algorithm": "gradient-size-v1", "include_head": include_head}
    path = task.workdir("gradient-size", spec, uses_target=False) / "size.json"
    found: int = kept_once(path, lambda: sum(layer.numel for layer in task.layers(include_head=include_head)))
    return found
