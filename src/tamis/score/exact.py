"""Exact inner products of pool and target gradients, unprojected: the target's are formed, the pool's never are.

Whole gradients of a model are large, so target rows become directions a few at a time, one pass over the pool for each
lot; the mean of a target is a single direction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tamis.collect import Task
from tamis.data.batches import collate, plan_batches
from tamis.gradients.per_sample import Alignments, MaterialisedGradients, mean_gradient, run_batch
from tamis.score.decisions import gradient_size
from tamis.score.features import RowScores, vectors_at_once
from tamis.score.matrix import empty_scores, fill_columns
from tamis.store.reader import StageReader
from tamis.types import Batch, FloatArray, IntArray, LayerSpec

__all__ = ["Precondition", "direction_passes", "exact_scores"]

_TARGET_BATCH_TOKENS = 2048


class Precondition(Protocol):
    """A symmetric matrix that acts layer by layer; target gradients are multiplied by it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines it, besides pool and model."""
        ...

    def prepare(self) -> None:
        """By all processes together, before any of them starts."""
        ...

    def start(self) -> Callable[[str, Tensor], Tensor]:
        """From a layer's name and gradients ``(J, O, I)`` to their products."""
        ...


def exact_scores(
    task: Task,
    *,
    cosine: bool,
    include_head: bool,
    mean: bool,
    memory_bytes: int,
    precondition: Precondition | None = None,
) -> RowScores:
    """``<grad l_i, d_j>``, or with ``cosine`` ``<grad l_i, d_j> / |grad l_i|``, for every pool row i and direction j.

    With ``mean`` there is one direction per target: the mean of its rows' gradients, or of their gradients scaled to
    length 1 (``cosine``), so that the score is the mean over target rows of what they would score alone. Otherwise
    every target row is a direction. Directions held at once stay within ``memory_bytes``, one at least; every such lot
    is one pass over the pool. With ``precondition`` a target row's direction is its product with that matrix.
    """
    if precondition is not None:
        precondition.prepare()
    target_norm = _target_norms(task, include_head=include_head)
    if mean:
        groups = [task.target_rows[task.target_group == g] for g in range(len(task.target_names))]
    else:
        groups = [task.target_rows[j : j + 1] for j in range(len(task.target_rows))]
    per_pass = len(groups)
    if len(groups) > 1:
        per_pass = vectors_at_once(gradient_size(task, include_head=include_head), memory_bytes)
    values = empty_scores(task, len(groups))
    norm = loss = np.zeros(0, dtype=np.float32)
    for first in range(0, len(groups), per_pass):
        part = groups[first : first + per_pass]
        reader = _alignments(task, part, cosine=cosine, include_head=include_head, precondition=precondition)
        fill_columns(values[:, first : first + len(part)], reader, "score")
        norm, loss = reader.read("grad_norm"), reader.read("loss")
    return RowScores(values=values, loss=loss, grad_norm=norm, is_zero=norm == 0, is_zero_target=target_norm == 0)


def direction_passes(rows: int, *, unit: bool, preconditioned: bool) -> int:
    """How often each of a group's target rows is passed through the model for their direction.

    The length of a row's gradient is known only when it is whole, so a mean of unit gradients takes two passes, except
    where each row's gradient is formed alone.
    """
    return 2 if unit and rows > 1 and not preconditioned else 1


def _target_norms(task: Task, *, include_head: bool) -> FloatArray:
    def start() -> Callable[[Batch], Mapping[str, Tensor]]:
        model, layers = task.loaded.model, task.layers(include_head=include_head)

        def norms(batch: Batch) -> dict[str, Tensor]:
            lengths = Alignments(None)
            losses = run_batch(model, batch, layers, lengths)
            return {"loss": losses.float(), "grad_norm": lengths.norm.float()}

        return norms

    spec = {"algorithm": "gradient-norms-v1", "include_head": include_head}
    reader = task.map_rows(task.target, task.target_rows, name="gradient-norms", spec=spec, start=start)
    found: FloatArray = reader.read("grad_norm")
    return found


