"""From scores to the rows to train on: budget, targets with shares, duplicates and excluded rows.

The two ways to let several target rows agree, ``round-robin`` and ``mean``, end in the same turn-taking: over target
rows within their targets, or over one mean column per target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from tamis.budget import describe_budget, rows_for, tokens_for
from tamis.errors import InvalidSettings, NonFinite
from tamis.selection.round_robin import Copies, Picks, take_turns
from tamis.selection.second_order import notes_of_second_order, second_order_scores, second_order_weights
from tamis.selection.top import BLOCK_VALUES, block_length
from tamis.selection.weights import notes_of_weights, robust_weights
from tamis.types import Budget, FloatArray, IntArray, TargetScores

__all__ = ["Aggregate", "Choice", "choose", "target_means", "target_shares"]

Aggregate = Literal["round-robin", "mean"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was selected, and what the choice was made from. ``n`` rows were scored, ``k`` of them are selected."""

    rows: IntArray  # (n,) the scored pool rows, ascending
    order: IntArray  # (k,) selected pool rows in the order they were picked
    picked_for: IntArray  # (k,) index into ``target_names``: whose turn it was
    score: FloatArray  # (n,) mean over targets, by share, of ``target_scores``; higher helps more
    target_scores: FloatArray  # (n, G) mean over the target's columns
    rank: IntArray  # (n,) 1 .. n: selected rows by pick, then the others by falling score, ties by lower row
    example_weights: FloatArray  # (n,) of selected rows 1, or on average 1; 0 for the others
    target_names: tuple[str, ...]
    shares: tuple[float, ...]  # (G,) summing to 1
    tokens: int  # tokens of the selected rows together
    warnings: tuple[str, ...]  # where the budget could not be spent
    notes: tuple[str, ...] = ()  # how weights came about, where they are not all 1


