"""Gradient features of pool and target rows, stored or streamed, and every pool row's score against every target row.

``tracin`` and ``less`` share it: they differ in what a feature is, not in how features are kept and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.errors import InvalidInput, NonFinite
from tamis.gradients.per_sample import per_sample_features
from tamis.identity import fingerprint
from tamis.maths.similarity import cosines, inner_products, row_norms, unit_rows
from tamis.projection import AnyProjector
from tamis.score.matrix import empty_scores, fill_columns
from tamis.store.reader import StageReader
from tamis.types import Batch, FloatArray, IntArray

__all__ = [
    "FeatureFunction",
    "FeatureSpec",
    "RowScores",
    "add_scores",
    "collect_features",
    "gradient_features",
    "read_features",
    "rows_with_gradient",
    "scores_of_features",
    "vectors_at_once",
]

FeatureFunction = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
"""Losses (B,), features (B, K) and gradient norms (B,) of a batch; exact norms where they are known."""

_BLOCK_NUMBERS = 1 << 24  # numbers of stored features brought to float32 at once: 64 MB


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What determines stored features, besides the data and the model."""

    name: str  # of the stages: "gradients", "adam-directions"
    identity: Mapping[str, Any]  # projector, layers, and whatever else changes a number
    dtype: Literal["float16", "float32"]
    # For the count of operations: what turns a gradient into a feature, None for its default.
    projection: str
    projection_dim: int | None
    include_head: bool = False

    def operations(self, task: Task) -> Callable[[float, float, float, float], float]:
        """Of projecting the gradients of rows, from (rows, tokens, supervised tokens, squared tokens)."""
        return task.projected_operations(self.projection, self.projection_dim, include_head=self.include_head)


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Scores of pool rows at one checkpoint, and what came with them."""

    values: FloatArray  # (n, M), one column per target row
    loss: FloatArray  # (n,)
    grad_norm: FloatArray  # (n,) of the gradient, or of its projection, an estimate of it
    is_zero: npt.NDArray[np.bool_]  # (n,) pool rows without any gradient: their scores are 0
    is_zero_target: npt.NDArray[np.bool_]  # (M,) target rows without any gradient: so are theirs


def add_scores(total: RowScores | None, scores: RowScores, *, weight: float) -> RowScores:
    """``total + weight * scores``, made in the memory of both: neither is to be used afterwards. None counts as 0.

    Loss and gradient norm are those of the first scores added; a row lacks a gradient if it lacks it in all of them.
    """
    np.multiply(scores.values, np.float32(weight), out=scores.values)
    if total is None:
        return scores
    np.add(total.values, scores.values, out=total.values)
    return replace(
        total,
        is_zero=total.is_zero & scores.is_zero,
        is_zero_target=total.is_zero_target & scores.is_zero_target,
    )


def scores_of_features(
    task: Task,
    *,
    pool: tuple[FeatureSpec, Callable[[], FeatureFunction]],
    target: tuple[FeatureSpec, Callable[[], FeatureFunction]],
    cosine: bool,
    keep_features: bool,
    memory_bytes: int,
) -> RowScores:
    """``<f_i, h_j>``, or their cosine, for every pool row i and target row j; sign of the gradients, no learning rate.

    Args:
        task: which rows, and the model that the features belong to.
        pool: what pool features are, and how to start computing them if some are missing.
        target: the same for the target rows.
        cosine: scale every feature to length 1 first.
        keep_features: store the pool's features, so that other targets and methods reuse them. Otherwise only the
            scores are stored, and the pool is passed through the model once per ``memory_bytes`` of target features.
        memory_bytes: bound on target features held at once.
    """
    target_reader = collect_features(task, task.target, task.target_rows, *target)
    width = target_reader.row_shape("feature")[0]
    columns = vectors_at_once(width, memory_bytes)
    values = empty_scores(task, len(task.target_rows))
    loss = grad_norm = largest = np.zeros(0, dtype=np.float32)
    for start in range(0, len(task.target_rows), columns):
        stop = min(start + columns, len(task.target_rows))
        part = read_features(target_reader, start, stop)
        part = unit_rows(part) if cosine else part
        if keep_features:
            reader = collect_features(task, task.pool, task.rows, *pool)
            _score_stored(reader, part, values[:, start:stop], cosine=cosine)
        else:
            reader = _stream_scores(task, *pool, target_reader, part, (start, stop), cosine=cosine)
            fill_columns(values[:, start:stop], reader, "score")
        loss, grad_norm, largest = reader.read("loss"), reader.read("grad_norm"), reader.read("scale")
    return RowScores(
        values=values,
        loss=loss,
        grad_norm=grad_norm,
        is_zero=largest == 0,
        is_zero_target=target_reader.read("scale") == 0,
    )


def vectors_at_once(numbers: int, memory_bytes: int) -> int:
    """How many float32 vectors are held at once: the pool is passed through the model again for as many more."""
    return max(1, memory_bytes // (4 * numbers))


def rows_with_gradient(task: Task, is_zero: npt.NDArray[np.bool_], is_zero_target: npt.NDArray[np.bool_]) -> IntArray:
    """Positions in ``task.target_rows`` of the rows that have a gradient; the notes say which rows have none.

    Raises:
        InvalidInput: no pool row has a gradient, or no row of a target.
    """
    if is_zero.all():
        raise InvalidInput(
            f"none of the {len(is_zero)} scored pool rows has a gradient: the model predicts their answers with a loss "
            "of 0; give other pool rows, or another model"
        )
    if is_zero.any():
        task.note(
            f"{int(is_zero.sum())} pool rows have a gradient of exactly zero (their loss is already 0) and score 0: "
            f"{_some_ids(task.pool, task.rows[is_zero])}"
        )
    kept = np.flatnonzero(~is_zero_target).astype(np.int64)
    if len(kept) == len(is_zero_target):
        return kept
    for group, name in enumerate(task.target_names):
        if not (task.target_group[kept] == group).any():
            raise InvalidInput(
                f"no row of target '{name}' has a gradient: its losses do not depend on the covered weights, or are 0 "
                "already. Check the weights of the model (tamis doctor), or give other target rows"
            )
    left_out = task.target_rows[is_zero_target]
    task.warn(
        f"{len(left_out)} target rows have a gradient of exactly zero and were left out: "
        f"{_some_ids(task.target, left_out)}."
    )
    return kept


def gradient_features(task: Task, projector: AnyProjector, *, include_head: bool = False) -> FeatureFunction:
    """Projected per-sample gradients of the task's model; the projection's own norms where it knows no exact ones."""
    model, layers = task.loaded.model, task.layers(include_head=include_head)

    def features(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        losses, found, norms = per_sample_features(model, batch, layers, projector)
        return losses, found, row_norms(found) if norms is None else norms

    return features


def collect_features(
    task: Task, corpus: Corpus, rows: IntArray, spec: FeatureSpec, start: Callable[[], FeatureFunction]
) -> StageReader:
    """Store features: float16 entries in units of each row's largest one, or float32.

    Raises:
        NonFinite: a feature is NaN or infinite.
    """

    def begin() -> Callable[[Batch], dict[str, Tensor]]:
        compute = start()

        def batch_columns(batch: Batch) -> dict[str, Tensor]:
            losses, features, norms = _checked(compute, batch, corpus)
            scale = features.abs().amax(dim=1)
            divided = features / torch.where(scale > 0, scale, 1)[:, None]
            stored = divided.to(torch.float16 if spec.dtype == "float16" else torch.float32)
            return {"feature": stored, "scale": scale.float(), "loss": losses.float(), "grad_norm": norms.float()}

        return batch_columns

    identity = {**spec.identity, "dtype": spec.dtype}
    return task.map_rows(
        corpus, rows, name=spec.name, spec=identity, start=begin, extra_operations=spec.operations(task)
    )


def read_features(reader: StageReader, start: int, stop: int) -> Float[Tensor, "m K"]:
    """Rows of a feature stage as they were before storage, in float32; rows without gradient are zero."""
    scale = torch.from_numpy(reader.read("scale")[start:stop])
    _, block = next(iter(reader.blocks("feature", rows=stop - start, start=start, stop=stop)))
    return torch.from_numpy(block).float() * scale[:, None]


def _score_stored(reader: StageReader, target: Tensor, values: FloatArray, *, cosine: bool) -> None:
    scale = reader.read("scale")
    rows = max(1, _BLOCK_NUMBERS // max(target.shape[1], 1))
    for first, block in reader.blocks("feature", rows=rows):
        features = torch.from_numpy(block).float()
        part = slice(first, first + len(block))
        if cosine:
            values[part] = cosines(features, target).numpy()
        else:
            values[part] = inner_products(features, target).numpy() * scale[part, None]


def _stream_scores(
    task: Task,
    spec: FeatureSpec,
    start: Callable[[], FeatureFunction],
    target_reader: StageReader,
    target: Tensor,
    columns: tuple[int, int],
    *,
    cosine: bool,
) -> StageReader:
    """Score rows as they pass, keeping none of their features."""

    def begin() -> Callable[[Batch], dict[str, Tensor]]:
        compute = start()
        on_device: dict[torch.device, Tensor] = {}

        def batch_columns(batch: Batch) -> dict[str, Tensor]:
            losses, features, norms = _checked(compute, batch, task.pool)
            if features.device not in on_device:
                on_device[features.device] = target.to(features.device)
            against = on_device[features.device]
            scores = cosines(features, against) if cosine else inner_products(features, against)
            scale = features.abs().amax(dim=1)
            return {"score": scores.float(), "scale": scale.float(), "loss": losses.float(), "grad_norm": norms.float()}

        return batch_columns

    identity = {
        "algorithm": "feature-scores-v2",
        "features": dict(spec.identity),
        "target_features": fingerprint({"stage": target_reader.spec}),
        "columns": list(columns),
        "cosine": cosine,
    }
    name, operations = f"{spec.name}-scores", spec.operations(task)
    return task.map_rows(task.pool, task.rows, name=name, spec=identity, start=begin, extra_operations=operations)


def _checked(compute: FeatureFunction, batch: Batch, corpus: Corpus) -> tuple[Tensor, Tensor, Tensor]:
    losses, features, norms = compute(batch)
    bad = ~torch.isfinite(features).all(dim=1)
    if bool(bad.any()):
        rows = tuple(batch.rows[bad.to(batch.rows.device)].tolist())
        raise NonFinite(
            f"the gradient of {corpus.name} rows {_some_ids(corpus, np.array(rows))} is NaN or infinite; "
            "load the model with dtype=float32 or bfloat16, or remove the rows",
            rows=rows,
        )
    return losses, features, norms


def _some_ids(corpus: Corpus, rows: IntArray, most: int = 5) -> str:
    shown = ", ".join(corpus.examples.ids[int(row)] for row in rows[:most])
    return f"{shown} and {len(rows) - most} more" if len(rows) > most else shown
