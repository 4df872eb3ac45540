"""Should one believe this selection? Each check looks at measured numbers and answers with one plain sentence.

The letters (a) to (g) tie thresholds to checks. Why these: on a pool of 17 sources inner products took answers of two
or three tokens whatever the target (a), random rows of the chosen sources did as well as the chosen ones (b), every
score took both rows of a pair of copies (c), and two scores with a rank correlation of .8 shared a fifth of their top
(f). Where exactly to warn is a matter of judgement. A check that cannot be made from a selection alone says so: it is
never reported as passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tamis.report.agreement import Agreement
from tamis.report.columns import Columns
from tamis.report.finding import SEVERITIES, Finding, Severity
from tamis.report.measures import RowCount, ScoreDistribution, SourceShare, TokenUse
from tamis.report.wording import count, counted, joined, number, one_line, percent
from tamis.types import IntArray

__all__ = ["ONE_SOURCE", "Evidence", "find", "is_clearly_above"]

LENGTH_RATIO = 2.0  # (a) mean supervised length below half or above twice the target's
ONE_SOURCE = 0.80  # (b) share of the selected rows
FORMAT_FLOOR_TOKENS = 4  # (d) median supervised tokens of the target: a letter or a word and the end mark
MISLEADING_SPEARMAN, MISLEADING_OVERLAP = 0.5, 0.5  # (f) high correlation beside low overlap of the top
TOKEN_DIFFERENCE = 0.10  # (g) tokens of the selection against tokens of the baselines: worth saying
TOKEN_RATIO = 1.2  # (g) mean tokens of a selected row over, or under, those of a pool row: worth a warning
SAME_CHOICE = 0.70  # overlap above which a baseline would have chosen almost the same
BAD_SHARE = 0.05  # truncated rows in the selection
FLAGGED_SHARE = 0.1  # flagged rows: about 5 % of clean data are

# Methods whose score estimates a change of the target loss, so that its sign means something.
_SIGNED_METHODS = frozenset({"tracin", "less", "loss-drop", "influence-function", "influence-distillation"})


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the checks look at."""

    columns: Columns
    method: str
    shortlist: str  # empty when none ran
    sources: Sequence[SourceShare]
    scores: Sequence[ScoreDistribution]
    agreements: Sequence[Agreement]
    tokens: Sequence[TokenUse]
    counts: Sequence[RowCount]
    target_group: IntArray
    target_supervised_tokens: IntArray
    run_warnings: Sequence[tuple[str, str]] = ()  # (title, sentence): what the run itself has to say

    def counted(self, key: str) -> RowCount:
        """The row count of that name."""
        return next(entry for entry in self.counts if entry.key == key)


def find(evidence: Evidence) -> tuple[Finding, ...]:
    """All findings, the gravest first; within a severity in the order of the checks."""
    findings = [finding for check in _CHECKS for finding in check(evidence)]
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def check_answer_length(evidence: Evidence) -> Iterator[Finding]:
    """(a) Mean supervised length of the selection against the target's, target by target."""
    columns = evidence.columns
    off: list[str] = []
    told: list[str] = []
    for index, name in enumerate(columns.target_names):
        target = evidence.target_supervised_tokens[evidence.target_group == index]
        picked = columns.selected & (columns.picked_for == index)
        if (columns.picked_for[columns.selected] < 0).all():
            picked = columns.selected  # a mean target: every row was picked for all of them
        if len(target) == 0 or not picked.any() or target.mean() == 0:
            continue
        mine, theirs = float(columns.supervised[picked].mean()), float(target.mean())
        means = f"{number(mine, 3)} supervised tokens a selected row, {number(theirs, 3)} a target row"
        (told if 1 / LENGTH_RATIO <= mine / theirs <= LENGTH_RATIO else off).append(f"{one_line(name, 40)}: {means}")
    if off:
        yield Finding(
            "answer-length",
            "warning",
            "The selected answers are not as long as the target's",
            f"{joined(off, 6)}. Length alone can move the loss, for better or worse.",
            "Look at the picture of lengths; the fair comparison is a random draw of the same lengths.",
        )
    elif told:
        title = "Answers are about as long as the target's"
        yield Finding("answer-length", "passed", title, f"{joined(told, 6)}.")


