"""Training of a proxy's factors until the model answers like its target, or its gradients point like its target's.

Every so many steps the ranking of rows kept for that is compared with the target's; the best state is what remains.
All of it lies on disk: a killed alignment goes on from the last measurement and ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tamis.disk import make_folder, replace_atomically
from tamis.errors import NonFinite, first_line
from tamis.gradients.hooks import frozen
from tamis.maths.schedule import linear_rate
from tamis.model.loss import supervised_logits, supervised_positions
from tamis.model.low_rank_linear import low_rank_layers
from tamis.model.targets import embedding_matrix
from tamis.proxies.objectives import (
    factor_params,
    gradient_distance,
    mean_loss,
    output_divergence,
    target_gradients,
)
from tamis.proxies.rows import Row, batches_of
from tamis.seeds import child_seed, random_permutation

__all__ = ["AlignSettings", "Aligned", "CurvePoint", "align", "learning_rate_at"]

logger = logging.getLogger(__name__)

_WARMUP_STEPS, _WEIGHT_DECAY, _CLIP = 10, 0.01, 1.0


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """How factors are trained; every choice made."""

    objective: Literal["kl", "align", "align+kl"]
    steps: int
    update_rows: int
    learning_rate: float
    kl_weight: float
    temperature: float
    measure_steps: int
    patience: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One measurement on the way; the parts of the objective are means since the one before."""

    step: int
    retention: float  # Spearman's correlation with the target's scores, on validation rows
    divergence: float | None = None  # KL
    distance: float | None = None  # of gradients
    seconds: float = 0.0  # of training so far


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """What alignment came to; the proxy holds the best state."""

    steps: int  # that were done
    best_step: int
    curve: tuple[CurvePoint, ...]
    seconds: float
    tokens: int  # of the steps done


def align(
    proxy: nn.Module,
    model: nn.Module,
    rows: Sequence[Row],
    *,
    settings: AlignSettings,
    retention: Callable[[nn.Module], float],
    batch_tokens: int,
    pad_id: int,
    folder: Path,
    advance: Callable[[int], None],
) -> Aligned:
    """Train ``proxy`` in place towards ``model``, dropout off, and leave it at its best measurement.

    AdamW with weight decay .01, ten steps of warm-up, linear decay, gradients clipped to length 1. Batches are drawn
    without replacement, epoch after epoch, by the seed alone.

    Args:
        proxy: with factored layers; only those change.
        model: the target.
        rows: to train on.
        settings: how.
        retention: how well a proxy ranks the rows that are kept for that; higher is better.
        batch_tokens: padded tokens of one forward pass.
        pad_id: of the model.
        folder: for the states.
        advance: told of every step.

    Raises:
        NonFinite: the objective is NaN or infinite; try a lower learning rate.
    """
    make_folder(folder)
    params = factor_params(proxy)
    for param in params.values():  # factors are trained in float32 at least, whatever the model runs in
        param.data = param.data if param.dtype == torch.float64 else param.data.float()
    optimizer = torch.optim.AdamW(params.values(), lr=settings.learning_rate, weight_decay=_WEIGHT_DECAY)
    state = _State(folder, params, optimizer)
    if not state.resume():
        state.note(CurvePoint(step=0, retention=retention(proxy)))
        state.save()
    advance(state.step)
    while state.step < settings.steps and not state.has_stalled(settings.patience):
        started = time.perf_counter()
        stop = min(settings.steps, state.step + settings.measure_steps)
        divergences, distances = [], []
        while state.step < stop:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(state.step, settings)
            chosen = _rows_of_step(rows, state.step, settings)
            optimizer.zero_grad(set_to_none=True)
            parts = _step(proxy, model, chosen, settings, batch_tokens, pad_id)
            if not all(np.isfinite([part for part in parts if part is not None])):
                raise NonFinite(_diverged(state.step + 1, "its objective is not finite"))
            torch.nn.utils.clip_grad_norm_(list(params.values()), _CLIP)
            optimizer.step()
            divergences.append(parts[0])
            distances.append(parts[1])
            state.step += 1
            state.tokens += sum(len(row.tokens.input_ids) for row in chosen)
            advance(1)
        state.seconds += time.perf_counter() - started
        try:
            kept = retention(proxy)
        except NonFinite as error:  # the last update before a measurement has no objective after it
            raise NonFinite(_diverged(state.step, "the proxy's losses are not finite")) from error
        state.note(
            CurvePoint(
                step=state.step,
                retention=kept,
                divergence=_mean(divergences),
                distance=_mean(distances),
                seconds=round(state.seconds, 3),
            )
        )
        state.save()
    state.take_best()
    advance(settings.steps - state.step)
    return Aligned(
        steps=state.step,
        best_step=state.best.step,
        curve=tuple(state.curve),
        seconds=state.seconds,
        tokens=state.tokens,
    )


def _diverged(step: int, how: str) -> str:
    return f"alignment diverged at step {step}: {how}; lower --learning-rate"


