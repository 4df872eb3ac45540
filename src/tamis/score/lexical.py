"""BM25: words shared with the target rows. Costs next to nothing and is hard to beat, so it always runs beside."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

from tamis.collect import Task
from tamis.data.words import words
from tamis.errors import InvalidSettings
from tamis.score.matrix import empty_scores
from tamis.types import FloatArray, IntArray, TargetScores
from tamis.values import check_types

__all__ = ["Bm25", "WordIndex"]

_DENSE_NUMBERS = 8_000_000  # of the target's term counts held dense at a time
_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Bm25:
    """BM25 of each pool row as a document, each target row as a query; both with prompt and answer.

    The score is the sum over the target row's words (repeats count again) of

        ln(1 + (N − d + ½) / (d + ½)) · f (k1 + 1) / (f + k1 (1 − b + b L / L̄))

    with ``f`` the word's count in the pool row, ``L`` the pool row's words and ``L̄`` their mean, ``N`` the scored pool
    rows and ``d`` those that have the word. This is Robertson's form with Lucene's logarithm, which stays positive for
    words that most rows have. Text is compared as it was read: not rendered, not truncated.
    """

    name: ClassVar[str] = "bm25"
    k1: float = 1.2  # how fast repeats of a word stop counting
    b: float = 0.75  # how much long rows are held back: 0 not at all, 1 in full

    def __post_init__(self) -> None:
        check_types(self)
        if self.k1 < 0:
            raise InvalidSettings(f"k1 must be at least 0, got {self.k1:g}")
        if not 0 <= self.b <= 1:
            raise InvalidSettings(f"b must be between 0 and 1, got {self.b:g}")

    def score(self, task: Task) -> TargetScores:
        """One column per target row."""
        queries = [task.target.examples.text(int(row)) for row in task.target_rows]
        with task.progress.stage("bm25 (pool)", len(task.rows), "rows") as advance:
            texts = (task.pool.examples.text(int(row)) for row in task.rows)
            index = WordIndex(texts, queries, advance=advance)
        values = index.scores(k1=self.k1, b=self.b, out=empty_scores(task, len(task.target_rows)))
        return TargetScores(rows=task.rows, values=values, group=task.target_group, target_names=task.target_names)


class WordIndex:
    """How often each word of the queries occurs in each document; words that no query has are only counted.

    Documents stream through; what is kept is about 8 bytes for each different query word of a document.
    """

    def __init__(
        self, documents: Iterable[str], queries: Sequence[str], *, advance: Callable[[int], None] = lambda done: None
    ) -> None:
        vocabulary: dict[str, int] = {}
        counted = [Counter(words(query)) for query in queries]
        for count in counted:
            for word in count:
                vocabulary.setdefault(word, len(vocabulary))
        self.query_counts = _rows_of_counts(
            ({vocabulary[word]: times for word, times in count.items()} for count in counted), len(vocabulary)
        )

        lengths = array("q")

        def known_words() -> Iterable[dict[int, int]]:
            for document in documents:
                found = words(document)
                lengths.append(len(found))
                yield Counter(vocabulary[word] for word in found if word in vocabulary)
                advance(1)

        self.counts = _rows_of_counts(known_words(), len(vocabulary))
        self.lengths: IntArray = np.array(lengths, np.int64)

    def scores(self, *, k1: float, b: float, out: FloatArray) -> FloatArray:
        """BM25 of every document for every query, written to ``out`` ``(documents, queries)``; see `Bm25`."""
        num_documents, num_words = self.counts.shape
        with_word = np.bincount(self.counts.indices, minlength=num_words)
        rarity = np.log1p((num_documents - with_word + 0.5) / (with_word + 0.5))
        mean_length = (
            float(self.lengths.mean()) if num_documents else 0.0
        ) or 1.0  # no words at all: any length will do
        patience = k1 * (1 - b + b * self.lengths / mean_length)  # (documents,)
        times = self.counts.data.astype(np.float64)
        per_entry = np.repeat(patience, np.diff(self.counts.indptr))
        data = rarity[self.counts.indices] * times * (k1 + 1) / (times + per_entry)
        weighted = sparse.csr_matrix((data, self.counts.indices, self.counts.indptr), shape=self.counts.shape)

        # A dense right-hand side, some queries at a time: common words are in nearly every query anyhow.
        step = max(1, _DENSE_NUMBERS // max(1, num_words))
        for first in range(0, out.shape[1], step):
            queries = self.query_counts[first : first + step].T.toarray().astype(np.float64)  # (words, queries)
            for start in range(0, num_documents, _BLOCK_ROWS):
                out[start : start + _BLOCK_ROWS, first : first + step] = weighted[start : start + _BLOCK_ROWS] @ queries
        return out


def _rows_of_counts(rows: Iterable[dict[int, int]], num_words: int) -> sparse.csr_matrix:
    """Word counts as a sparse matrix, words ascending within a row, so that sums do not depend on the word order."""
    indices, counts, ends = array("i"), array("i"), array("q", [0])
    for row in rows:
        for word in sorted(row):
            indices.append(word)
            counts.append(row[word])
        ends.append(len(indices))
    data: npt.NDArray[np.int32] = np.array(counts, np.int32)
    return sparse.csr_matrix((data, np.array(indices, np.int32), np.array(ends)), shape=(len(ends) - 1, num_words))
