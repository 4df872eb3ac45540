"""Which rows of a training run do what: candidates, target rows, and target rows that only measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tamis.corpora import Rendered, Sources, leaked_rows
from tamis.errors import InvalidSettings
from tamis.notation import target_parts
from tamis.online.methods.choice import Method
from tamis.online.settings import StepSettings
from tamis.online.source_means import source_numbers
from tamis.seeds import child_seed, random_permutation
from tamis.settings import TrainRunSettings
from tamis.types import IntArray

__all__ = ["RunRows", "check_candidates", "measuring_targets", "num_updates", "split_rows"]

_MEASURES = " (measures)"  # ends the names of targets that only measure


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Which rows do what; positions in their corpora."""

    pool: IntArray  # candidates
    target: IntArray
    held_out: IntArray  # target rows that only measure
    held_out_group: IntArray  # for each of them, which of ``names`` it stands for
    names: tuple[str, ...]
    leaked: IntArray  # usable pool rows that are target rows, or their prompts are
    warnings: tuple[str, ...]


def split_rows(sources: Sources, rendered: Rendered, settings: TrainRunSettings) -> RunRows:
    """Candidates, target rows, and rows that only measure.

    Raises:
        InvalidSettings: nothing is left of one of them.
    """
    usable = np.flatnonzero(rendered.pool.usable).astype(np.int64)
    leaked = np.flatnonzero(rendered.pool.usable & leaked_rows(sources)).astype(np.int64)
    warnings = []
    pool = usable
    if settings.drop_leaks:
        pool = np.setdiff1d(usable, leaked)
        if not len(pool):
            raise InvalidSettings(
                f"--drop-leaks leaves no row to train on: all {len(usable)} usable rows of the pool, or their prompts, "
                "are target rows too; give target rows that are not in the pool, or train with --keep-leaks"
            )
    elif len(leaked):
        warnings.append(
            f"{len(leaked)} of {len(usable)} pool rows, or their prompts, are target rows too, which flatters losses "
            "measured on the target; --drop-leaks leaves them out."
        )
    count = len(settings.target)
    parts: list[tuple[IntArray, IntArray]] = []
    for group, name in enumerate(sources.target_names):
        own = rendered.target_rows[rendered.target_group == group]
        held = len(own) if group >= count else _held_out_count(len(own), name, settings)
        order = own[random_permutation(child_seed(settings.seed, "held-out target rows", group), len(own))]
        parts.append((np.sort(order[held:]), np.sort(order[:held])))
    target, held_out = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    # Targets that only measure come after the others; then groups are counted from the first of them.
    first = count if settings.eval else 0
    group_of = np.repeat(np.arange(len(parts)) - first, [len(part[1]) for part in parts])
    names = sources.target_names[count:] if settings.eval else sources.target_names
    digests = sources.target.digests
    shared = len({digests[row] for row in target} & {digests[row] for row in held_out})
    if shared:
        warnings.append(
            f"{shared} rows that measure are target rows too, word for word; measured losses are flattered."
        )
    return RunRows(
        pool=pool,
        target=target,
        held_out=held_out,
        held_out_group=group_of.astype(np.int64),
        names=tuple(name.removesuffix(_MEASURES) for name in names),
        leaked=leaked,
        warnings=tuple(warnings),
    )


def _held_out_count(rows: int, name: str, settings: TrainRunSettings) -> int:
    share = settings.held_out_share
    count = max(1, round(share * rows)) if share else 0
    if count >= rows:
        raise InvalidSettings(
            f"target '{name}' has {rows} usable rows, of which {count} would only measure (held_out={share:g}); give "
            "more rows, name others by --eval, or measure nothing by --held-out 0"
        )
    return count


def check_candidates(sources: Sequence[str], method: Method, step_settings: StepSettings) -> None:
    """Refuse a pool that cannot fill one choice, or is of one source where sources are chosen.

    Args:
        sources: of every row that can be a candidate.
        method: of the run.
        step_settings: of the run.

    Raises:
        InvalidInput: there is one source only.
        InvalidSettings: the pool is too small.
    """
    if step_settings.candidates_kind == "sources":
        source_numbers(sources)
    wanted = method.keep * method.oversample
    if len(sources) < wanted:
        raise InvalidSettings(
            f"the pool has {len(sources)} usable rows, fewer than the {method.keep} x {method.oversample} candidates "
            "of one choice; choose a smaller keep or oversample, or give more rows"
        )


def num_updates(settings: TrainRunSettings, *, pool_rows: int, candidates: int, choices: int = 1) -> int:
    """Updates of the run: as given, or as many as the epochs take, the last short batch of each included.

    Where several ``choices`` are made of the same candidates, a short batch at the end of an epoch is left out.
    """
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    per_pass = math.ceil(pool_rows / candidates) if choices == 1 else pool_rows // candidates * choices
    per_epoch = math.ceil(per_pass / settings.accumulation)
    return math.ceil(settings.epochs * per_epoch)


def measuring_targets(settings: TrainRunSettings) -> tuple[str, ...]:
    """Rows that only measure, as targets of their own, so that they are read, checked and compared like all others.

    Raises:
        InvalidSettings: a target is one of them.
    """
    chosen_by = {path for _, path in map(target_parts, settings.target)}
    for _, path in map(target_parts, settings.eval):
        if path in chosen_by:
            raise InvalidSettings(
                f"target, eval: {path} is in both, and rows that a choice looks at measure nothing; leave --eval out, "
                "and a share of the target's rows only measures"
            )
    return tuple(f"{name}{_MEASURES}={path}" for name, path in map(target_parts, settings.eval))
