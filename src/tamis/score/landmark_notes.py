"""What a run says of its landmarks in plain words: what carried the scores, how well, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from tamis.score.embedding_choice import Choice, Tried
from tamis.solve.landmarks import LandmarkRule

__all__ = ["is_trusted", "notes_of_choice", "verdict"]

# Rank correlations with exact scores at which the advice changes; round figures, a matter of judgement.
_TRUST, _USE = 0.8, 0.5
_STILL_RISING = 0.03  # what the second half of the landmarks must have added for more of them to be worth while


def notes_of_choice(
    choice: Choice, *, landmarks: int, rule: LandmarkRule, target_names: Sequence[str], per_row: bool
) -> tuple[str, str]:
    """Two sentences for the report: what was chosen and why, and what to expect.

    Args:
        choice: what was chosen.
        landmarks: their number.
        rule: how they were drawn.
        target_names: of all targets.
        per_row: whether the run selects by single target rows, not by the mean of each target.
    """
    form = "with" if choice.residual else "without"
    used = next(tried for tried in choice.tried if tried.recovery == max(t.recovery for t in choice.tried))
    chosen = (
        f"influence-distillation carried the scores of {landmarks} landmarks to the other rows by the embedding "
        f"{used.label} ({_cost(used)}), kernel {choice.candidate}, {form} the embedding's own score"
    )
    if len(choice.tried) > 1:
        others = ", ".join(f"{tried.label} {tried.recovery:.3f}" for tried in choice.tried)
        chosen += f"; it was chosen because it rebuilds the gradients of left-out landmarks best (cosines: {others})"
    by_target = ""
    if len(target_names) > 1:
        pairs = zip(target_names, choice.spearman, strict=True)
        by_target = " (" + ", ".join(f"{name} {value:.2f}" for name, value in pairs) + ")"
    whose = "Expected on rows that are no landmarks"
    if rule != "uniform":  # such landmarks are no sample of the other rows
        whose = f"Of the landmarks, which {rule} made unlike the other rows (those may do better or worse)"
    expected = (
        f"{whose}, found by leaving out each landmark in turn: gradients rebuilt with a cosine of "
        f"{choice.recovery:.2f}, scores of {'single target rows' if per_row else 'mean targets'} in the order of exact "
        f"ones with a mean rank correlation of {choice.mean_spearman:.2f}{by_target}"
    )
    return chosen, expected


def is_trusted(choice: Choice) -> bool:
    """Whether the scores of every target are good enough to select by; otherwise the verdict is a warning."""
    return min(choice.spearman) >= _USE


def verdict(choice: Choice, target_names: Sequence[str]) -> str:
    """Trust the scores, add landmarks, or spend more per row: by the target that fares worst."""
    value = min(choice.spearman)
    by = ""
    if len(target_names) > 1:
        by = f"by the worst target, {target_names[choice.worst_target]} ({value:.2f}), "
    rising = choice.with_half is not None and choice.mean_spearman - choice.with_half >= _STILL_RISING
    if choice.with_half is None:
        advice = "there are too few landmarks to tell what would help; add landmarks"
    elif rising:
        advice = (
            f"add landmarks: with half of them the mean correlation was {choice.with_half:.2f}, so it is still rising"
        )
    elif choice.embedding.name == "gradient":  # nothing dearer is left
        advice = f"take a larger sketch (side): half the landmarks gave {choice.with_half:.2f}"
    else:
        advice = (
            f"spend more per row (embedding_budget): half the landmarks gave {choice.with_half:.2f}, so more of them "
            "would change little"
        )
    if value >= _TRUST:
        return f"Verdict: {by}these scores may be trusted nearly like exact ones; for still better ones, {advice}"
    if is_trusted(choice):
        return f"Verdict: {by}these scores find most of the best rows, but mix up neighbours; to sharpen them, {advice}"
    return f"Verdict: {by}do not trust the order of these scores much; {advice}, or score with tracin exactly."


def _cost(tried: Tried) -> str:
    return "no pass of the model" if tried.passes is None else f"{tried.passes:.2g} forward passes a row"