def choose(
    scores: TargetScores,
    *,
    budget: Budget,
    tokens: IntArray,
    aggregate: Aggregate = "round-robin",
    shares: Mapping[str, float] | None = None,
    first_of: IntArray | None = None,
    eligible: npt.NDArray[np.bool_] | None = None,
    block_values: int = BLOCK_VALUES,
) -> Choice:
    """The rows that ``scores`` would train on within ``budget``.

    The per-row arrays speak of the whole pool of ``N`` rows, of which ``scores.rows`` are the scored ones:
    ``tokens`` are the rows' lengths, ``first_of`` maps each row to the first of its copies (None: copies are kept),
    ``eligible`` is False on rows that must not be taken (None: all may be).

    * Targets take turns in proportion to their ``shares`` (equal by default): of the rows, or, with a token budget, of
      the tokens. With ``round-robin`` the rows of a target take turns in order, each taking its best row still free;
      with ``mean`` a target takes the row with the highest mean over its rows. Equal scores go to the lower pool row.
    * Of rows that are copies of each other one is taken: whichever of them its taker scores highest, if equal the
      lowest. An ineligible row does not stand in for its copies.
    * A share of the pool is a share of all ``N`` rows. A token budget ends at the first row that does not fit: the
      selection is a prefix of the order without a budget, and misses the budget by less than one row. (Going on with
      shorter rows would fill it, but with rows taken for being short.)

    * Selected rows weigh 1, or, if ``scores.weights`` says "first-order", as ``robust_weights`` has it for the scores
      of the target row (of the target, with ``mean``) that took them. With "second-order" every one of these solves its
      quadratic programme for as many rows as it would take by scores; the marginal scores at the solution stand in for
      the scores when rows are taken, and ``second_order_weights`` weighs them; of copies the first eligible one counts.

    ``scores.values`` may be a memmap larger than memory: it is read in blocks, from start to end. Target rows without
    a gradient must not be among its columns.

    Raises:
        InvalidSettings: the budget exceeds the pool or is below its first row; unknown or missing shares; no row is
            eligible; a target has no column.
        NonFinite: a score is NaN or infinite.
    """
    if aggregate not in get_args(Aggregate):
        raise InvalidSettings(f"aggregate {aggregate!r} is unknown; choose one of {', '.join(get_args(Aggregate))}")
    fractions = target_shares(scores.target_names, shares)
    for index, name in enumerate(scores.target_names):
        if not np.any(scores.group == index):
            raise InvalidSettings(f"target {name!r} has no row to score against; leave it out or give it other rows")
    rows, num_pool = scores.rows, len(tokens)
    max_rows, max_tokens = len(rows), None
    if budget.kind == "tokens":
        max_tokens = tokens_for(budget, int(tokens.sum()))
    else:
        max_rows = min(max_rows, rows_for(budget, num_pool))

    available = np.ones(len(rows), bool) if eligible is None else eligible[rows]
    if not available.any():
        raise InvalidSettings(
            f"no row can be selected: {num_pool} rows in the pool, {len(rows)} scored, none of them eligible; "
            "relax the filters or check the pool"
        )
    copies = None if first_of is None else Copies(first_of[rows])
    means = target_means(scores, block_values=block_values)
    per_row = aggregate == "round-robin"
    columns = scores.values if per_row else means
    of_target = scores.group if per_row else np.arange(len(fractions))
    take = partial(
        take_turns,
        group=of_target,
        shares=fractions,
        available=available,
        max_rows=max_rows,
        copies=copies,
        tokens=tokens[rows],
        max_tokens=max_tokens,
        block_values=block_values,
    )
    picks = take(columns)
    if scores.weights == "second-order":
        assert scores.curvature is not None, "second-order weights need the curvature"
        candidates = available if first_of is None else _one_of_each(first_of[rows], available)
        wanted = np.bincount(picks.column, minlength=columns.shape[1])
        marginal, solutions = second_order_scores(columns, scores.curvature, wanted, candidates)
        picks = take(marginal, available=candidates)
    if not len(picks.rows):
        raise InvalidSettings(
            f"budget of {describe_budget(budget)} is below the best row, which alone has more; raise it"
        )
    score = _weighted_mean(means, fractions)
    example_weights = np.zeros(len(rows), np.float32)
    example_weights[picks.rows] = 1
    notes: tuple[str, ...] = ()
    if scores.weights == "first-order":
        left_out = available.copy()
        left_out[picks.rows] = False
        if copies is not None:
            for row in picks.rows[copies.has_copy[picks.rows]]:
                left_out[copies.of(int(row))] = False  # not worse than the bound: the same row again
        column = picks.column if per_row else picks.target
        among = available if first_of is None else _one_of_each(first_of[rows], available)
        robust = robust_weights(
            columns, picks.rows, column, left_out, num_candidates=int(among.sum()), block_values=block_values
        )
        example_weights[picks.rows] = robust.weights
        notes = notes_of_weights(robust, of_target, scores.target_names)
    elif scores.weights == "second-order":
        assert scores.curvature is not None
        found = second_order_weights(
            columns, scores.curvature, solutions, picks.rows, picks.column, num_candidates=int(candidates.sum())
        )
        example_weights[picks.rows] = found
        notes = notes_of_second_order(solutions, of_target, scores.target_names, eta=scores.curvature.eta)
    return Choice(
        rows=rows,
        order=rows[picks.rows],
        picked_for=picks.target,
        score=score,
        target_scores=means,
        rank=_ranks(score, picks.rows),
        example_weights=example_weights,
        target_names=scores.target_names,
        shares=fractions,
        tokens=picks.tokens,
        warnings=_shortfall(
            budget, len(picks.rows), None if max_tokens is not None else rows_for(budget, num_pool), picks
        ),
        notes=notes,
    )