def _alignments(
    task: Task, groups: list[IntArray], *, cosine: bool, include_head: bool, precondition: Precondition | None
) -> StageReader:
    def start() -> Callable[[Batch], Mapping[str, Tensor]]:
        model, layers = task.loaded.model, task.layers(include_head=include_head)
        apply = None if precondition is None else precondition.start()
        directions = _directions(task, groups, layers, unit=cosine, apply=apply)

        def align(batch: Batch) -> dict[str, Tensor]:
            found = Alignments(directions)
            losses = run_batch(model, batch, layers, found)
            dot, norm = found.dot, found.norm
            if cosine:
                dot = torch.where(norm > 0, 1 / norm, 0)[:, None] * dot
            return {"score": dot.float(), "grad_norm": norm.float(), "loss": losses.float()}

        return align

    digest = hashlib.sha256(b"|".join(np.asarray(rows, dtype="<i8").tobytes() for rows in groups)).hexdigest()
    spec: dict[str, Any] = {
        "algorithm": "exact-alignments-v1",
        "include_head": include_head,
        "cosine": cosine,
        "target": task.target.identity,
        "target_rows": digest,
        **({} if precondition is None else {"precondition": precondition.identity}),
    }
    often = [direction_passes(len(rows), unit=cosine, preconditioned=precondition is not None) for rows in groups]
    passed = np.concatenate([np.repeat(rows, times) for rows, times in zip(groups, often, strict=True)])
    before = (task.target, passed)
    return task.map_rows(task.pool, task.rows, name="exact-alignments", spec=spec, start=start, before=before)


def _directions(
    task: Task,
    groups: list[IntArray],
    layers: tuple[LayerSpec, ...],
    *,
    unit: bool,
    apply: Callable[[str, Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """``{layer name: (J, O, I)}``: the mean gradient of each group of target rows, of unit gradients if asked for.

    With ``apply`` every gradient is multiplied by a matrix before it is scaled to length 1.
    """
    stacked: dict[str, Tensor] = {}
    for j, rows in enumerate(groups):
        if apply is None:
            mean = _mean(task, rows, layers, unit=unit)
        else:
            mean = _preconditioned_mean(task, rows, layers, apply, unit=unit)
        for layer in layers:
            matrix = mean[layer.name]
            if j == 0:
                stacked[layer.name] = matrix.new_empty(len(groups), *layer.shape)
            stacked[layer.name][j] = matrix
    return stacked


def _preconditioned_mean(
    task: Task,
    rows: IntArray,
    layers: tuple[LayerSpec, ...],
    apply: Callable[[str, Tensor], Tensor],
    *,
    unit: bool,
) -> dict[str, Tensor]:
    if not unit:  # a mean of products is the product of the mean
        return {name: apply(name, grad[None])[0] for name, grad in _mean(task, rows, layers, unit=False).items()}
    total: dict[str, Tensor] = {}
    for row in rows:
        single = _mean(task, np.array([row], np.int64), layers, unit=False)
        product = {name: apply(name, grad[None])[0] for name, grad in single.items()}
        norm = torch.stack([part.double().square().sum().cpu() for part in product.values()]).sum().sqrt()
        share = float(1 / (norm * len(rows))) if float(norm) > 0 else 0.0
        for name, part in product.items():
            total[name] = total[name].add_(part, alpha=share) if name in total else part * share
    return total


def _mean(task: Task, rows: IntArray, layers: tuple[LayerSpec, ...], *, unit: bool) -> dict[str, Tensor]:
    model = task.loaded.model
    if len(rows) > 1:
        return mean_gradient(model, _batches(task, rows), layers, unit=unit)
    # A single row's norm is known as soon as its gradient is: one pass, not two.
    whole = MaterialisedGradients(layers)
    for batch in _batches(task, rows):
        run_batch(model, batch, layers, whole)
    vector = whole.grads[0]
    norm = torch.linalg.vector_norm(vector)
    if unit and bool(norm > 0):
        vector = vector / norm
    parts = torch.split(vector, [layer.numel for layer in layers])
    return {layer.name: part.view(layer.shape) for layer, part in zip(layers, parts, strict=True)}


def _batches(task: Task, rows: IntArray) -> Iterator[Batch]:
    """Target rows in batches of similar length, on the model's device."""
    for group in plan_batches(task.target.lengths[rows], batch_tokens=_TARGET_BATCH_TOKENS, max_rows=None):
        yield collate(rows[group], task.target.take(rows[group]), 0).to(task.loaded.device)
