"""How much to select: what a user may write for a budget, and what it comes to for a given pool.

Tokens are all tokens of a rendered row, prompt included, after truncation: what training on the row costs.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from decimal import Decimal

import numpy as np

from tamis.errors import InvalidSettings
from tamis.types import Budget

__all__ = ["describe_budget", "parse_budget", "rows_for", "times", "tokens_for"]

_FORMS = "write a number of rows (500), a share of the pool (5% or 0.05) or a number of tokens (200k-tokens)"
_NUMBER = r"(?P<number>\d[\d_]*(?:\.\d+)?|\.\d+)"
_WRITTEN = re.compile(rf"{_NUMBER}\s*(?P<scale>[kmb])?\s*(?P<unit>%|[-\s]?\s*(?:tokens?|rows?))?", re.IGNORECASE)
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_budget(written: str | int | float | Budget) -> Budget:
    """The budget that ``written`` names.

    Whole numbers are rows, ``5%`` and decimals of at most 1 are a share of the pool's rows, and anything ending in
    ``-tokens`` counts tokens; ``k``, ``m`` and ``b`` multiply by a thousand, a million and a billion.

    >>> parse_budget("1.5m-tokens")
    Budget(kind='tokens', value=1500000.0)
    >>> parse_budget(0.05)
    Budget(kind='share', value=0.05)

    Raises:
        InvalidSettings: it is none of these, not above zero, or a share above 1.
    """
    if isinstance(written, Budget):
        return _checked(written, describe_budget(written))
    if isinstance(written, bool):
        raise InvalidSettings(f"budget {written!r} is not a number; {_FORMS}")
    if isinstance(written, (int, np.integer)):
        return _checked(Budget(kind="rows", value=float(int(written))), str(written))
    if isinstance(written, (float, np.floating)):
        return _checked(Budget(kind="share", value=float(written)), repr(float(written)))
    if not isinstance(written, str):  # what YAML makes of an empty value, or of a list
        raise InvalidSettings(f"budget: expected a number or a text, got {written!r}; {_FORMS}")
    return _checked(_read(written), written)


def _read(written: str) -> Budget:
    match = _WRITTEN.fullmatch(written.strip())
    if match is None:
        raise InvalidSettings(f"cannot read the budget {written!r}; {_FORMS}")
    number, scale = match["number"].replace("_", ""), (match["scale"] or "").lower()
    unit = (match["unit"] or "").strip("- \t").lower().rstrip("s")
    if unit == "%":
        if scale:
            raise InvalidSettings(f"cannot read the budget {written!r}; {_FORMS}")
        return Budget(kind="share", value=float(Decimal(number) / 100))
    value = float(number) * _SCALES[scale]
    if unit == "token":
        return Budget(kind="tokens", value=value)
    if unit == "row" or scale or "." not in number:
        return Budget(kind="rows", value=value)
    return Budget(kind="share", value=value)


def _checked(budget: Budget, written: str) -> Budget:
    if not math.isfinite(budget.value) or budget.value <= 0:
        raise InvalidSettings(f"budget {written!r} must be above zero; {_FORMS}")
    if budget.kind == "share" and budget.value > 1:
        raise InvalidSettings(
            f"budget {written!r} is a share above the whole pool; shares are at most 100% (1.0), "
            "and a number of rows is written without a decimal point"
        )
    if budget.kind != "share" and budget.value != int(budget.value):
        raise InvalidSettings(f"budget {written!r} is not a whole number of {budget.kind}; {_FORMS}")
    return budget


def describe_budget(budget: Budget) -> str:
    """The budget as a user would write it, readable by `parse_budget` again."""
    if budget.kind == "share":
        return f"{(Decimal(repr(budget.value)) * 100).normalize():f}%"
    return f"{int(budget.value)}" + ("-tokens" if budget.kind == "tokens" else "")


def rows_for(budget: Budget, num_rows: int) -> int:
    """Rows that ``budget`` allows from a pool of ``num_rows``: a share is rounded to the nearest row, at least one.

    Raises:
        InvalidSettings: the budget counts tokens, or more rows than the pool has.
    """
    if budget.kind == "tokens":
        raise InvalidSettings(f"budget {describe_budget(budget)} counts tokens, but a number of rows is needed here")
    if budget.kind == "share":
        return min(num_rows, max(1, math.floor(budget.value * num_rows + 0.5)))
    if budget.value > num_rows:
        raise InvalidSettings(
            f"budget of {int(budget.value)} rows, but the pool has {num_rows}; give at most {num_rows}, or 100%"
        )
    return int(budget.value)


def tokens_for(budget: Budget, num_tokens: int) -> int:
    """Tokens that ``budget`` allows from a pool of ``num_tokens``.

    Raises:
        InvalidSettings: the budget does not count tokens, or counts more than the pool has.
    """
    if budget.kind != "tokens":
        raise InvalidSettings(f"budget {describe_budget(budget)} counts rows, but a number of tokens is needed here")
    if budget.value > num_tokens:
        raise InvalidSettings(
            f"budget of {int(budget.value)} tokens, but the pool has {num_tokens}; "
            f"give at most {num_tokens}-tokens, or 100%"
        )
    return int(budget.value)


def times(budget: Budget, factor: float, *, num_rows: int, num_tokens: int) -> Budget:
    """``factor`` times the budget, at most the whole pool: what a shortlist keeps for the next score to choose from."""
    if not math.isfinite(factor) or factor < 1:
        raise InvalidSettings(f"a shortlist keeps {factor:g} times the budget; the factor must be at least 1")
    if budget.kind == "tokens":
        return replace(budget, value=float(min(num_tokens, math.ceil(budget.value * factor))))
    rows = min(num_rows, math.ceil(rows_for(budget, num_rows) * factor))
    return Budget(kind="rows", value=float(rows))