def _one_of_each(first_of: IntArray, available: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The available rows without all but the first available of each group of copies."""
    places = np.flatnonzero(available)
    _, firsts = np.unique(first_of[places], return_index=True)
    kept = np.zeros(len(available), np.bool_)
    kept[places[firsts]] = True
    return kept


def target_shares(names: Sequence[str], shares: Mapping[str, float] | None) -> tuple[float, ...]:
    """Each target's part of the selection, summing to 1; equal parts if ``shares`` is None.

    Raises:
        InvalidSettings: a share is not above zero, names no target, or is missing for one.
    """
    if shares is None:
        return (1 / len(names),) * len(names)
    for name, share in shares.items():
        if name not in names:
            raise InvalidSettings(f"share for {name!r}, but the targets are {', '.join(map(repr, names))}")
        if not np.isfinite(share) or share <= 0:
            raise InvalidSettings(f"share of target {name!r} is {share:g}; shares must be above zero")
    missing = [name for name in names if name not in shares]
    if missing:
        raise InvalidSettings(f"no share for target {missing[0]!r}; give every target one, or none")
    total = sum(shares.values())
    return tuple(shares[name] / total for name in names)


def target_means(scores: TargetScores, *, block_values: int = BLOCK_VALUES) -> Float[np.ndarray, "n G"]:
    """Mean score over each target's columns, ``(n, targets)``, added up in double precision.

    Raises:
        NonFinite: a score is NaN or infinite (names the pool row).
    """
    n, num_columns = scores.values.shape
    means = np.empty((n, len(scores.target_names)), np.float32)
    columns_of = [_slice_or_index(np.flatnonzero(scores.group == index)) for index in range(means.shape[1])]
    step = block_length(num_columns, block_values)
    for start in range(0, n, step):
        block = np.asarray(scores.values[start : start + step])
        for target, columns in enumerate(columns_of):
            # Not a product with a matrix of averages, whose order of addition would hang on the block's size.
            means[start : start + step, target] = block[:, columns].mean(axis=1, dtype=np.float64)
        # One NaN or infinity makes its row's sum non-finite; the sum of finite scores cannot overflow in float64.
        finite = np.isfinite(block.sum(axis=1, dtype=np.float64))
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            column = int(np.flatnonzero(~np.isfinite(np.asarray(scores.values[row])))[0])
            raise NonFinite(
                f"the score of pool row {scores.rows[row]} for target "
                f"{scores.target_names[scores.group[column]]!r} (column {column}) is {scores.values[row, column]}; "
                "expected a finite number"
            )
    return means


def _slice_or_index(columns: IntArray) -> slice | IntArray:
    """Neighbouring columns as a slice, which numpy reads without a copy."""
    if len(columns) and columns[-1] - columns[0] == len(columns) - 1:
        return slice(int(columns[0]), int(columns[-1]) + 1)
    return columns


def _weighted_mean(means: FloatArray, shares: tuple[float, ...]) -> FloatArray:
    total = np.zeros(len(means), np.float64)
    for column, share in zip(means.T, shares, strict=True):
        total += share * column.astype(np.float64)
    return total.astype(np.float32)


def _ranks(score: FloatArray, picked: Int[np.ndarray, " k"]) -> IntArray:
    rank = np.zeros(len(score), np.int64)
    rank[picked] = np.arange(1, len(picked) + 1)
    others = np.flatnonzero(rank == 0)
    rank[others[np.argsort(-score[others], kind="stable")]] = np.arange(len(picked) + 1, len(score) + 1)
    return rank


def _shortfall(budget: Budget, taken: int, allowed: int | None, picks: Picks) -> tuple[str, ...]:
    if allowed is not None and taken < allowed:
        return (
            f"{taken} rows were selected though the budget ({describe_budget(budget)}) allows {allowed}: no more rows "
            "were left after copies, filters and the shortlist.",
        )
    if allowed is None and not picks.was_stopped and picks.tokens < budget.value:
        return (
            f"{picks.tokens} tokens were selected though the budget allows {int(budget.value)}: no more rows were "
            "left after copies, filters and the shortlist.",
        )
    return ()
