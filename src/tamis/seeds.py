"""Randomness that depends on (root seed, name) only: never on worker order, device or library version.

Streams come from SHA-256 and from the raw 64-bit words of Philox, whose output is fixed by its definition; NumPy and
PyTorch may change how they turn such words into normal variates between versions, so we only ever use the words.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

__all__ = [
    "child_seed",
    "random_normal",
    "random_permutation",
    "random_signs",
    "random_subset",
    "random_uniform",
    "raw_words",
]


def child_seed(root: int, *names: str | int) -> int:
    """A 128-bit seed that is a function of ``root`` and ``names`` alone."""
    text = "\x1f".join([str(int(root)), *(f"{type(n).__name__}:{n}" for n in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def raw_words(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """``count`` uniform 64-bit words of Philox-4x64-10 keyed by ``seed`` (below 2**128)."""
    words: npt.NDArray[np.uint64] = np.random.Philox(key=seed).random_raw(count)
    return words


def random_signs(seed: int, count: int) -> npt.NDArray[np.int8]:
    """``count`` independent signs, -1 or +1, one bit of the stream each, lowest bit of a word first."""
    words = raw_words(seed, -(-count // 64)).astype("<u8")
    signs = np.unpackbits(words.view(np.uint8), count=count, bitorder="little").view(np.int8)
    signs *= 2  # in place: these arrays can have as many entries as a model has weights
    signs -= 1
    return signs


def random_uniform(seed: int, count: int) -> npt.NDArray[np.float64]:
    """``count`` uniform numbers in [0, 1), the top 53 bits of each word."""
    numbers: npt.NDArray[np.float64] = (raw_words(seed, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def random_normal(seed: int, count: int) -> npt.NDArray[np.float64]:
    """``count`` independent standard normal numbers, two from each pair of uniform ones (Box and Muller, 1958).

    The words are the same everywhere; logarithm and cosine may differ in the last bit between mathematics libraries.
    """
    pairs = -(-count // 2)
    uniform = random_uniform(seed, 2 * pairs)
    radius = np.sqrt(-2 * np.log1p(-uniform[:pairs]))  # 1 - u is never 0
    angle = 2 * np.pi * uniform[pairs:]
    numbers: npt.NDArray[np.float64] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return numbers


def random_permutation(seed: int, count: int) -> npt.NDArray[np.int64]:
    """A uniform permutation of ``range(count)`` (sorting random words; a tie has probability below 1e-7 at 1e6)."""
    return np.argsort(raw_words(seed, count), kind="stable").astype(np.int64)


def random_subset(seed: int, population: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` distinct indices out of ``range(population)``, ascending.

    They are the first ``count`` different values of the stream of words modulo ``population`` (a bias below
    ``population / 2**64``), or what those leave over if more than half is wanted: work and memory follow ``count``,
    so that a few thousand coordinates out of billions cost nothing.
    """
    if not 0 <= count <= population:
        raise ValueError(f"cannot take {count} distinct indices out of {population}")
    if count > population // 2:
        kept = np.ones(population, dtype=np.bool_)
        kept[_first_distinct(seed, population, population - count)] = False
        return np.flatnonzero(kept).astype(np.int64)
    return np.sort(_first_distinct(seed, population, count))


def _first_distinct(seed: int, population: int, count: int) -> npt.NDArray[np.int64]:
    """The first ``count`` (at most half of ``population``) different values of the stream, in its order."""
    drawn = count
    while True:
        drawn += drawn // 2 + 16
        # A longer draw starts with the shorter one, so how often we try does not change the answer.
        values = (raw_words(seed, drawn) % np.uint64(max(population, 1))).astype(np.int64)
        _, firsts = np.unique(values, return_index=True)
        if len(firsts) >= count:
            distinct: npt.NDArray[np.int64] = values[np.sort(firsts)[:count]]
            return distinct
