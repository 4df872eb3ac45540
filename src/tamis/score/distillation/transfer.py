"""From the landmarks' exact scores to scores of every row: kernel ridge, streamed, a stage like any other.

The coefficients of all rows, rows × landmarks numbers, never exist: a chunk's kernel does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tamis.collect import Task
from tamis.embeddings import Given, ModelEmbedding, TfIdf
from tamis.identity import fingerprint, rows_sha256
from tamis.score.distillation.choice import Choice
from tamis.score.distillation.landmark_gradients import LandmarkGradients
from tamis.score.distillation.row_embeddings import RowBlock, RowEmbeddings, work_of
from tamis.score.matrix import empty_scores, fill_columns
from tamis.solve.kernel_ridge import KernelRidge, fit_kernel_ridge
from tamis.solve.leave_one_out import candidate_basis
from tamis.stages import finish, own_shards, record_cost
from tamis.store.reader import StageReader
from tamis.store.writer import StageWriter
from tamis.types import Batch, FloatArray, IntArray

__all__ = ["transfer_coefficients", "transferred_scores"]

# Rows fitted at a time: a constant, since another size could round another way.
_SHARD_ROWS = 2048


def transferred_scores(
    task: Task,
    embeddings: RowEmbeddings,
    choice: Choice,
    gradients: LandmarkGradients,
    scores: Float[Tensor, "L J"],
    groups: Sequence[Tensor],
    *,
    offset: Mapping[str, Any] | None,
    keep_embeddings: bool,
) -> FloatArray:
    """Fitted scores of ``task.rows``, ``(n, J)``, computed as far as they are not in the store.

    Args:
        task: at the model of the embeddings; its rows are to be scored.
        embeddings: of its rows.
        choice: embedding and kernel.
        gradients: of the landmarks.
        scores: the landmarks' exact scores, one column per target row or per target.
        groups: the target rows behind each column, as columns of ``gradients.scores``.
        offset: what, beside the gradients, decides the exact scores; None if nothing does.
        keep_embeddings: store a model's embeddings of the pool; otherwise rows are scored as they pass.
    """
    spec = {
        "algorithm": "landmark-transfer-v1",
        **gradients.identity,
        "columns": [group.tolist() for group in groups],
        "choice": fingerprint(choice.to_plain()),
        "embedding": embeddings.identity(choice.embedding),
        **({} if offset is None else {"offset": dict(offset)}),
    }
    # Here and not where they are read: only processes with a shard to do come there, but all must compute these.
    landmarks = embeddings.of(choice.embedding, task.pool, gradients.rows)
    columns = task.target_rows[gradients.columns]
    target = embeddings.of(choice.embedding, task.target, columns) if choice.residual else None

    def fit() -> KernelRidge:
        rows = landmarks(0, len(gradients.rows))
        basis = candidate_basis(choice.candidate, rows)
        directions = None
        if target is not None:
            mapped = basis.transform.apply(target(0, len(columns)))
            directions = torch.stack([mapped[group].mean(0) for group in groups])
        return fit_kernel_ridge(basis, scores, directions=directions)

    if isinstance(choice.embedding, (TfIdf, Given)) or keep_embeddings:
        reader = _scored_from(task, embeddings.of(choice.embedding, task.pool, task.rows), fit, spec)
    else:
        reader = _scored_as_they_pass(task, embeddings, choice.embedding, fit, spec)
    values = empty_scores(task, len(groups))
    fill_columns(values, reader, "score")
    return values


def transfer_coefficients(
    task: Task,
    embeddings: RowEmbeddings,
    choice: Choice,
    rows: IntArray,
    *,
    keep_embeddings: bool,
) -> FloatArray:
    """``C = k(E, E_L) (k(E_L, E_L) + δI)^{-1}`` of ``task.rows`` for landmarks ``rows``, ``(n, L)``.

    A row stands for the mixture ``C_i G_L`` of the landmarks' gradients; a landmark is itself. Scores never need C; the
    second-order term does.
    """
    spec = {
        "algorithm": "landmark-coefficients-v1",
        "landmarks": rows_sha256(rows),
        "choice": fingerprint(choice.to_plain()),
        "embedding": embeddings.identity(choice.embedding),
    }
    landmarks = embeddings.of(choice.embedding, task.pool, rows)

    def fit() -> KernelRidge:
        own = landmarks(0, len(rows))
        basis = candidate_basis(choice.candidate, own)
        return fit_kernel_ridge(basis, torch.eye(len(rows)))

    name = "landmark-coefficients"
    if isinstance(choice.embedding, (TfIdf, Given)) or keep_embeddings:
        reader = _scored_from(task, embeddings.of(choice.embedding, task.pool, task.rows), fit, spec, name=name)
    else:
        reader = _scored_as_they_pass(task, embeddings, choice.embedding, fit, spec, name=name)
    values = empty_scores(task, len(rows))
    fill_columns(values, reader, "score")
    places = np.searchsorted(task.rows, rows)
    values[places] = np.eye(len(rows), dtype=np.float32)
    return values


def _scored_as_they_pass(
    task: Task,
    embeddings: RowEmbeddings,
    embedding: ModelEmbedding,
    fit: Callable[[], KernelRidge],
    spec: Mapping[str, Any],
    *,
    name: str = "landmark-scores",
) -> StageReader:
    def start() -> Callable[[Batch], Mapping[str, Tensor]]:
        embed, fitted = embeddings.passing(embedding), fit()
        return lambda batch: {"score": fitted.predict(embed(batch)["embedding"].cpu()).float()}

    return task.map_rows(
        task.pool,
        task.rows,
        name=name,
        spec=spec,
        start=start,
        work=work_of(embedding),
        operations=embeddings.operations(embedding),
    )


def _scored_from(
    task: Task,
    rows: RowBlock,
    fit: Callable[[], KernelRidge],
    spec: Mapping[str, Any],
    *,
    name: str = "landmark-scores",
) -> StageReader:
    full = {
        **spec,
        "stage": name,
        "tokens": task.pool.identity,
        "rows": rows_sha256(task.rows),
        "model": task.model_identity(),
        "batch_invariant": task.collecting.batch_invariant,  # which the embeddings that are read were made with
    }
    writer = StageWriter(task.store, f"{name}-{task.pool.name}", full, num_rows=len(task.rows), shard_rows=_SHARD_ROWS)
    task.stages.append(writer.path)
    fitted: KernelRidge | None = None
    with task.progress.stage(f"{name.replace('-', ' ')} ({task.pool.name})", len(task.rows), "rows") as advance:
        for shard in own_shards(writer, advance):
            started = time.perf_counter()
            fitted = fit() if fitted is None else fitted
            first, stop = writer.shard_range(shard)
            score = fitted.predict(rows(first, stop)).float()
            record_cost(writer.path, shard, time.perf_counter() - started, work="none", rows=stop - first)
            writer.write_shard(shard, {"score": score})
            advance(stop - first)
    finish(writer)
    return StageReader(writer.path)
