"""Figures of a training run's report, in the drawing of all reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from tamis.report.curves import Curve
from tamis.report.drawing import FRAME, PALETTE, ROW_HEIGHT, Figure, bare_figure, bars, categories, plain_spec
from tamis.report.training import TrainingContent
from tamis.report.wording import count, figure_text, number, one_line, percent

__all__ = ["draw"]

# Of several curves in one picture: role and dash, told apart without colour.
_STYLES = (("selected", "solid"), ("target", "dash"), ("pool", "solid"), ("ink", "dot"), ("quiet", "dashdot"))
_DASHES = {"solid": "", "dash": ", dashed", "dot": ", dotted", "dashdot": ", dash and dot"}


def draw(content: TrainingContent) -> tuple[Figure, ...]:
    """All figures that the content has numbers for."""
    figures = []
    if len(content.forecasts):
        figures.append(_forecasts(content))
    if content.held_out:
        figures.append(_held_out(content))
    for key, title, axis, curve in (
        ("aligned", "Candidates that point towards the target", "share", content.aligned),
        ("effective", "Effective number of candidates", "candidates", content.effective),
        ("target-seen", "Distinct target rows looked at", "rows", content.target_seen),
    ):
        if curve.values:
            figures.append(_single(key, title, axis, curve))
    if content.sources:
        figures.append(_sources(content.sources))
    figures.append(_times_chosen(content.times_chosen))
    if content.parts:
        figures.append(_cost(content))
    return tuple(figures)


def _forecasts(content: TrainingContent) -> Figure:
    predicted, realised = content.forecasts.T.tolist()
    low, high = min(0.0, *predicted), max(0.0, *predicted)
    marks = go.Scatter(
        x=predicted,
        y=realised,
        mode="markers",
        marker={"size": 9, "color": PALETTE["selected"][0], "line": {"width": 1, "color": PALETTE["selected"][0]}},
        opacity=0.75,
        hovertemplate="predicted %{x:.4g}, realised %{y:.4g}<extra></extra>",
        meta="selected",
    )
    line = _line([low, high], [low, high], "target", "dash", "as promised")
    figure = bare_figure([line, marks])
    figure.update_xaxes(title={"text": "predicted drop of the target loss"}, nticks=6, zeroline=True)
    figure.update_yaxes(nticks=6, zeroline=True)
    return Figure(
        key="forecasts",
        section="forecasts",
        title="Predicted and realised drop of the target loss",
        alt=f"{count(len(predicted))} log entries, predicted drop against realised drop.",
        legend=(("selected", "realised"), ("target", "what was promised (dashed)")),
        height=320,
        spec=plain_spec(figure),
    )


def _held_out(content: TrainingContent) -> Figure:
    shown = content.held_out[: len(_STYLES)]
    figure = _curves(shown)
    figure.update_yaxes(nticks=6)
    mean = shown[0]
    return Figure(
        key="held-out",
        section="loss",
        title="Held-out target loss over updates",
        alt=f"From {number(mean.values[0])} to {number(mean.values[-1])}, lowest {number(min(mean.values))}.",
        legend=_legend(shown),
        height=280,
        spec=plain_spec(figure),
    )


def _single(key: str, title: str, axis: str, curve: Curve) -> Figure:
    figure = _curves([curve])
    figure.update_yaxes(rangemode="tozero", nticks=5, **({"tickformat": ".0%"} if axis == "share" else {}))
    ends = [percent(value) if axis == "share" else number(value, 3) for value in (curve.values[0], curve.values[-1])]
    return Figure(
        key=key,
        section="choices",
        title=title,
        alt=f"{title} over updates: {ends[0]} at first, {ends[1]} at last.",
        legend=(),
        height=230,
        spec=plain_spec(figure),
    )


def _sources(sources: Sequence[Curve]) -> Figure:
    figure = _curves(sources)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", nticks=5)
    top = sources[0]
    return Figure(
        key="sources",
        section="sources",
        title="Share of the updates' weight by source",
        alt=f"Most weight is of {one_line(top.name, 60)}: {percent(top.values[-1])} at last.",
        legend=_legend(sources),
        height=280,
        spec=plain_spec(figure),
    )


def _times_chosen(times: Sequence[tuple[str, int]]) -> Figure:
    labels = [label for label, _ in times]
    figure = bare_figure([bars(labels, [rows for _, rows in times], "selected", [count(r) for _, r in times], "rows")])
    categories(figure, labels)
    figure.update_xaxes(rangemode="tozero", nticks=6)
    return Figure(
        key="fate",
        section="fate",
        title="Rows by the times they were chosen",
        alt="Rows chosen " + ", ".join(f"{label}: {count(rows)}" for label, rows in times) + ".",
        legend=(),
        height=FRAME + ROW_HEIGHT * len(labels),
        spec=plain_spec(figure),
    )


def _cost(content: TrainingContent) -> Figure:
    labels = [part.name for part in content.parts]
    values = [part.tflops for part in content.parts]
    figure = bare_figure([bars(labels, values, "selected", [percent(part.share) for part in content.parts], "TFLOPs")])
    categories(figure, labels)
    figure.update_xaxes(rangemode="tozero", nticks=6)
    return Figure(
        key="cost",
        section="cost",
        title="TFLOPs by what they were for",
        alt="Operations: " + ", ".join(f"{part.name} {percent(part.share)}" for part in content.parts) + ".",
        legend=(),
        height=FRAME + ROW_HEIGHT * len(labels),
        spec=plain_spec(figure),
    )


def _curves(curves: Sequence[Curve]) -> Any:
    traces = [
        _line(curve.steps, curve.values, role, dash, figure_text(curve.name, 40))
        for curve, (role, dash) in zip(curves, _STYLES, strict=False)
    ]
    figure = bare_figure(traces)
    figure.update_xaxes(title={"text": "update"}, rangemode="tozero", nticks=7)
    return figure


def _line(x: Sequence[float], y: Sequence[float], role: str, dash: str, name: str) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=list(y),
        mode="lines",
        line={"width": 2, "dash": dash, "color": PALETTE[role][0]},
        hovertemplate=f"{name}: %{{y:.4g}} at %{{x}}<extra></extra>",
        meta=role,
    )


def _legend(curves: Sequence[Curve]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (role, one_line(curve.name, 40) + _DASHES[dash]) for curve, (role, dash) in zip(curves, _STYLES, strict=False)
    )
