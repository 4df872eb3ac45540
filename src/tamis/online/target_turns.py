"""Which target rows a choice looks at: they take turns, so that all are looked at equally often."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tamis.seeds import child_seed, random_permutation
from tamis.types import IntArray

__all__ = ["target_positions"]


def target_positions(number: int, *, count: int, total: int, seed: int) -> IntArray:
    """Target rows of choice ``number`` (from 0): fresh ones every time, none again before all had their turn.

    None stands twice in one choice either, as long as ``count`` is at most ``total``. A function of its arguments
    alone, so a resumed run goes on where the other stopped.
    """
    found = np.empty(count, dtype=np.int64)
    for place in range(count):
        turn, at = divmod(number * count + place, total)
        found[place] = _turn(turn, count, total, seed)[at]
    return found


def _turn(turn: int, count: int, total: int, seed: int) -> IntArray:
    """The order of one turn of all rows."""
    # An order depends on the last rows of the one before. Long turns leave those where they were drawn; of short ones
    # every order is made, in strides that keep the recursion of a resumed run shallow.
    for earlier in range(0, turn if total < 2 * count else 0, 64):
        _order(earlier, count, total, seed)
    return _order(turn, count, total, seed)


@lru_cache(maxsize=256)
def _order(turn: int, count: int, total: int, seed: int) -> IntArray:
    """A choice that began in the turn before goes on in this one, first with rows that it does not hold yet."""
    order = random_permutation(child_seed(seed, "target order", turn), total)
    begun = turn * total % count  # rows that the choice across the boundary took from the turn before
    if not begun or count > total:
        return order
    if total < 2 * count:
        before = _order(turn - 1, count, total, seed)
    else:
        before = random_permutation(child_seed(seed, "target order", turn - 1), total)
    new = ~np.isin(order, before[total - begun :])
    new &= np.cumsum(new) <= count - begun
    return np.concatenate([order[new], order[~new]])
