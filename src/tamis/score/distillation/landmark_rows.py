"""Which of the rows to score become landmarks."""

from __future__ import annotations

import numpy as np

from tamis.collect import Task
from tamis.identity import rows_sha256
from tamis.score.decisions import kept_once
from tamis.score.distillation.candidates import EmbeddingSettings, candidate_embeddings
from tamis.score.distillation.row_embeddings import RowEmbeddings
from tamis.solve.landmarks import LANDMARK_RULES, LandmarkRule, uniform_landmarks
from tamis.types import IntArray

__all__ = ["landmark_rows"]


def landmark_rows(
    task: Task, embeddings: RowEmbeddings, *, count: int, rule: LandmarkRule, settings: EmbeddingSettings
) -> IntArray:
    """Pool rows, ascending; all of ``task.rows`` (and a note) if more are asked for.

    Every rule but "uniform" looks at the embedding that ``settings`` name, of every row at once.
    """
    rows = task.rows
    if count >= len(rows):
        if count > len(rows):
            task.note(f"{count} landmarks were asked for; all {len(rows)} rows to score are landmarks")
        return rows
    if rule == "uniform":
        return rows[uniform_landmarks(len(rows), count, task.seed)]
    spec = {
        "algorithm": "landmarks-v2",
        "rule": rule,
        "landmarks": count,
        "rows": rows_sha256(rows),
        "embedding": settings.identity(task.pool),
        # Draws hang on the last bits of the embeddings, which these two change.
        "dtype": embeddings.dtype,
        "batch_invariant": task.collecting.batch_invariant,
        "seed": task.seed,
    }

    def draw() -> list[int]:
        (embedding,) = candidate_embeddings(settings, task)
        whole = embeddings.of(embedding, task.pool, rows)(0, len(rows))
        return [int(place) for place in LANDMARK_RULES[rule](whole, count, task.seed)]

    path = task.workdir("landmarks", spec, uses_target=False) / "landmarks.json"
    places = kept_once(path, draw, task=task)
    return rows[np.array(places, np.int64)]
