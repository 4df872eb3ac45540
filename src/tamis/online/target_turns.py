"""Which target rows a choice looks at: those that have a loss take turns, so that all are looked at equally often."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tamis.errors import InvalidInput
from tamis.online.batches import to_batches
from tamis.seeds import child_seed, random_permutation
from tamis.types import IntArray

__all__ = ["target_positions", "usable_target_rows"]

logger = logging.getLogger(__name__)


def usable_target_rows(collated: Callable[[IntArray], Mapping[str, Any]], total: int, *, most_rows: int) -> IntArray:
    """Places, of ``total``, of the target rows that have a supervised token once they are ``collated``, so many a time.

    Raises:
        InvalidInput: none has.
    """
    found = [np.zeros(0, dtype=np.int64)]
    for first in range(0, total, most_rows):
        own = np.arange(first, min(total, first + most_rows))
        found += [
            batch.rows.cpu().numpy() for batch in to_batches(collated(own), torch.from_numpy(own), most_rows=most_rows)
        ]
    usable: IntArray = np.concatenate(found)
    if not len(usable):
        raise InvalidInput(
            f"none of the {total} rows of target_dataset has a supervised token (a label other than -100 after the "
            "first token); give rows with answers, or see what the collator makes of their labels"
        )
    if len(usable) < total:
        logger.warning("%d of %d target rows have no supervised token and are left out", total - len(usable), total)
    return usable


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
