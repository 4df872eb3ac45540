"""The grid of a comparison as training runs: which rows, how many updates, which seed; and what a run costs.

A run is known by everything that determines it, so that contenders that ask for the same run share it, and a
comparison that is called again with more seeds, methods or budgets repeats nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tamis.budget import parse_budget, rows_for, tokens_for
from tamis.comparison.contenders import Contender, slug
from tamis.corpus import Corpus
from tamis.identity import fingerprint
from tamis.model.flops import ModelShape, TrainedMatrices, training_flops
from tamis.training.loop import TrainSettings, rows_of_step
from tamis.types import IntArray

__all__ = ["Cell", "Price", "Seen", "make_cell", "rows_seen_in", "seen_rows", "updates_at_cost", "updates_for"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A training run to be made, or made already."""

    key: str
    contender: Contender
    budget: str
    seed: int
    steps: int
    rows: IntArray | None  # pool rows; None where the run itself chooses, or trains on nothing
    spec: Mapping[str, Any]


def make_cell(
    contender: Contender,
    *,
    budget: str,
    seed: int,
    steps: int,
    rows: IntArray | None,
    common: Mapping[str, Any],
    **more: Any,
) -> Cell:
    """A run of ``contender``; ``common`` and ``more`` are what else determines it.

    Runs on all rows, and the model as it is, are the same run for every budget and whoever asks for them.
    """
    spec = {
        **common,
        "seed": seed,
        "steps": steps,
        "rows": None if rows is None else hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
        **more,
    }
    name = {"full": f"full-{steps}-updates", "equal-cost": f"full-{steps}-updates", "untouched": "untouched"}.get(
        contender.kind, f"{slug(contender.name)}-{slug(budget)}"
    )
    key = f"{name}-seed-{seed}-{fingerprint(spec)[:10]}"
    return Cell(key=key, contender=contender, budget=budget, seed=seed, steps=steps, rows=rows, spec=spec)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What went through the model in a number of updates."""

    rows: int
    tokens: int
    supervised_tokens: int
    squared_tokens: int


@dataclass(frozen=True, kw_only=True)
class Price:
    """Operations of training, by the count that online runs keep of themselves (``tamis.online.cost``)."""

    shape: ModelShape  # of the model as it is trained, adapters included
    trained: TrainedMatrices

    def tflops(self, seen: Seen) -> float:
        """Teraflops of training on ``seen``."""
        sizes = (seen.tokens, seen.supervised_tokens, seen.squared_tokens)
        return training_flops(self.shape, self.trained, *sizes) / 1e12


def seen_rows(corpus: Corpus, rows: IntArray) -> Seen:
    """Of rows of a corpus, each as often as it is in ``rows``."""
    lengths = corpus.lengths[rows]
    return Seen(
        rows=len(rows),
        tokens=int(lengths.sum()),
        supervised_tokens=int(corpus.supervised[rows].sum()),
        squared_tokens=int((lengths**2).sum()),
    )


def updates_for(budget: str, *, rows: int, tokens: int, epochs: int, update_rows: int) -> int:
    """Updates of every contender at ``budget``: ``epochs`` passes over as many rows as it allows.

    Args:
        budget: rows, a share of the pool or tokens; tokens stand for so many rows of the pool's mean length.
        rows: of the pool.
        tokens: of the pool.
        epochs: passes.
        update_rows: rows of an update.
    """
    parsed = parse_budget(budget)
    if parsed.kind == "tokens":
        allowed = max(1, round(tokens_for(parsed, tokens) * rows / tokens))
    else:
        allowed = rows_for(parsed, rows)
    return epochs * math.ceil(allowed / update_rows)


def updates_at_cost(
    tflops: float, price: Price, corpus: Corpus, rows: IntArray, settings: TrainSettings, *, seed: int
) -> int:
    """Updates on ``rows``, in the order of ``seed``, whose cost is nearest to ``tflops``; at least one."""
    per_epoch = -(-len(rows) // settings.update_rows)
    epoch = price.tflops(seen_rows(corpus, rows))
    whole = int(tflops / epoch) if epoch else 0  # every epoch has the same rows, in another order
    spent, steps = whole * epoch, whole * per_epoch
    while spent < tflops:
        own = price.tflops(seen_rows(corpus, rows_of_step(settings, steps, rows, seed=seed)))
        if spent + own - tflops > tflops - spent:  # one more would be further off
            break
        spent, steps = spent + own, steps + 1
    return max(1, steps)


def rows_seen_in(settings: TrainSettings, rows: IntArray, *, steps: int, seed: int) -> IntArray:
    """The rows of all updates of a run, one after the other."""
    parts = [rows_of_step(settings, step, rows, seed=seed) for step in range(steps)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
