"""TF-IDF of words, projected to a few hundred numbers: no model at all.

A word weighs ``f (ln((1 + N) / (1 + d)) + 1)``, with ``f`` its count in the text, ``N`` the pool's rows and ``d`` those
that have it. The sparse vector is scaled to length 1 and multiplied by a sparse matrix of random signs: every word has
one entry ``±1/√s`` in each of ``s`` equal parts of the result (Kane & Nelson, 2014), so that inner products are
unbiased. Words are known by a hash, so nothing grows with the vocabulary.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from tamis.data.words import words
from tamis.errors import InvalidSettings
from tamis.maths.similarity import unit_rows
from tamis.seeds import child_seed, raw_words
from tamis.types import IntArray

__all__ = ["TfIdf", "TfIdfEmbedder", "word_buckets"]

_ALGORITHM = "tfidf-v1"
_BUCKETS = 1 << 20  # words that share one count as one word: of 100,000 words about every tenth does
_ENTRIES = 8  # s
_LARGEST = 1 << 15  # above it fifteen bits would no longer reach every place nearly as often as every other


@dataclass(frozen=True, kw_only=True)
class TfIdf:
    """TF-IDF vectors of a row's whole text, prompt and answer, as it was read.

    Args:
        dim: numbers per row, a multiple of 8.
        seed: of the projection.
    """

    name: ClassVar[str] = "tfidf"
    dim: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not _ENTRIES <= self.dim <= _LARGEST or self.dim % _ENTRIES:
            raise InvalidSettings(
                f"dim must be a multiple of {_ENTRIES}, from {_ENTRIES} to {_LARGEST}, got {self.dim}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The algorithm and its settings."""
        return {"algorithm": _ALGORITHM, "dim": self.dim, "seed": self.seed}

    def fit(self, texts: Iterable[str]) -> TfIdfEmbedder:
        """Count in how many of the pool's texts each word occurs; texts stream through once."""
        with_word = np.zeros(_BUCKETS, np.int64)
        number = 0
        for text in texts:
            with_word[list(word_buckets(text))] += 1
            number += 1
        return TfIdfEmbedder(np.log((1 + number) / (1 + with_word)) + 1, dim=self.dim, seed=self.seed)


class TfIdfEmbedder:
    """Embeds texts, given how rare each word is.

    Args:
        rarity: (buckets,) factor of every word.
        dim: numbers per text.
        seed: of the projection.
    """

    def __init__(self, rarity: npt.NDArray[np.float64], *, dim: int, seed: int) -> None:
        self._rarity = rarity
        self._dim = dim
        # Sixteen bits for every entry: the lowest is its sign, the others choose a place in its own part of the result.
        drawn = raw_words(child_seed(seed, _ALGORITHM, dim), len(rarity) * _ENTRIES // 4).astype("<u8")
        self._drawn = drawn.view("<u2").reshape(len(rarity), _ENTRIES)

    def vectors(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """The weights of the words, one text per row, scaled to length 1; before the projection."""
        columns: list[int] = []
        counts: list[int] = []
        ends = [0]
        for text in texts:
            found = word_buckets(text)
            for bucket in sorted(found):  # sums must not depend on the order of the words
                columns.append(bucket)
                counts.append(found[bucket])
            ends.append(len(columns))
        index: IntArray = np.array(columns, np.int64)
        weight = np.array(counts, np.float64) * self._rarity[index]
        rows = np.repeat(np.arange(len(texts)), np.diff(ends))
        length = np.sqrt(np.bincount(rows, weight**2, minlength=len(texts)))
        return sparse.csr_matrix((weight / length[rows], index, ends), shape=(len(texts), len(self._rarity)))

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Rows of length 1; a text without a word is a row of zeros."""
        found = self.vectors(texts)
        drawn = self._drawn[found.indices]  # (words of all texts, s)
        part = self._dim // _ENTRIES
        places = np.arange(_ENTRIES) * part + (drawn >> 1) % part
        signs = (drawn & 1).astype(np.float64) * 2 - 1
        rows = np.repeat(np.arange(len(texts)), np.diff(found.indptr))
        flat = np.bincount(
            (rows[:, None] * self._dim + places).ravel(),
            (found.data[:, None] * signs).ravel() / _ENTRIES**0.5,
            minlength=len(texts) * self._dim,
        ).astype(np.float64)  # integers where no text has a word
        return unit_rows(torch.from_numpy(flat.reshape(len(texts), self._dim))).float()


def word_buckets(text: str) -> Counter[int]:
    """How often each word occurs, by the hash under which it is known."""
    return Counter(zlib.crc32(word.encode()) & (_BUCKETS - 1) for word in words(text))
