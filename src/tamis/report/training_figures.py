"""The pictures of a training run: forecasts, losses and choices over updates, sources, rows, cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from tamis.report.curves import Curve
from tamis.report.drawing import (
    FRAME,
    PALETTE,
    ROW_HEIGHT,
    Figure,
    bare_figure,
    bars,
    categories,
    line,
    listed,
    plain_spec,
)
from tamis.report.wording import count, number, one_line, percent

__all__ = ["choice_figure", "cost_figure", "forecast_figure", "loss_figure", "source_figure", "times_figure"]

# Of several curves in one picture: role and dash, told apart without colour.
_STYLES = (("selected", "solid"), ("target", "dash"), ("pool", "solid"), ("ink", "dot"), ("quiet", "dashdot"))
_DASHES = {"solid": "", "dash": ", dashed", "dot": ", dotted", "dashdot": ", dash and dot"}


def forecast_figure(pairs: npt.NDArray[np.float64]) -> Figure:
    """Predicted against realised drop of the target loss, (pairs, 2), and the line on which promises are kept."""
    predicted, realised = pairs.T.tolist()
    ends = [min(0.0, *predicted), max(0.0, *predicted)]
    marks = go.Scatter(
        x=predicted,
        y=realised,
        mode="markers",
        marker={"size": 9, "color": PALETTE["selected"][0], "line": {"width": 1, "color": PALETTE["selected"][0]}},
        opacity=0.75,
        hovertemplate="predicted %{x:.4g}, realised %{y:.4g}<extra></extra>",
        meta="selected",
    )
    figure = bare_figure([line(ends, ends, "target", "as promised", dash="dash", is_measured=False), marks])
    figure.update_xaxes(title={"text": "predicted drop of the target loss"}, nticks=6, zeroline=True)
    figure.update_yaxes(nticks=6, zeroline=True)
    return Figure(
        key="forecasts",
        title="Predicted and realised drop of the target loss",
        alt=f"{count(len(predicted))} log entries, predicted drop against realised drop.",
        legend=(("selected", "realised"), ("target line dash", "what was promised (dashed)")),
        height=320,
        spec=plain_spec(figure),
    )


def loss_figure(held_out: Sequence[Curve]) -> Figure:
    """The held-out target loss over updates, the mean over all targets first."""
    figure, legend = _curves(held_out[: len(_STYLES)])
    figure.update_yaxes(nticks=6)
    mean = held_out[0].values
    return Figure(
        key="held-out",
        title="Held-out target loss over updates",
        alt=f"From {number(mean[0])} to {number(mean[-1])}, lowest {number(min(mean))}.",
        legend=legend,
        height=280,
        spec=plain_spec(figure),
    )


def choice_figure(key: str, title: str, written: Callable[[float], str], curve: Curve) -> Figure:
    """One measure of the choices over updates."""
    figure, _ = _curves([curve])
    figure.update_yaxes(rangemode="tozero", nticks=5, **({"tickformat": ".0%"} if written is percent else {}))
    return Figure(
        key=key,
        title=title,
        alt=f"{title} over updates: {written(curve.values[0])} at first, {written(curve.values[-1])} at last.",
        legend=(),
        height=230,
        spec=plain_spec(figure),
    )


def source_figure(shares: Sequence[Curve]) -> Figure:
    """Share of the updates' weight by source over updates, the largest source first."""
    figure, legend = _curves(shares)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", nticks=5)
    top = shares[0]
    return Figure(
        key="sources",
        title="Share of the updates' weight by source",
        alt=f"Most weight is of {one_line(top.name, 60)}: {percent(top.values[-1])} at last.",
        legend=legend,
        height=280,
        spec=plain_spec(figure),
    )


def times_figure(times: Sequence[tuple[str, int]]) -> Figure:
    """How many rows were chosen how often."""
    named = [(label, count(rows)) for label, rows in times]
    return _bars("fate", "Rows by the times they were chosen", "rows", named, [rows for _, rows in times])


def cost_figure(parts: Sequence[tuple[str, float, str]]) -> Figure:
    """TFLOPs by what they were for: name, TFLOPs, share as it is written."""
    named = [(name, share) for name, _, share in parts]
    return _bars("cost", "TFLOPs by what they were for", "TFLOPs", named, [tflops for _, tflops, _ in parts])


def _bars(key: str, title: str, what: str, named: Sequence[tuple[str, str]], values: Sequence[float]) -> Figure:
    labels = [label for label, _ in named]
    figure = bare_figure([bars(labels, values, "selected", [written for _, written in named], what)])
    categories(figure, labels)
    figure.update_xaxes(rangemode="tozero", nticks=6)
    return Figure(
        key=key,
        title=title,
        alt=listed(title, named),
        legend=(),
        height=FRAME + ROW_HEIGHT * len(labels),
        spec=plain_spec(figure),
    )


def _curves(curves: Sequence[Curve]) -> tuple[go.Figure, tuple[tuple[str, str], ...]]:
    """A figure over updates, and its legend."""
    styled = list(zip(curves, _STYLES, strict=False))
    figure = bare_figure([line(c.steps, c.values, role, c.name, dash=dash) for c, (role, dash) in styled])
    figure.update_xaxes(title={"text": "update"}, rangemode="tozero", nticks=7)
    return figure, tuple((f"{role} line {dash}", one_line(c.name, 40) + _DASHES[dash]) for c, (role, dash) in styled)
