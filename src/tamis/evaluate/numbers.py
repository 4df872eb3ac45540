"""Which rows the numeric checks of a doctor's visit are made on, and what their outcome means in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tamis.data.duplicates import exact_duplicates
from tamis.errors import NonFinite
from tamis.evaluate.checks import (
    BatchCheck,
    LengthDistortion,
    SignCheck,
    check_batch_composition,
    check_distortion,
    check_sign,
)
from tamis.evaluate.inputs import SampledCorpus
from tamis.model.load import LoadedModel
from tamis.model.targets import gradient_layers
from tamis.projection import AnyProjector
from tamis.protocols import Progress
from tamis.types import TokenizedExample

__all__ = ["Numbers", "changes", "check_numbers", "measure_distortion"]

_CHECK_TOKENS = 512  # rows of the numeric checks are no longer than this, if there are enough of them
_LENGTHS = 4  # groups of rows, from the shortest to the longest, on which a projection is measured
_GROUP_TOKENS = 8192  # padded tokens of such a group, if two rows fit


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What the numeric checks found."""

    batch_check: BatchCheck | None = None
    sign_check: SignCheck | None = None
    failures: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()  # which did not, and why


def check_numbers(
    loaded: LoadedModel, pool: SampledCorpus, target: SampledCorpus | None, count: int, advance: Any
) -> Numbers:
    """Batch composition and sign, as far as they could run."""
    rows = _rows_to_check(pool, count)
    if len(rows) < 2:
        return Numbers(not_run=("The numeric checks need two usable pool rows; they did not run.",))
    layers = gradient_layers(loaded.model)
    dtype = str(loaded.description["dtype"])
    try:
        batch_check = check_batch_composition(loaded.model, layers, list(rows.values()), dtype=dtype)
        advance(1)
        if target is not None:
            against, candidates = list(_rows_to_check(target, count).values()), rows
            if not against:
                why = "The sign was not checked: no target row that was looked at carries a supervised token."
                return Numbers(
                    batch_check=batch_check,
                    failures=() if batch_check.passed else (_batch_failure(batch_check),),
                    not_run=(why,),
                )
        else:  # without a target, one pool row stands for it
            (_, stand_in), *others = rows.items()
            against, candidates = [stand_in], dict(others)
        sign_check = check_sign(loaded.model, layers, candidates, against, dtype=dtype)
        advance(1)
    except NonFinite as error:
        return Numbers(failures=(f"The numeric checks stopped: {error}",))
    failures = [] if batch_check.passed else [_batch_failure(batch_check)]
    if sign_check is None:
        failures.append(
            "Every gradient of the checked rows is zero, so there is no sign to check and gradient scores mean "
            "nothing; are the model's weights there?"
        )
    elif not sign_check.passed and not sign_check.is_routed:
        failures.append(
            "A small step on a pool row did not change the target loss as its score says "
            f"({changes(sign_check)}); do not trust gradient scores of this model in this dtype."
        )
    return Numbers(batch_check=batch_check, sign_check=sign_check, failures=tuple(failures))


def _batch_failure(check: BatchCheck) -> str:
    return (
        "A row's loss or gradient depends on its batch mates more than rounding explains "
        f"(features differ by {check.feature_difference:.1%}); use --batch-invariant or --dtype float32."
    )


def changes(check: SignCheck) -> str:
    """What the step should have done to the target loss, and what it did."""
    tried = f", the smallest of {check.steps} steps" if check.steps > 1 else ""
    return f"predicted {check.predicted_change:+.3g}, measured {check.measured_change:+.3g}{tried}"


def measure_distortion(
    loaded: LoadedModel, pool: SampledCorpus, projector: AnyProjector, count: int, progress: Progress
) -> tuple[list[LengthDistortion], list[str]]:
    """What the projection adds to cosines at each of a few lengths, or the reason why that is not known."""
    groups = _rows_by_length(pool, count)
    found: list[LengthDistortion] = []
    try:
        with progress.stage("projection against exact gradients", len(groups), "lengths") as advance:
            for group in groups:
                found += check_distortion(loaded.model, gradient_layers(loaded.model), [group], projector)
                advance(1)
    except NonFinite as error:
        return [], [f"The distortion of the projection was not measured: {error}"]
    if not found:
        return [], ["The distortion of the projection was not measured: that needs two different rows with a gradient."]
    return found, []


def _rows_by_length(corpus: SampledCorpus, count: int) -> list[list[TokenizedExample]]:
    """Groups of ``count`` neighbours in length, from the shortest rows to the longest; no row twice, and no copies."""
    first = exact_duplicates(corpus.examples)
    originals = [i for i in corpus.usable if first[corpus.rows[i]] == corpus.rows[i]]
    ordered = sorted((t for i in originals if (t := corpus.tokenized[i]) is not None), key=lambda t: len(t.input_ids))
    number = min(_LENGTHS, len(ordered) // 2)
    size = min(count, len(ordered) // max(1, number))
    groups = []
    for start in np.linspace(0, len(ordered) - size, number).round().astype(int):
        group = ordered[start : start + size]
        groups.append(group[-max(2, _GROUP_TOKENS // len(group[-1].input_ids)) :])
    return groups


def _rows_to_check(corpus: SampledCorpus, count: int) -> dict[int, TokenizedExample]:
    """Usable rows of different lengths, so that a batch of them is padded: row number -> tokens."""
    usable = [(corpus.tokenized[i], int(corpus.rows[i])) for i in corpus.usable]
    ordered = sorted(((t, row) for t, row in usable if t is not None), key=lambda pair: len(pair[0].input_ids))
    short = [pair for pair in ordered if len(pair[0].input_ids) <= _CHECK_TOKENS]
    ordered = short if len(short) >= count else ordered[:count]
    if not ordered:
        return {}
    spread = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return {ordered[i][1]: ordered[i][0] for i in spread}
