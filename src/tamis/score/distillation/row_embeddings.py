"""Embeddings of any rows of a run: a model's are stored, those of text or of a folder are made as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.embeddings import Given, ModelEmbedding, RowFunction, TextEmbedder, TfIdf
from tamis.model.flops import ModelShape
from tamis.seeds import child_seed, random_subset
from tamis.stages import Work
from tamis.types import Batch, IntArray

__all__ = ["AnyEmbedding", "RowBlock", "RowEmbeddings", "identity_of", "is_model_embedding", "work_of"]

AnyEmbedding = ModelEmbedding | TfIdf | Given
"""An object of a class in ``tamis.embeddings.EMBEDDINGS``."""

RowBlock = Callable[[int, int], Float[Tensor, "n E"]]
"""From first and last position (exclusive) in a list of rows to their embeddings in float32, rows of length 1."""

_RARITY_ROWS = 200_000  # rows from which it is counted how rare words are; more would not change a weight visibly
_BACKWARD = ("lens-gradient", "tail-gradient", "gradient")


def is_model_embedding(embedding: AnyEmbedding) -> bool:
    """Whether it needs the model, not only the text or a folder."""
    return not isinstance(embedding, (TfIdf, Given))


def identity_of(embedding: AnyEmbedding, *corpora: Corpus) -> dict[str, Any]:
    """What determines the embeddings of ``corpora``, besides the model and the content of their rows.

    Given ones hang on the rows' ids, which no token and no gradient knows.
    """
    known: dict[str, Any] = cast(Any, embedding).identity
    if not isinstance(embedding, Given):
        return known
    return {**known, "rows": {corpus.name: corpus.examples.identity["ids"] for corpus in corpora}}


def work_of(embedding: ModelEmbedding) -> Work:
    """The kind of pass that it is nearest to, for the cost table."""
    return "gradient" if embedding.name in _BACKWARD else "forward"


class RowEmbeddings:
    """Embeddings of a task's rows, each kind prepared once.

    Args:
        task: whose model and rows.
        dtype: of stored embeddings; entries of unit rows lose nothing that matters in float16.
    """

    def __init__(self, task: Task, *, dtype: Literal["float16", "float32"]) -> None:
        self._task, self._dtype = task, dtype
        self._text: dict[TfIdf, TextEmbedder] = {}

    @property
    def dtype(self) -> str:
        """Of stored embeddings of a model."""
        return self._dtype

    def of(self, embedding: AnyEmbedding, corpus: Corpus, rows: IntArray) -> RowBlock:
        """A reader of the rows' embeddings; a model's are computed now, as far as they are not stored.

        Raises:
            InvalidInput: a folder of given embeddings lacks a row.
            NonFinite: an embedding is NaN or infinite.
            Unsupported: the model cannot be embedded in this way.
        """
        if isinstance(embedding, Given):
            folder = embedding
            return lambda start, stop: folder.rows([corpus.examples.ids[int(r)] for r in rows[start:stop]])
        if isinstance(embedding, TfIdf):
            words = embedding
            return lambda start, stop: self._fitted(words).embed(
                [corpus.examples.text(int(r)) for r in rows[start:stop]]
            )
        made: ModelEmbedding = embedding

        def start() -> Callable[[Batch], Mapping[str, Tensor]]:
            embed = made.start(self._task.loaded.model)
            stored = torch.float16 if self._dtype == "float16" else torch.float32
            return lambda batch: {"embedding": embed(batch)["embedding"].to(stored)}

        reader = self._task.map_rows(
            corpus,
            rows,
            name=f"embedding-{made.name}",
            spec={**made.identity, "dtype": self._dtype},
            start=start,
            work=work_of(made),
            operations=self.operations(made),
        )

        def read(first: int, last: int) -> Tensor:
            _, block = next(iter(reader.blocks("embedding", rows=max(1, last - first), start=first, stop=last)))
            return torch.from_numpy(block).float()

        return read

    def passing(self, embedding: ModelEmbedding) -> RowFunction:
        """The function behind a model's embeddings, for whoever keeps none; rounded as if they were stored."""
        embed = embedding.start(self._task.loaded.model)

        def rounded(batch: Batch) -> dict[str, Tensor]:
            found = embed(batch)["embedding"]
            return {"embedding": found.half().float() if self._dtype == "float16" else found}

        return rounded

    def operations(self, embedding: ModelEmbedding) -> Callable[[float, float, float, float], float]:
        """How many operations rows cost, from (rows, tokens, supervised tokens, squared tokens)."""
        shapes: list[ModelShape] = []

        def count(rows: float, tokens: float, supervised_tokens: float, sum_sq_len: float) -> float:
            if not shapes:
                shapes.append(ModelShape.from_model(self._task.loaded.model))
            return embedding.operations(
                shapes[0], rows=rows, tokens=tokens, supervised_tokens=supervised_tokens, sum_sq_len=sum_sq_len
            )

        return count

    def identity(self, embedding: AnyEmbedding) -> dict[str, Any]:
        """What determines the embeddings of pool and target, besides the model and what the rows contain."""
        known = identity_of(embedding, self._task.pool, self._task.target)
        return {**known, "dtype": self._dtype if is_model_embedding(embedding) else "float32"}

    def _fitted(self, embedding: TfIdf) -> TextEmbedder:
        if embedding not in self._text:
            task = self._task
            rows = task.rows
            if len(rows) > _RARITY_ROWS:
                rows = rows[random_subset(child_seed(task.seed, "rarity of words"), len(rows), _RARITY_ROWS)]
            texts = (task.pool.examples.text(int(row)) for row in rows)
            with task.progress.stage("words (pool)", len(rows), "rows") as advance:
                self._text[embedding] = embedding.fit(_counted(texts, advance))
        return self._text[embedding]


def _counted(texts: Any, advance: Callable[[int], None]) -> Any:
    for text in texts:
        yield text
        advance(1)