def check_one_source(evidence: Evidence) -> Iterator[Finding]:
    """(b) One source gives more than 80 per cent of the rows."""
    selected = int(evidence.columns.selected.sum())
    named = [share for share in evidence.sources if not share.is_rest]
    if not selected or not named:
        return
    if len(evidence.sources) == 1:
        sentence = "All pool rows have the same source, so the selection could not favour one."
        yield Finding("one-source", "passed", "The pool has one source only", sentence)
        return
    top = max(named, key=lambda share: share.selected_rows)
    told = (
        f"{one_line(top.name, 40)} gives {count(top.selected_rows)} of {counted(selected, 'selected row')} "
        f"({percent(top.selected_share)}); it is {percent(top.pool_share)} of the pool."
    )
    if top.selected_share > ONE_SOURCE and is_clearly_above(
        top.selected_share, top.pool_share, rows=selected, of=evidence.columns.num_rows
    ):
        if evidence.shortlist.startswith("sources:"):
            yield Finding(
                "one-source",
                "note",
                "Almost everything comes from one source",
                f"{told} Sources were chosen, and their rows at random.",
                "If that is too narrow, divide the source, or give several targets.",
            )
            return
        yield Finding(
            "one-source",
            "warning",
            "Almost everything comes from one source",
            f"{told} Most of the gain may be finding the source: random rows of it may do as well.",
            "The loss after training on a random draw from that source is not measured here; train on one of equal "
            "size and put it beside.",
        )
    elif top.selected_share > ONE_SOURCE:
        yield Finding("one-source", "passed", "The largest source is no larger than chance explains", told)
    else:
        yield Finding("one-source", "passed", "No source dominates", told)


def check_copies(evidence: Evidence) -> Iterator[Finding]:
    """(c) Exact pairs in the selection, and near pairs."""
    exact, near = evidence.counted("exact"), evidence.counted("near")
    if exact.selected:
        yield Finding(
            "exact-copies",
            "warning",
            "The selection holds exact copies",
            f"{counted(exact.selected, 'selected row')} with a copy of itself in the selection.",
            "Equal rows get equal scores, so they come in together; --duplicates one takes one copy of each.",
        )
    elif evidence.columns.selected.any():
        pool = f" In the pool: {counted(exact.pool, 'row')} with the text of an earlier one." if exact.pool else ""
        sentence = f"No two selected rows are equal.{pool}"
        yield Finding("exact-copies", "passed", "No exact copies inside", sentence)
    if near.selected:
        sentence = f"{counted(near.selected, 'selected row')} with a near copy in the selection (pairs below)."
        advice = "Select again with --duplicates near to take one of each."
        yield Finding("near-copies", "note", "Some selected rows are nearly the same", sentence, advice)


def check_format_floor(evidence: Evidence) -> Iterator[Finding]:
    """(d) The target's answers are so short that learning their format explains the gain."""
    medians = {}
    for index, name in enumerate(evidence.columns.target_names):
        tokens = evidence.target_supervised_tokens[evidence.target_group == index]
        if len(tokens):
            medians[one_line(name, 40)] = float(np.median(tokens))
    short = [
        f"{name} (median {number(median, 3)} supervised tokens)"
        for name, median in medians.items()
        if median <= FORMAT_FLOOR_TOKENS
    ]
    if short:
        yield Finding(
            "format-floor",
            "warning",
            "The target's answers are very short",
            f"{joined(short, 6)}: a model that learns only the form of the answer and guesses its content already "
            "reaches most of any gain in loss.",
            "Judge by accuracy against chance, not by loss alone; compare with the pool's shortest answers.",
        )
    elif medians:
        told = joined([f"{name} {number(median, 3)}" for name, median in medians.items()], 6)
        sentence = f"Median supervised tokens of a target row: {told}."
        yield Finding("format-floor", "passed", "Target answers are long enough to judge", sentence)


def check_against_uniform(evidence: Evidence) -> Iterator[Finding]:
    """(e) Difference to uniform against the spread of its draws: needs training runs, which a selection has not."""
    draws = next((entry.draws for entry in evidence.agreements if entry.name == "uniform"), 0)
    drawn = f" The {draws} uniform draws of this report are choices of rows, not trained models." if draws else ""
    yield Finding(
        "beats-uniform",
        "unmeasured",
        "Whether training on it beats a random draw",
        "Not measured here: a selection alone has no held-out loss. A difference to uniform counts only if it is "
        f"larger than the spread between uniform draws.{drawn}",
        "Run a comparison: train on this selection, on at least four uniform draws of the same size, and on plain data "
        "for as much compute as the scoring cost.",
    )


