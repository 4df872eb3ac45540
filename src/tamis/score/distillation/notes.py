"""What a run says of its landmarks in plain words: what carried the scores, how well, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from tamis.embeddings import Gradient
from tamis.score.distillation.candidates import EmbeddingSettings
from tamis.score.distillation.choice import COMPARED, KERNELS_COMPARED, Choice, Tried
from tamis.solve.landmarks import LandmarkRule

__all__ = ["USABLE", "diagnosis", "is_trusted", "notes_of_carried_term", "notes_of_choice", "verdict"]

# Rank correlations with exact scores at which the advice changes; round figures, a matter of judgement.
_TRUST, USABLE = 0.8, 0.5
_FULL_PASS = 1  # the budget from which a dearer embedding costs about what gradients of all rows do (docs/results.md)
_EXACTLY = "score with tracin exactly"
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
    chosen = (
        f"influence-distillation carried the scores of {landmarks} landmarks to the other rows by the embedding "
        f"{_used(choice)}, kernel {choice.candidate}, {form} the embedding's own score{_why(choice, landmarks)}"
    )
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


def notes_of_carried_term(choice: Choice, *, landmarks: int) -> tuple[str]:
    """The same where every score is exact, and only the second-order term is carried.

    How well it is carried is said with the term, which is carried with first-order scores, too.

    Args:
        choice: what was chosen, on the landmarks of the term alone.
        landmarks: their number.
    """
    return (
        f"influence-distillation carried the second-order term, not the scores, from {landmarks} landmarks to the "
        f"other rows by the embedding {_used(choice)}, kernel {choice.candidate}{_why(choice, landmarks)}",
    )


def diagnosis(choice: Choice, target_names: Sequence[str], settings: EmbeddingSettings) -> dict[str, str]:
    """The same in a few words, as the console shows it: what carried the scores, what to expect, and the verdict."""
    worst = ""
    if len(target_names) > 1:
        worst = f" (worst target {target_names[choice.worst_target]}: {min(choice.spearman):.2f})"
    of = f", best of {len(choice.tried)} tried" if len(choice.tried) > 1 else ""
    said = verdict(choice, target_names, settings).removeprefix("Verdict: ")
    return {
        "embedding": f"{_used(choice)}, kernel {choice.candidate}{of}",
        "expected": f"gradients rebuilt with a cosine of {choice.recovery:.2f}, rows in the order of exact scores with "
        f"a rank correlation of {choice.mean_spearman:.2f}{worst}",
        # A verdict that is no good is among the warnings already.
        "verdict": said if is_trusted(choice) else "do not trust the order of these scores much (see the warning)",
    }


def is_trusted(choice: Choice) -> bool:
    """Whether the scores of every target are good enough to select by; otherwise the verdict is a warning."""
    return min(choice.spearman) >= USABLE


def verdict(choice: Choice, target_names: Sequence[str], settings: EmbeddingSettings) -> str:
    """Trust the scores, add landmarks, or spend more per row: by the target that fares worst.

    Args:
        choice: what was chosen.
        target_names: of all targets.
        settings: from which it was chosen, so that nothing is advised that was done already.
    """
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
    else:
        advice = (
            f"{_dearer(choice, settings)}: half the landmarks gave {choice.with_half:.2f}, so more of them would "
            "change little"
        )
    if value >= _TRUST:
        return f"Verdict: {by}these scores order most rows as exact ones do; for still better ones, {advice}"
    if is_trusted(choice):
        # On a real pool, correlations of .55 to .7 found .4 to .5 of the exact top 5 % (docs/results.md).
        return (
            f"Verdict: {by}these scores are usable, but miss about half of the very best rows and take good ones in "
            f"their place; to sharpen them, {advice}"
        )
    otherwise = "" if _EXACTLY in advice else f", or {_EXACTLY}"
    return f"Verdict: {by}do not trust the order of these scores much; {advice}{otherwise}."


def _dearer(choice: Choice, settings: EmbeddingSettings) -> str:
    """How to spend more on a row, if that is any cheaper than its gradient."""
    if settings.name not in ("auto", Gradient.name):  # which no budget changes
        return f"spend more per row (embedding=auto in place of {settings.name})"
    if not isinstance(choice.embedding, Gradient) and settings.budget < _FULL_PASS:
        return f"spend more per row (embedding_budget={_FULL_PASS})"
    return f"{_EXACTLY}, which costs about as much as a dearer embedding"


def _used(choice: Choice) -> str:
    best = max(tried.recovery for tried in choice.tried)
    used = next(tried for tried in choice.tried if tried.recovery == best)
    return f"{used.label} ({_cost(used)})"


def _why(choice: Choice, landmarks: int) -> str:
    most = COMPARED if len(choice.tried) > 1 else KERNELS_COMPARED
    on = f" {most:,} of the" if landmarks > most else ""
    if len(choice.tried) > 1:
        others = ", ".join(f"{tried.label} {tried.recovery:.3f}" for tried in choice.tried)
        of = f" of{on} landmarks, each left out in turn," if on else " of left-out landmarks"
        return f"; it was chosen because it rebuilds the gradients{of} best (cosines: {others})"
    return f"; the kernel was chosen on{on} landmarks" if on else ""


def _cost(tried: Tried) -> str:
    if tried.passes is None:
        return "no pass of the model"
    return f"{tried.passes:.2g} forward pass{'' if f'{tried.passes:.2g}' == '1' else 'es'} a row"
