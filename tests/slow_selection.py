"""Selection by the plainest loops: the oracle for `tamis.selection`. Every rule is written out; nothing is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np


@dataclass
class SlowPicks:
    rows: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)


def slow_turn(due: list[Fraction], shares: list[Fraction]) -> int:
    """Whose turn it is: the target to which most is owed, the lowest of equals. Updates what is owed."""
    for target, share in enumerate(shares):
        due[target] += share
    chosen = 0
    for target in range(len(due)):
        if due[target] > due[chosen]:
            chosen = target
    due[chosen] -= sum(shares)
    return chosen


def slow_token_turn(taken: list[int], shares: list[Fraction]) -> int:
    """Whose turn it is when tokens are shared: the target that lacks most of its part of those taken so far."""
    lacking = [share / sum(shares) * sum(taken) - own for share, own in zip(shares, taken, strict=True)]
    return lacking.index(max(lacking))


def slow_take_turns(
    values: np.ndarray,
    group: np.ndarray,
    shares: list[Fraction],
    available: np.ndarray,
    first_of: np.ndarray,
    max_rows: int,
    tokens: np.ndarray,
    max_tokens: int | None,
) -> SlowPicks:
    """One row at a time: look at every row for the best that is available and whose copies are not taken."""
    picks, due, spent = SlowPicks(), [Fraction(0)] * len(shares), [0] * len(shares)
    next_column = [0] * len(shares)
    while len(picks.rows) < max_rows:
        target = slow_turn(due, shares) if max_tokens is None else slow_token_turn(spent, shares)
        own = [j for j in range(values.shape[1]) if group[j] == target]
        column = own[next_column[target] % len(own)]
        next_column[target] += 1
        best = None
        for row in range(len(values)):
            taken = any(first_of[row] == first_of[other] for other in picks.rows)
            if available[row] and not taken and (best is None or values[row, column] > values[best, column]):
                best = row
        if best is None:
            break
        if max_tokens is not None and sum(spent) + tokens[best] > max_tokens:
            break
        spent[target] += int(tokens[best])
        picks.rows.append(best)
        picks.target.append(target)
        picks.column.append(column)
    return picks
