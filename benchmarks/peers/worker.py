"""What every tool's runner shares: the rows, the clock, the loss, and the loop that answers the benchmark's requests.

A runner is a process of its own, in the tool's own environment. It loads its model once and then answers one line of
JSON per request: ``{"pool": n, "target": m}`` scores the first ``n`` pool rows against the first ``m`` target rows.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of a token that carries no loss


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token ids and labels, unpadded; a label is the token itself or ``IGNORED``."""

    input_ids: list[list[int]]
    labels: list[list[int]]

    def first(self, count: int) -> Rows:
        return Rows(input_ids=self.input_ids[:count], labels=self.labels[:count])

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Clock:
    """Wall and processor seconds between marks: "target" ends the target side, "pool" ends the pool side."""

    seconds: dict[str, float] = field(default_factory=dict)
    _wall: float = 0.0
    _cpu: float = 0.0

    def start(self) -> None:
        self.seconds = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def mark(self, name: str) -> None:
        """Book the time since the last mark under ``name``; a name that is booked already keeps what it has."""
        if f"{name}_s" in self.seconds:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds[f"{name}_s"], self.seconds[f"{name}_cpu_s"] = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu


Run = Callable[[Rows, Rows, Path, Clock], list[float]]
"""Scores of the pool rows, from pool rows, target rows, an empty folder and the clock to mark."""


def inputs() -> tuple[str, dict[str, Any]]:
    """The variant to run and what the benchmark wrote for it: ``runner.py VARIANT FILE ANSWERS``, a descriptor."""
    given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return sys.argv[1], given


def serve(start: Callable[[], Run], given: dict[str, Any], packages: tuple[str, ...]) -> None:
    """Load, say so, then answer requests until there are no more. An exception is an answer, too."""
    answers = os.fdopen(int(sys.argv[3]), "w", encoding="utf-8")  # not stdout: libraries print there

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        run = start()
    except Exception as error:
        answer({"error": described(error)})
        return
    answer({"versions": {name: metadata.version(name) for name in packages}})
    pool, target = (Rows(**given[side]) for side in ("pool", "target"))
    for line in sys.stdin:
        request = json.loads(line)
        clock = Clock()
        try:
            with tempfile.TemporaryDirectory() as folder:
                scores = run(pool.first(request["pool"]), target.first(request["target"]), Path(folder), clock)
        except Exception as error:
            answer({"error": described(error)})
            return
        answer({"scores": scores, "peak_mb": peak_mb(), **clock.seconds})


def by_length(rows: Rows) -> list[int]:
    """Positions, longest first: tools with a fixed number of rows per batch pad least that way."""
    return sorted(range(len(rows)), key=lambda i: -len(rows.input_ids[i]))


def in_pool_order(scores: list[float], order: list[int]) -> list[float]:
    found = [0.0] * len(order)
    for position, score in zip(order, scores, strict=True):
        found[position] = score
    return found


def examples(rows: Rows, order: list[int]) -> list[dict[str, list[int]]]:
    return [{"input_ids": rows.input_ids[i], "labels": rows.labels[i]} for i in order]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right-padded to the longest of the batch."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}


def summed_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum over rows of the mean cross-entropy of each row's labels, for tools that leave the loss to their user."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    tokens = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return (tokens.sum(1) / (labels != IGNORED).sum(1)).sum()


def described(error: Exception) -> str:
    traceback.print_exc()
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}, line {last.lineno})"


def peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the benchmark held when it started this process
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