def check_agreement(evidence: Evidence) -> Iterator[Finding]:
    """A baseline that finds almost the same rows, and (f) rank correlation that hides a different top."""
    judged = [entry for entry in evidence.agreements if entry.name not in ("uniform", evidence.method)]
    if not judged or not evidence.columns.selected.any():
        return
    columns = evidence.columns
    different = len(np.unique(columns.first_copy()[columns.selected]))  # copies are one row, as in the overlap
    alike = [entry for entry in judged if entry.overlap > SAME_CHOICE]
    same = [e for e in alike if is_clearly_above(e.overlap, e.chance, rows=different, of=columns.num_rows)]
    for entry in same:
        baseline = _baseline(entry.name)
        shortlisted = evidence.shortlist.startswith(entry.name)
        reason = " (the shortlist came from the same score, which raises this)" if shortlisted else ""
        yield Finding(
            f"same-as-{entry.name}",
            "warning",
            f"{baseline[:1].upper()}{baseline[1:]} would have found almost the same",
            f"{percent(entry.overlap)} of the selected rows are also in the choice of {baseline}{reason}, at next to "
            f"no cost. By chance it would be {percent(entry.chance)}.",
            "Unless the rest matters, the cheap score is the better buy.",
        )
    if alike and not same:
        told = joined(
            [f"{_baseline(entry.name)} {percent(entry.overlap)} ({percent(entry.chance)})" for entry in alike], 6
        )
        yield Finding(
            "agreement",
            "unmeasured",
            "Whether a cheap baseline finds the same rows",
            f"Not measurable at this budget: a blind draw of as many rows would share about as much. Shared "
            f"with {told}; by chance in brackets.",
        )
    elif not same:
        best = max(judged, key=lambda entry: entry.overlap)
        yield Finding(
            "agreement",
            "passed",
            "No cheap baseline finds the same rows",
            f"The closest is {_baseline(best.name)}: it shares {percent(best.overlap)} of the selected rows (chance: "
            f"{percent(best.chance)}). Different is not better: that takes a comparison.",
        )
    misleading = [
        f"{_baseline(entry.name)} (Spearman {number(entry.spearman, 2)} over all rows; {percent(entry.overlap)} of the "
        "selected rows are also its choice)"
        for entry in judged
        if entry.spearman is not None and entry.spearman >= MISLEADING_SPEARMAN and entry.overlap < MISLEADING_OVERLAP
    ]
    if misleading:
        yield Finding(
            "correlation",
            "warning",
            "Rank correlation would mislead here",
            f"The score ranks the pool much like {joined(misleading)}, and still chooses other rows.",
            "Only the top is trained on: read the overlap.",
        )


def check_tokens(evidence: Evidence) -> Iterator[Finding]:
    """(g) Equal rows are not equal tokens: a warning where the selected rows are longer or shorter than the pool's."""
    mine, others = evidence.tokens[0], evidence.tokens[1:]
    if not mine.tokens or not others:
        return
    off = [
        f"{one_line(other.name, 40)} {count(other.tokens)} ({_signed(other.tokens / mine.tokens - 1)})"
        for other in others
        if abs(other.tokens - mine.tokens) > TOKEN_DIFFERENCE * mine.tokens
    ]
    columns = evidence.columns
    chosen, pool = columns.tokens[columns.selected], columns.tokens
    mean, expected = float(chosen.mean()), float(pool.mean())
    told = f"One pass over the selection is {count(mine.tokens)} tokens ({count(mine.supervised)} of them supervised)"
    if off:
        noise = 2 * float(pool.std()) * _spread(len(chosen), len(pool)) / len(chosen) ** 0.5
        matters = not 1 / TOKEN_RATIO <= mean / expected <= TOKEN_RATIO and abs(mean - expected) > noise
        yield Finding(
            "tokens",
            "warning" if matters else "note",
            "Equal rows are not equal tokens",
            f"A selected row has {number(mean, 3)} tokens, a pool row {number(expected, 3)} (means). {told}; over the "
            f"baselines' choice at the same budget: {joined(off, 6)}.",
            "Compare methods at equal tokens, or state the difference.",
        )
    else:
        sentence = f"{told}; every baseline is within {percent(TOKEN_DIFFERENCE)}."
        yield Finding("tokens", "passed", "The baselines train on as many tokens", sentence)


