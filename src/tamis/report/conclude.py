"""The verdict in words: does selecting pay at equal cost, by how much, may that be chance, what to run next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from tamis.comparison.result import Conclusion, SelectionFacts
from tamis.comparison.verdict import LEVEL, Difference, Standing
from tamis.report.warnings import ONE_SOURCE, is_clearly_above
from tamis.report.wording import counted, joined, number, percent

__all__ = ["conclude", "mean_text", "p_text"]

_TOKEN_DIFFERENCE = 0.10  # tokens that training went through, against uniform: worth saying
_MOST_SEEDS = 30  # beyond so many, more seeds are not the answer


def conclude(
    standings: Sequence[Standing],
    differences: Sequence[Difference],
    selections: Sequence[SelectionFacts],
    *,
    budget: str,
    metric: str,
    seeds: int,
    held_out_rows: int,
    warnings: Sequence[str] = (),
) -> Conclusion:
    """What the runs at ``budget`` say. ``warnings`` are what is known to be wrong with the data."""
    own = {standing.name: standing for standing in standings if standing.budget == budget}
    if metric == "exact-match" and all(standing.mean == 0 for standing in own.values()):
        warnings = [
            "No contender wrote a single right answer, so this metric tells nothing apart. Read what they wrote "
            "(records/*.json, answers), then set --answer-pattern or --answer-tokens, or use --metric loss.",
            *warnings,
        ]
    named = [standing for standing in own.values() if not standing.is_baseline]
    here = [difference for difference in differences if difference.budget == budget]
    found = [*warnings, *_warnings(own, here, [s for s in selections if s.budget == budget])]
    if not named:
        best = next(iter(own.values()))  # standings come best first
        return Conclusion(
            title=f"{best.name} has the best mean of the baselines",
            sentence=f"{best.name}: {metric} {mean_text(best)}. No method was named beside the baselines, which bm25, "
            "length, uniform and full always are, so no difference is tested.",
            next_steps=("Name another method to hold against the baselines: --methods tracin.",),
            warnings=tuple(found),
        )
    best = named[0]
    key = next(d for d in here if d.contender == best.name and d.against == "full at equal cost")
    untouched = next((standing for standing in own.values() if standing.kind == "untouched"), None)
    if untouched is not None and _is_better(untouched, best, metric):
        return Conclusion(
            title=f"Training made the model worse: as it was, {metric} {number(untouched.mean)}; after {best.name}, "
            f"{number(best.mean)}",
            sentence=_sentence(best, own, key, metric),
            next_steps=(
                "Do not train on any of this yet: try a lower --learning-rate or fewer --epochs first, and look at the "
                "loss mask and the chat template (tamis doctor). Runs that harm cannot tell which data are better.",
            ),
            warnings=tuple(found),
        )
    return Conclusion(
        title=_title(best.name, key),
        sentence=_sentence(best, own, key, metric),
        next_steps=tuple(_next_steps(best, here, key, seeds, held_out_rows)),
        warnings=tuple(found),
    )


def mean_text(standing: Standing) -> str:
    """Mean and standard deviation over runs."""
    spread = "" if standing.std is None else f" ± {number(standing.std, 2)}"
    return f"{number(standing.mean)}{spread}"


# What makes a score cheaper, of a selection and of an online method.
_CHEAPER = (
    "Make its score cheaper (--methods bm25:5x+METHOD scores five times the budget only), let one pass serve several "
    "targets",
    "Make its score cheaper (--methods online:METHOD@sources:K scores a few rows of each source, fewer the larger K)",
)


def p_text(p: float | None) -> str:
    """A p-value as a person reads it."""
    if p is None:
        return "not known"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _is_better(one: Standing, other: Standing, metric: str) -> bool:
    return one.mean < other.mean if metric == "loss" else one.mean > other.mean


def _title(name: str, key: Difference) -> str:
    if key.gain == 0:
        return f"{name} and training on everything end level at equal cost"
    size = number(abs(key.gain), 3) if key.relative is None else percent(abs(key.relative))
    if key.is_sure:
        if key.gain > 0:
            return f"{name} beats training on everything at equal cost, by {size}"
        return f"At equal cost, training on everything beats {name}, by {size}"
    direction = "ahead of" if key.gain > 0 else "behind"
    if key.p is None:
        chance = f"; {'one run' if key.seeds_p is None else 'one held-out row'} cannot exclude chance"
    else:
        chance = ", which chance could explain"
    return f"{name} is {direction} training on everything at equal cost by {size}{chance}"


def _sentence(best: Standing, own: dict[str, Standing], key: Difference, metric: str) -> str:
    opponent = own[key.opponent]
    better = "lower" if metric == "loss" else "higher"
    said = (
        f"Held-out {metric} ({better} is better): {best.name}, the best of the methods named, {mean_text(best)} over "
        f"{counted(len(best.values), 'run')} of {counted(best.steps, 'update')}; {opponent.name} {mean_text(opponent)} "
        f"with {counted(opponent.steps, 'update')}. "
    )
    said += f"p = {p_text(key.seeds_p)} over seeds and {p_text(key.rows_p)} over held-out rows, adjusted for all tests."
    first = next(iter(own.values()))
    if first.name != best.name:
        said += f" Best of all contenders: {first.name}, {mean_text(first)}."
    return said


def _next_steps(
    best: Standing,
    here: Sequence[Difference],
    key: Difference,
    seeds: int,
    held_out_rows: int,
) -> list[str]:
    against = {d.against: d for d in here if d.contender == best.name}
    steps = []
    one_row = key.over_rows.p is None
    if (one_row or (key.rows_p is not None and key.rows_p >= LEVEL)) and held_out_rows < 200:
        why = "one cannot show chance" if one_row else "the rows disagree with each other"
        steps.append(f"Give more held-out rows by --eval (there {_are(held_out_rows)}): {why}.")
    equal_runs = key.over_seeds.std == 0  # as shares of right answers may be; then each further run halves p
    if not one_row and equal_runs and key.gain and key.seeds_p is not None and key.seeds_p >= LEVEL:
        steps.append(
            f"Run the same command with --seeds {seeds + 3}: all {seeds} differ by the same amount, which so few runs "
            "may do by chance."
        )
    elif not one_row and (key.seeds_p is None or (key.seeds_p >= LEVEL and key.over_seeds.std)):
        needed = None if key.over_seeds.std is None else _seeds_needed(key, tests=len(here))
        if needed is None:
            steps.append("Run the same command with --seeds 5: the finished run is kept, and one cannot show chance.")
        elif needed <= _MOST_SEEDS:
            steps.append(
                f"Run the same command with --seeds {max(needed, seeds + 1)}: the finished runs are kept, and about so "
                "many would show a difference of this size."
            )
        else:
            steps.append(
                f"More seeds will hardly decide it: a difference this small beside its spread would need over "
                f"{_MOST_SEEDS}. Take the cheaper of the two."
            )
    equal_updates = against.get("full") or key
    if key.gain < 0 < equal_updates.gain and key.opponent != "full":
        shown = "" if equal_updates.is_sure else ", if at all (chance could explain that too)"
        steps.append(
            f"{best.name} is ahead only while updates are limited{shown}. {_CHEAPER[best.kind == 'online']}, or spend "
            "the cost on longer training."
        )
    lexical = against.get("bm25")
    if lexical is not None and not (lexical.is_sure and lexical.gain > 0):
        steps.append(f"bm25 costs no model pass and is not shown to be worse than {best.name}: it may be all you need.")
    if key.is_sure and key.gain > 0:
        steps.append(
            f"Train like that: tamis train, with the settings that online/{best.keys[0]}/run.yaml has."
            if best.kind == "online"
            else "Train on that selection: its selected.jsonl lies in the folder named below under Selections."
        )
    return steps


def _are(rows: int) -> str:
    return "is one" if rows == 1 else f"are {rows}"


def _seeds_needed(key: Difference, *, tests: int) -> int:
    """Seeds at which a paired t-test finds the difference as it was seen, four times out of five.

    At the level that Holm's correction asks of the first of ``tests``.
    """
    assert key.over_seeds.std is not None
    for count in range(2, _MOST_SEEDS + 1):
        wanted = stats.t.ppf(1 - LEVEL / (2 * tests), count - 1) + stats.t.ppf(0.8, count - 1)
        if abs(key.gain) * math.sqrt(count) >= wanted * key.over_seeds.std:
            return count
    return _MOST_SEEDS + 1


def _warnings(own: dict[str, Standing], here: Sequence[Difference], selections: Sequence[SelectionFacts]) -> list[str]:
    found = []
    uniform = own.get("uniform")
    if uniform is not None and uniform.std:
        found += [
            f"{difference.contender}: the difference to uniform ({number(difference.gain, 3)}) is smaller than the "
            f"spread of uniform's own draws (a standard deviation of {number(uniform.std, 2)})."
            for difference in here
            if difference.against == "uniform" and abs(difference.gain) < uniform.std
        ]
    for facts in selections:
        beside = next((d for d in here if d.contender == facts.name and d.against == "same sources"), None)
        tells = facts.largest_share > ONE_SOURCE and is_clearly_above(
            facts.largest_share, facts.pool_share, rows=facts.rows, of=facts.pool_rows
        )
        if tells and not own[facts.name].is_baseline:
            drawn = (
                f" Random rows of the same sources reach {mean_text(own[beside.opponent])}, {facts.name} "
                f"{mean_text(own[facts.name])}: what lies between them is all that the rows' scores add."
                if beside is not None
                else ""
            )
            found.append(
                f"{facts.name}: {percent(facts.largest_share)} of its rows come from one source "
                f"('{facts.largest_source}'), which is {percent(facts.pool_share)} of the pool.{drawn}"
            )
    if uniform is not None and uniform.tokens:
        seen = {
            standing.name: (standing.tokens / standing.steps) / (uniform.tokens / uniform.steps)
            for standing in own.values()
            if standing.kind == "selected" and standing.steps
        }
        off = [f"{name} {percent(ratio)}" for name, ratio in seen.items() if abs(ratio - 1) > _TOKEN_DIFFERENCE]
        if off:
            found.append(f"Equal updates are not equal tokens. Of what an update of uniform sees: {joined(off, 12)}.")
    return found
