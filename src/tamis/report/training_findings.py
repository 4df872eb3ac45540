"""Whether a training run's choices worked, as far as its own log can tell: a sentence for every check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tamis.online.account import fallback_share, forecast_correlation, forecast_pairs
from tamis.report.curves import Curve, steps_of
from tamis.report.finding import SEVERITIES, Finding, Severity
from tamis.report.wording import count, counted, number, one_line, percent

__all__ = ["find", "held_out_losses", "lost_at"]

_HOLDS, _LOOSE = 0.7, 0.3  # correlations from which forecasts are believed, and half believed
_FEW_PAIRS = 8
_FEW_TARGET_ROWS = 16  # a judgement: weights solved for few target rows lower their loss more than that of others


def find(
    log: Sequence[Mapping[str, Any]], *, method: str, is_finished: bool, warnings: Sequence[str]
) -> tuple[Finding, ...]:
    """One finding for each check that has something to look at; warnings first."""
    found = [
        *_unfinished(is_finished),
        _forecasts(log, method),
        _held_out(log),
        *_target_rows(log),
        *_fallbacks(log),
        *(
            Finding(key="run", severity="warning", title="Said by the run", sentence=one_line(text, 600))
            for text in warnings
        ),
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def held_out_losses(log: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    """The mean over all targets first, then each of several; before the run, on the way and after it."""
    names = sorted({key for entry in log for key in entry if key == "eval_loss" or key.startswith("eval_loss/")})
    curves = []
    for key in names:
        steps, values = steps_of(log, key)
        last, final = steps_of(log, f"final_{key}")
        if last and (not steps or last[-1] != steps[-1] or final[-1] != values[-1]):
            steps, values = (*steps, last[-1]), (*values, final[-1])
        if not steps:
            continue
        title = key.removeprefix("eval_loss").removeprefix("/") or "all targets"
        curves.append(Curve(name=one_line(title, 60), steps=steps, values=values))
    return tuple(curves)


def lost_at(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The first update after which a held-out loss was measured and was not finite, which the log holds as null."""
    names = ("eval_loss", "final_eval_loss")
    steps = [int(e["step"]) for e in log if any(name in e and e[name] is None for name in names)]
    return min(steps, default=None)


def _unfinished(is_finished: bool) -> list[Finding]:
    if is_finished:
        return []
    return [
        Finding(
            key="unfinished", severity="note", title="The run is not finished",
            sentence="The page shows what was logged so far; costs are counted at the end.",
        )
    ]  # fmt: skip


def _forecasts(log: Sequence[Mapping[str, Any]], method: str) -> Finding:
    title = "Do choices do what they promise?"
    correlation, pairs = forecast_correlation(log)
    if correlation is None:
        why = f"There {'is' if pairs == 1 else 'are'} {counted(pairs, 'comparison')} of forecast and outcome."
        advice = "Give --forecast-every, and train longer, for a few dozen."
        if method in ("uniform", "full"):
            why, advice = f"The method {method} looks at no target and promises nothing.", ""
        return Finding(key="forecasts", severity="unmeasured", title=title, sentence=why, advice=advice)
    forecasts = forecast_pairs(log)
    predicted, realised = forecasts.mean(axis=0)
    same = float((np.sign(forecasts[:, 0]) == np.sign(forecasts[:, 1])).mean())
    said = (
        f"Over {counted(pairs, 'comparison')} the predicted and the realised drop of the target loss correlate at "
        f"{correlation:.2f}; they have the same sign in {percent(same)}. The mean forecast is {number(predicted, 2)}, "
        f"the mean outcome {number(realised, 2)}."
    )
    if pairs < _FEW_PAIRS:
        return Finding(key="forecasts", severity="note", title=title, sentence=f"{said} That is too few to judge by.")
    if correlation >= _HOLDS:
        return Finding(key="forecasts", severity="passed", title=title, sentence=f"Yes. {said}")
    if correlation >= _LOOSE:
        return Finding(key="forecasts", severity="note", title=title, sentence=f"Loosely. {said}")
    return Finding(
        key="forecasts", severity="warning", title=title, sentence=f"No. {said}",
        advice="The choice follows noise here: try a lower rate, more target rows, or a method that keeps all "
        "candidates, and compare with full.",
    )  # fmt: skip


def _held_out(log: Sequence[Mapping[str, Any]]) -> Finding:
    title = "Did the target loss fall on rows that only measure?"
    lost, held_out = lost_at(log), held_out_losses(log)
    if lost is not None:
        return Finding(
            key="held-out", severity="warning", title=title,
            sentence=f"No. The loss was not finite after update {count(lost)}, so figures leave it out.",
            advice="Training has diverged, or a row overflows: lower the rate, or clip with --clip.",
        )  # fmt: skip
    if not held_out or len(held_out[0].values) < 2:
        return Finding(key="held-out", severity="unmeasured", title=title, sentence="No row was held out.",
                       advice="Give --eval, or --held-out above 0.")  # fmt: skip
    curve = held_out[0]
    first, last, best = curve.values[0], curve.values[-1], min(curve.values)
    at = curve.steps[curve.values.index(best)]
    said = f"From {number(first)} to {number(last)}; the lowest was {number(best)}, after update {count(at)}."
    if last >= first:
        return Finding(key="held-out", severity="warning", title=title, sentence=f"No. {said}",
                       advice="Lower the rate, or stop early with --eval-steps and --patience.")  # fmt: skip
    if last - best > 0.1 * (first - best):
        return Finding(key="held-out", severity="warning", title=title, sentence=f"It fell, and rose again. {said}",
                       advice="Stop early with --eval-steps and --patience.")  # fmt: skip
    sentence = f"Yes. {said} Whether choosing did it, only a run with --method full or uniform tells."
    return Finding(key="held-out", severity="passed", title=title, sentence=sentence)


def _target_rows(log: Sequence[Mapping[str, Any]]) -> list[Finding]:
    _, seen = steps_of(log, "selection/target_rows_seen")
    if not seen:
        return []
    rows = int(seen[-1])
    severity: Severity = "passed"
    advice = ""
    if rows < _FEW_TARGET_ROWS:
        severity, advice = "warning", "Choices may fit these very rows; give more, or prefer anchored or tilt."
    return [
        Finding(key="target-rows", severity=severity, title="Distinct target rows", advice=advice,
                sentence=f"Choices looked at {counted(rows, 'distinct target row')} in all.")
    ]  # fmt: skip


def _fallbacks(log: Sequence[Mapping[str, Any]]) -> list[Finding]:
    share = fallback_share(log)
    if share == 0:
        return []
    return [
        Finding(
            key="fallbacks", severity="warning" if share > 0.2 else "note", title="Choices that could not be made",
            sentence=f"In {percent(share)} of the choices nothing pointed towards the target, or a solver failed, so "
            "weights were equal.",
        )
    ]  # fmt: skip
