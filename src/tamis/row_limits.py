"""Whether a model can take the rows: no more positions than it has, no token id that its embedding lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tamis.data.examples import Examples
from tamis.errors import BadRow
from tamis.model.limits import ModelLimits
from tamis.types import IntArray, TokenizedExample

__all__ = ["check_row_limits"]

_BLOCK_ROWS = 4096  # rows whose ids are looked at together


def check_row_limits(
    limits: ModelLimits,
    tokenizer: Any,
    examples: Examples,
    *,
    kind: str,
    rows: IntArray,
    lengths: IntArray,
    take: Callable[[IntArray], Sequence[TokenizedExample]],
) -> list[str]:
    """Refuse rows that the model would stumble over; say how many are longer than it was made for.

    Args:
        limits: what the model can be given.
        tokenizer: the one that the rows were rendered with.
        examples: where the rows come from.
        kind: "pool" or "target", for the sentence.
        rows: rows of ``examples`` that the model will be given.
        lengths: their tokens, after truncation.
        take: tokens of some of ``rows``.

    Returns:
        Sentences for the user; none if all is well.

    Raises:
        BadRow: a row is too long for a model that looks positions up in a table, or holds an id without an embedding.
    """
    if max(tokenizer.get_vocab().values(), default=0) >= limits.ids:  # else no row can hold such an id
        _check_ids(limits, tokenizer, examples, rows, take)
    if limits.positions is None:
        return []
    beyond = int((lengths > limits.positions).sum())
    if not beyond:
        return []
    if limits.fixed:
        longest = int(np.argmax(lengths))
        example = examples[int(rows[longest])]
        raise BadRow(
            f"has {int(lengths[longest])} tokens, but '{limits.model}' has a table of {limits.positions} positions and "
            f"can read no more (rows of the {kind} that are longer: {beyond}); cut them: "
            f"--max-length {limits.positions}",
            file=example.file,
            row=example.row,
        )
    return [
        f"{kind}: {beyond} of {len(rows)} rows are longer than the {limits.positions} positions that "
        f"'{limits.model}' was made for, where its losses and gradients mean little; "
        f"--max-length {limits.positions} cuts them."
    ]


def _check_ids(
    limits: ModelLimits,
    tokenizer: Any,
    examples: Examples,
    rows: IntArray,
    take: Callable[[IntArray], Sequence[TokenizedExample]],
) -> None:
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        for row, tokens in zip(block, take(block), strict=True):
            unknown = tokens.input_ids[tokens.input_ids >= limits.ids]
            if len(unknown):
                example, token = examples[int(row)], int(unknown[0])
                raise BadRow(
                    f"holds the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), but the embedding of "
                    f"'{limits.model}' has {limits.ids} rows; remove the token from the row, or use the tokenizer "
                    "that the model was trained with",
                    file=example.file,
                    row=example.row,
                )
