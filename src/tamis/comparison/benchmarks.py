"""Tasks of lm-evaluation-harness, answered by a model that a comparison has trained. The package is optional.

The harness is imported when a task is asked for: it brings dozens of packages, and a comparison does without.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tamis.errors import InvalidInput, InvalidSettings, Unsupported, first_line
from tamis.identity import file_sha256
from tamis.model.loss import evaluation_mode
from tamis.values import nearest

__all__ = ["Benchmarks", "open_benchmarks"]

_TASK_FILES = ("*.yaml", "*.py")


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Which tasks, and how they are asked."""

    names: tuple[str, ...]
    folder: Path | None  # of tasks beside the harness's own
    limit: int | None  # questions of each task
    shots: int | None  # examples in front of each question; None: the task's own
    manager: Any = field(repr=False, compare=False)  # the harness's index of tasks, which takes seconds to make

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the figures, beside the model."""
        files = [] if self.folder is None else sorted(f for kind in _TASK_FILES for f in self.folder.rglob(kind))
        return {
            "names": list(self.names),
            "limit": self.limit,
            "shots": self.shots,
            "files": {file.relative_to(self.folder).as_posix(): file_sha256(file) for file in files if self.folder},
            "harness": metadata.version("lm_eval"),
        }

    def scores(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Every metric of every task, as ``"gsm8k exact_match,strict-match"``; a group stands for its tasks.

        Questions are put in the tokenizer's chat template if it has one, as the rows were that the model trained on.

        Raises:
            InvalidInput: a task could not be read, its data set not fetched, or an answer not scored.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            with evaluation_mode(model), _own_random_state():
                found = simple_evaluate(
                    model=HFLM(
                        pretrained=model,
                        tokenizer=tokenizer,
                        batch_size="auto" if next(model.parameters()).device.type == "cuda" else 4,
                    ),
                    tasks=list(self.names),
                    num_fewshot=self.shots,
                    limit=self.limit,
                    apply_chat_template=tokenizer.chat_template is not None,
                    task_manager=self.manager,
                    bootstrap_iters=0,
                    log_samples=False,
                )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            raise InvalidInput(
                f"tasks {', '.join(self.names)}: lm-evaluation-harness stopped ({first_line(error)}); try the same "
                "tasks with its own command on the untouched model"
            ) from error
        assert found is not None, "a model that is passed in is evaluated by every process for itself"
        return _metrics(found)


def open_benchmarks(
    names: Sequence[str], *, folder: str | None, limit: int | None, shots: int | None
) -> Benchmarks | None:
    """The tasks ``names``, checked before anything is trained; None without any.

    Raises:
        Unsupported: lm-evaluation-harness is not installed.
        InvalidInput: the folder is not there.
        InvalidSettings: there is no task of that name.
    """
    if not names:
        return None
    if find_spec("lm_eval") is None:
        raise Unsupported("tasks need lm-evaluation-harness, which is not installed: pip install 'tamis[eval]'")
    place = None if folder is None else Path(folder)
    if place is not None and not place.is_dir():
        raise InvalidInput(f"task_folder={folder}: expected a folder of task files (YAML)")
    from lm_eval.tasks import TaskManager

    manager = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folder)  # reads every file of the harness's own tasks
    for name in names:
        if not manager.match_tasks([name]):
            raise InvalidSettings(
                f"tasks: lm-evaluation-harness knows no task {name!r}{nearest(name, manager.all_tasks)}; "
                "`lm-eval ls tasks` lists all"
            )
    return Benchmarks(names=tuple(names), folder=place, limit=limit, shots=shots, manager=manager)


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Of the tasks at the top: those of a group are in the group's own figures."""
    inside = {name for below in found.get("group_subtasks", {}).values() for name in below}
    return {
        f"{task} {metric}": float(value)
        for task, values in found["results"].items()
        if task not in inside
        for metric, value in values.items()
        if isinstance(value, (int, float)) and "," in metric and "_stderr," not in metric
    }


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The harness seeds the global generators; whatever runs afterwards must not depend on it."""
    python, numpy_state = random.getstate(), np.random.get_state()  # what is saved is the global state
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
