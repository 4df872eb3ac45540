"""A plain AdamW run of our own, recorded as it goes: what offline selection attributes. Resumes at its last state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tamis.errors import InvalidSettings
from tamis.maths.schedule import linear_rate
from tamis.seeds import child_seed, random_permutation
from tamis.trajectory.causal import CausalProblem, RecordedRun
from tamis.trajectory.identity import base_dtype, describe_model, frozen_digest, refuse_dora
from tamis.trajectory.log import LOG_VERSION, LoggedMicro, LoggedStep, LogReader, LogWriter
from tamis.trajectory.optimizer_state import live_optimizer
from tamis.trajectory.replay import play
from tamis.trajectory.run import Step
from tamis.trajectory.token_rows import TokenMicro, TokenRow, collate_rows

__all__ = ["ReferenceSettings", "reference_run"]


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """The run: AdamW without decay, a linear rate after a rise, the norm clipped.

    Raises:
        InvalidSettings: a value is out of range.
    """

    epochs: int = 1
    update_rows: int = 16
    learning_rate: float = 2e-4
    warmup_share: float = 0.03
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("update_rows", self.update_rows >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "a rate above 0"),
            ("warmup_share", 0 <= self.warmup_share < 1, "a share of the updates below 1"),
            ("clip", self.clip >= 0, "a norm of at least 0"),
        ):
            if not allowed:
                raise InvalidSettings(f"{name}={getattr(self, name)}: expected {expected}")

    def rate(self, step: int, total: int) -> float:
        """Of update ``step`` (from 0): up to the peak, then down; never 0."""
        return self.learning_rate * linear_rate(step, total, math.ceil(self.warmup_share * total))


def reference_run(
    model: nn.Module,
    rows: Sequence[TokenRow],
    settings: ReferenceSettings,
    *,
    seed: int,
    folder: Path,
    name: str,
    chat_template: str | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[RecordedRun, list[int]]:
    """Train what ``model`` has trainable on ``rows``, and its record with the number of every row in it.

    ``model``'s own parameters are not changed.

    Raises:
        InvalidInput: the folder cannot be written.
        StoreMismatch: it holds another run.
        Unsupported: an adapter is trained whose gradients are not derivatives.
    """
    described = describe_model(model, name)
    refuse_dora(described["adapter"])
    # Made for its checks and its groups; no step of it is ever taken.
    params = [param for param in model.parameters() if param.requires_grad]
    live = live_optimizer(torch.optim.AdamW(params, weight_decay=0.0), model)
    rule, problem = live.rule(settings.clip or None), CausalProblem(model, live.shapes)
    per_epoch = -(-len(rows) // settings.update_rows)
    total = per_epoch * settings.epochs
    every = max(10, int(total**0.5))
    manifest: dict[str, Any] = {
        "version": LOG_VERSION,
        "model": described,
        "trained": [[name, list(shape)] for name, shape in live.shapes.items()],
        "dtype": str(live.state().theta.dtype).removeprefix("torch."),
        "base_dtype": base_dtype(model),
        "autocast": None,
        "dropout": False,
        "frozen": frozen_digest(model),
        "kind": rule.kind,
        "groups": [vars(group) for group in rule.groups],
        "clip": rule.clip,
        "every": every,
        "planned": total,
        "chat_template": chat_template,
    }
    writer, first, state = _open(folder, manifest, rule.fresh(live.state().theta))
    numbers = [writer.number_of(row) for row in rows] if first == 0 else [writer.known[row.digest()] for row in rows]
    advance(first)
    logged: list[LoggedStep] = []
    for index in range(first, total):
        chosen = _rows_of(index, per_epoch, settings.update_rows, len(rows), seed)
        batch = collate_rows([rows[i] for i in chosen], [numbers[i] for i in chosen], device=problem.device)
        weights = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64, device=problem.device)
        rates = (settings.rate(index, total),) * len(rule.groups)
        step = Step(
            index=index,
            micros=(TokenMicro(batch=batch),),
            rows=np.array([numbers[i] for i in chosen], dtype=np.int64),
            weights=weights,
            rates=rates,
        )
        played = play(problem, rule, state, step)
        state = played.after
        micro = LoggedMicro(
            rows=step.rows,
            weights=tuple(weights.tolist()),
            loss=float(played.losses.double() @ weights),
            width=batch.input_ids.shape[1],
            random_state={},
        )
        norm = float(torch.linalg.vector_norm((played.clip.gradient * played.clip.factor).double()))
        logged.append(LoggedStep(micros=(micro,), rates=rates, norm=norm))
        if (index + 1) % every == 0 or index + 1 == total:
            writer.write_segment(index + 1 - len(logged), logged, state)
            logged = []
        advance(1)
    writer.finish(total)
    return RecordedRun(LogReader(folder), problem), numbers


def _open(folder: Path, manifest: Mapping[str, Any], fresh: Any) -> tuple[LogWriter, int, Any]:
    if not (folder / "manifest.json").is_file():
        return LogWriter.open_new(folder, manifest, fresh), 0, fresh
    last = LogReader(folder).bounds[-1]
    writer = LogWriter.open_again(folder, manifest, last)
    found, device = LogReader(folder).state(last), fresh.theta.device
    moments = tuple(moment.to(device) for moment in found.moments)
    return writer, last, type(found)(theta=found.theta.to(device), moments=moments, count=found.count)


def _rows_of(step: int, per_epoch: int, update_rows: int, count: int, seed: int) -> list[int]:
    """Every epoch is a fresh permutation, cut into updates."""
    epoch, place = divmod(step, per_epoch)
    order = random_permutation(child_seed(seed, "row order", epoch), count)
    found: list[int] = order[place * update_rows : (place + 1) * update_rows].tolist()
    return found
