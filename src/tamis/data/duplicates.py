"""Rows that are copies of others: exact, near, and between pool and target. Rows are named, never merged here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH

from tamis.data.examples import Examples
from tamis.errors import InvalidSettings
from tamis.seeds import child_seed
from tamis.types import IntArray

__all__ = ["Leaks", "bands", "exact_duplicates", "find_leaks", "first_copies", "jaccard", "near_duplicates", "shingles"]

_PERMUTATIONS = 128
_SHINGLE_WORDS = 3

# The chance that LSH may miss a pair of rows whose similarity is just the threshold; it falls fast above it.
_MISSED = 0.01

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """Pool rows that the target holds too."""

    exact: IntArray  # ascending pool rows whose trained content equals a target row's
    same_prompt: IntArray  # ascending further pool rows whose prompt equals a target row's, up to case and spaces


def exact_duplicates(examples: Examples) -> IntArray:
    """For each row the first row with the same trained content, itself if there is none before it: (N,)."""
    return first_copies(examples.digests)


def first_copies(keys: Sequence[str]) -> IntArray:
    """For each key the index at which it first occurs: (N,)."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)


def near_duplicates(examples: Examples, *, threshold: float = 0.8) -> IntArray:
    """For each row the first kept row that it nearly repeats, itself if there is none: (N,).

    Two rows nearly repeat each other if the Jaccard similarity of their sets of 3-word shingles (prompt and answer, in
    lower case, without punctuation) is at least ``threshold``. MinHash LSH proposes pairs, and each is checked on the
    shingles themselves, so no row is called a copy wrongly; a true pair can be missed, the same ones every time.
    Rows are compared with kept rows only, in order, so that a chain of small changes does not join its two ends.
    Exact copies are always found. Memory: about 2 KB for each kept row.

    Raises:
        InvalidSettings: ``threshold`` is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise InvalidSettings(f"near_threshold={threshold}: expected a number above 0 and at most 1")
    first = exact_duplicates(examples)
    # Not MinHashLSH's own choice for a threshold, which misses 60 % of the pairs that just reach 0.8: it weighs false
    # candidates as much as missed ones, and here false ones cost only a comparison.
    lsh = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(threshold))
    # MinHash takes a 32-bit seed, from which NumPy's frozen RandomState draws the permutations.
    base = MinHash(num_perm=_PERMUTATIONS, seed=child_seed(0, "near-duplicates") % 2**32)
    for row in range(len(examples)):
        if first[row] != row:
            first[row] = first[first[row]]  # the first exact copy may itself nearly repeat an earlier row
            continue
        words = shingles(examples.text(row))
        sketch = base.copy()
        sketch.update_batch([shingle.encode("utf-8") for shingle in words])
        for candidate in sorted(lsh.query(sketch)):
            if jaccard(words, shingles(examples.text(candidate))) >= threshold:
                first[row] = candidate
                break
        else:
            lsh.insert(row, sketch)
    return first


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows per band of the permutations: the most rows that keep the chance of a miss within 1 %.

    A pair of similarity s agrees in a band of r rows with probability s^r, so that b bands all miss it with
    probability (1 - s^r)^b.
    """
    rows = 1
    while (1 - threshold ** (rows + 1)) ** (_PERMUTATIONS // (rows + 1)) <= _MISSED and rows < 32:
        rows += 1
    return _PERMUTATIONS // rows, rows


def shingles(text: str) -> frozenset[str]:
    """The runs of three words of ``text``, in lower case; a shorter text is one shingle."""
    words = _WORD.findall(text.lower())
    if len(words) < _SHINGLE_WORDS:
        return frozenset([" ".join(words) or text.strip()])
    return frozenset(" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over size of the union."""
    return len(a & b) / len(a | b) if a or b else 1.0


def find_leaks(pool: Examples, target: Examples) -> Leaks:
    """Pool rows that equal a target row in what is trained on, and those that only ask the same."""
    held = set(target.digests)
    exact = np.array([digest in held for digest in pool.digests], dtype=np.bool_)
    asked = target.prompt_hashes[target.prompt_hashes != 0]
    same = np.isin(pool.prompt_hashes, asked) & (pool.prompt_hashes != 0) & ~exact
    # 64 bits could agree by chance, so the few rows that seem to ask the same are read and compared.
    suspects = np.flatnonzero(same)
    if len(suspects):
        wanted = np.isin(target.prompt_hashes, pool.prompt_hashes[suspects])
        prompts = {target.prompt(int(row)) for row in np.flatnonzero(wanted)}
        suspects = np.array([row for row in suspects if pool.prompt(int(row)) in prompts], dtype=np.int64)
    return Leaks(exact=np.flatnonzero(exact).astype(np.int64), same_prompt=suspects.astype(np.int64))