def check_scores(evidence: Evidence) -> Iterator[Finding]:
    """Scores that cannot rank, that predict harm, or that are missing."""
    columns = evidence.columns
    constant = [one_line(entry.name, 40) for entry in evidence.scores if entry.is_constant]
    if constant:
        severity: Severity = "note" if evidence.method == "uniform" else "warning"
        sentence = f"The score says nothing about {joined(constant)}: every row has the same."
        yield Finding("constant-score", severity, "All scores are equal", sentence)
    harmful = int((columns.selected & (columns.score_picked_by() <= 0)).sum())
    if harmful and evidence.method == "adamw-influence":  # scores of a run nearly sum to zero, whatever it did
        yield Finding(
            "negative-score",
            "note",
            "Rows were selected that did less than others",
            f"{counted(harmful, 'selected row')} with a score of zero or below: in the reference run they did less for "
            "the target than their share.",
            "A smaller budget would leave them out.",
        )
    elif harmful and evidence.method in _SIGNED_METHODS:
        yield Finding(
            "negative-score",
            "warning",
            "Rows were selected that the method expects to be of no help",
            f"{counted(harmful, 'selected row')} with a score of zero or below: by the method's own estimate training "
            "on such a row does not lower the target loss.",
            "A smaller budget would leave them out.",
        )
    unscored, unsupervised = evidence.counted("unscored"), evidence.counted("unsupervised")
    if unscored.selected:
        sentence = f"{counted(unscored.selected, 'selected row')} without a score, so not chosen on merit."
        yield Finding("unscored-selected", "warning", "Selected without a score", sentence)
    if unscored.pool:
        why = f", {count(unsupervised.pool)} of them because no token carries loss" if unsupervised.pool else ""
        by = f" The shortlist ({one_line(evidence.shortlist, 40)}) decided which." if evidence.shortlist else ""
        sentence = f"{count(unscored.pool)} of {counted(columns.num_rows, 'pool row')} without a score{why}.{by}"
        yield Finding("unscored", "note", "Not every row was scored", sentence)
    if not columns.selected.any():
        yield Finding("nothing-selected", "warning", "Nothing was selected", "The selection holds no row.")


def check_rows(evidence: Evidence) -> Iterator[Finding]:
    """Suspicious answers, leaks, truncated rows."""
    selected = int(evidence.columns.selected.sum())
    flagged, leaked, truncated = (evidence.counted(key) for key in ("flagged", "leaked", "truncated"))
    if flagged.selected:
        yield Finding(
            "flagged",
            "warning" if flagged.selected > FLAGGED_SHARE * selected else "note",
            "Some selected answers look wrong",
            f"The model finds {count(flagged.selected)} of {counted(selected, 'selected answer')} unusually hard among "
            f"their like ({count(flagged.pool)} in the pool). Some of them may be wrong answers; a few per cent "
            "are found hard even where none is wrong.",
            "Read the ones shown below before training; --drop-flagged leaves them out.",
        )
    if leaked.pool:
        told = f"Pool rows that equal a target row: {count(leaked.pool)}, selected: {count(leaked.selected)}."
        yield Finding(
            "leaked",
            "warning" if leaked.selected else "note",
            "Target rows are in the pool",
            f"{told} A loss measured on the target rows would be flattered." if leaked.selected else told,
            "Select again with --drop-leaks, and measure on held-out rows only." if leaked.selected else "",
        )
    if truncated.pool:
        yield Finding(
            "truncated",
            "warning" if truncated.selected > BAD_SHARE * selected else "note",
            "Some rows were cut at the length limit",
            f"Longer than the limit: {counted(truncated.pool, 'pool row')}, selected: {count(truncated.selected)}. "
            "What was cut off was not scored and would not be learnt.",
            "Raise --max-length if the ends matter." if truncated.selected else "",
        )
    clean = [entry.label.lower() for entry in (flagged, leaked, truncated) if not entry.pool]
    if clean:
        sentence = f"Looked for and not found in the pool: {joined(clean)}."
        yield Finding("clean-rows", "passed", "Row checks that found nothing", sentence)


def check_run(evidence: Evidence) -> Iterator[Finding]:
    """What the method and the choice had to say."""
    for index, (title, sentence) in enumerate(evidence.run_warnings):
        yield Finding(f"run-{index}", "warning", title, one_line(sentence, 600))


_CHECKS: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    check_run,
    check_scores,
    check_answer_length,
    check_one_source,
    check_copies,
    check_format_floor,
    check_agreement,
    check_tokens,
    check_rows,
    check_against_uniform,
)


def is_clearly_above(share: float, chance: float, *, rows: int, of: int) -> bool:
    """Whether ``share`` of ``rows`` drawn from ``of`` is more than chance, and enough more to mean something.

    By more than two standard deviations of a blind draw, and with at most half of what would by chance be left over:
    95 % where 90 % is expected tells nothing new, however many rows there are.
    """
    deviation = (chance * (1 - chance) / rows) ** 0.5 * _spread(rows, of)
    return share - chance > 2 * deviation and 1 - share <= (1 - chance) / 2


def _spread(rows: int, of: int) -> float:
    """What drawing without replacement leaves of the standard deviation of a mean."""
    return ((of - rows) / (of - 1)) ** 0.5 if of > 1 else 0.0


def _baseline(name: str) -> str:
    return {"bm25": "BM25 (shared words)", "length": "answer length"}.get(name, one_line(name, 40))


def _signed(share: float) -> str:
    return f"{'+' if share > 0 else '−'}{percent(abs(share))}"