def learning_rate_at(step: int, settings: AlignSettings) -> float:
    """Of update ``step`` (from 0): up over ten steps, then down in a line to zero after the last."""
    return settings.learning_rate * linear_rate(step, settings.steps, min(_WARMUP_STEPS, settings.steps))


def _step(
    proxy: nn.Module, model: nn.Module, rows: Sequence[Row], settings: AlignSettings, batch_tokens: int, pad_id: int
) -> tuple[float | None, float | None]:
    """Gradients of the objective into the factors; its two parts."""
    device = embedding_matrix(model).device
    matches = settings.objective != "kl"
    # The gradient of a batch is matched as a whole; outputs can be matched in parts of it.
    batches = batches_of(rows, batch_tokens=batch_tokens if not matches else 1 << 62, pad_id=pad_id)
    params = list(factor_params(proxy).values())
    divergence = distance = None
    for batch in batches:
        batch = batch.to(device)
        positions = supervised_positions(batch)
        share = len(batch.rows) / len(rows)
        # The fused attention kernels cannot be differentiated twice; the plain one can, and every model may use it.
        kernel: Any = sdpa_kernel(SDPBackend.MATH) if matches else contextlib.nullcontext()
        of_target = target_gradients(model, batch, low_rank_layers(proxy)) if matches else {}
        with kernel, frozen(proxy):
            for param in params:
                param.requires_grad_(True)
            logits = supervised_logits(proxy, batch, positions)
            objective = logits.new_zeros(())
            if settings.objective != "align":
                with torch.no_grad():
                    theirs = supervised_logits(model, batch, positions)
                part = output_divergence(theirs, logits, positions, temperature=settings.temperature)
                divergence = (divergence or 0.0) + share * float(part.detach())
                objective = objective + (settings.kl_weight if matches else 1.0) * part
            if matches:
                part = gradient_distance(proxy, mean_loss(logits, positions), of_target)
                distance = (distance or 0.0) + share * float(part.detach())
                objective = objective + part
            torch.autograd.backward(share * objective, inputs=params)
    return divergence, distance


def _rows_of_step(rows: Sequence[Row], step: int, settings: AlignSettings) -> list[Row]:
    first = step * settings.update_rows
    chosen = []
    for number in range(first, first + settings.update_rows):
        epoch, place = divmod(number, len(rows))
        order = random_permutation(child_seed(settings.seed, "alignment rows", epoch), len(rows))
        chosen.append(rows[int(order[place])])
    return chosen


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


class _State:
    """Factors, optimizer and curve, on disk as one file that is whole or the one before."""

    def __init__(self, folder: Path, params: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
        self._path, self._params, self._optimizer = folder / "state.safetensors", params, optimizer
        self._best: dict[str, Tensor] = {}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[CurvePoint] = []

    @property
    def best(self) -> CurvePoint:
        """The first of the best measurements."""
        return max(self.curve, key=lambda point: point.retention)

    def note(self, point: CurvePoint) -> None:
        """A measurement of the factors as they are."""
        self.curve.append(point)
        if self.best is point:
            self._best = {name: param.detach().clone() for name, param in self._params.items()}

    def has_stalled(self, patience: int) -> bool:
        """So many measurements since the best one."""
        return len(self.curve) - 1 - self.curve.index(self.best) >= patience

    def take_best(self) -> None:
        """Put the factors of the best measurement in place."""
        with torch.no_grad():
            for name, param in self._params.items():
                param.copy_(self._best[name])

    def save(self) -> None:
        """All that the rest of the training depends on."""
        tensors = {f"now/{name}": param.detach() for name, param in self._params.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self._best.items()}
        for name, param in self._params.items():
            for key, value in self._optimizer.state.get(param, {}).items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value)
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "curve": [vars(point) for point in self.curve],
        }
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        replace_atomically(self._path, (save(stored, metadata={"record": json.dumps(record)}),))

    def resume(self) -> bool:
        """Take up what is on disk; False if nothing is, or if it is damaged, which is said."""
        if not self._path.exists():
            return False
        try:
            opened = safe_open(self._path, framework="pt")
        except SafetensorError as error:
            logger.warning("%s is damaged (%s); that alignment begins again", self._path, first_line(error))
            return False
        with opened as file:
            record = json.loads(file.metadata()["record"])
            names = set(file.keys())
            with torch.no_grad():
                for name, param in self._params.items():
                    param.copy_(file.get_tensor(f"now/{name}"))
                    self._best[name] = file.get_tensor(f"best/{name}").to(param)
                    moments = {key: f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
                    if moments["step"] in names:
                        found = {key: file.get_tensor(where) for key, where in moments.items()}
                        # AdamW counts its steps on the CPU.
                        self._optimizer.state[param] = {k: v if k == "step" else v.to(param) for k, v in found.items()}
        self.step, self.tokens, self.seconds = record["step"], record["tokens"], record["seconds"]
        self.curve = [replace(CurvePoint(step=0, retention=0), **point) for point in record["curve"]]
        return True
