"""What all figures of reports are made of: the palette of roles, bars, empty axes, and the way into the page.

Every trace says in ``meta`` which role it plays; the page recolours the roles to the reader's theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tamis.report.wording import figure_text, one_line

__all__ = [
    "FRAME",
    "PALETTE",
    "ROW_HEIGHT",
    "Figure",
    "bare_figure",
    "bars",
    "categories",
    "line",
    "listed",
    "plain_spec",
]

ROW_HEIGHT, FRAME = 30, 64
_FEW_POINTS = 12

# role: (light, dark). The page's style sheet takes the same values; figures and swatches cannot drift apart.
PALETTE: Mapping[str, tuple[str, str]] = {
    "pool": ("#a9b1ba", "#67717d"),
    "selected": ("#0b6b63", "#45c1b0"),
    "target": ("#b86e00", "#f0b04f"),
    "ink": ("#1d232a", "#e8e6e1"),
    "quiet": ("#5a636e", "#a3abb5"),
    "line": ("#dfe2e0", "#333a42"),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with the words that must stand around it."""

    key: str
    title: str
    alt: str  # what it shows, for readers who cannot see it
    legend: tuple[tuple[str, str], ...]  # (role, label)
    height: int
    spec: dict[str, Any]  # Plotly's data and layout
    section: str = ""  # the part of a selection's page that it belongs to


def bars(labels: Sequence[str], values: Sequence[float], role: str, written: Sequence[str], what: str) -> go.Bar:
    """Horizontal bars, one a label, with the value written at the end."""
    return go.Bar(
        x=list(values),
        y=list(range(len(labels))),
        orientation="h",
        text=list(written),
        textposition="outside",
        cliponaxis=False,
        hovertext=[f"{figure_text(label, 60)}, {what}: {value}" for label, value in zip(labels, written, strict=True)],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"color": PALETTE[role][0], "line": {"width": 0}},
        meta=role,
    )


def line(
    x: Sequence[float],
    y: Sequence[float | None],
    role: str,
    name: str,
    *,
    dash: str = "solid",
    is_measured: bool = True,
) -> go.Scatter:
    """A line; few measured points are marked, because a single one would not be seen."""
    safe = figure_text(name, 46).replace("%", "&#37;")  # in a hover template ``%{`` begins a variable
    return go.Scatter(
        x=list(x),
        y=list(y),
        mode="lines+markers" if is_measured and len(y) <= _FEW_POINTS else "lines",
        line={"width": 2, "dash": dash, "color": PALETTE[role][0]},
        marker={"size": 7, "color": PALETTE[role][0]},
        hovertemplate=f"{safe}: %{{y:.4g}} at %{{x}}<extra></extra>",
        meta=role,
    )


def categories(figure: go.Figure, labels: Sequence[str]) -> None:
    """The first label on top, drawn as text whatever it looks like."""
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=[figure_text(label) for label in labels],
        range=[len(labels) - 0.45, -0.55],
        showgrid=False,
        automargin=True,
    )
    figure.update_layout(margin={"r": 72})


def listed(what: str, named: Iterable[tuple[str, str]]) -> str:
    """What bars show, as a sentence for readers who cannot see them: ``what`` and each name with its value."""
    return f"{what}: " + ", ".join(f"{one_line(name, 40)} {value}" for name, value in named) + "."


def bare_figure(traces: Sequence[Any], **layout: Any) -> go.Figure:
    """Axes without a title, a legend or a mode bar."""
    figure = go.Figure(data=list(traces))
    figure.update_layout(
        template="none",
        showlegend=False,
        margin={"l": 8, "r": 10, "t": 6, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13, "color": PALETTE["quiet"][0]},
        hoverlabel={"align": "left"},
        dragmode=False,
        **layout,
    )
    figure.update_xaxes(
        fixedrange=True, automargin=True, zeroline=False, gridcolor=PALETTE["line"][0], ticks="", tickangle=0
    )
    figure.update_yaxes(fixedrange=True, automargin=True, zeroline=False, gridcolor=PALETTE["line"][0], ticks="")
    figure.update_yaxes(ticklabelstandoff=6)
    return figure


def plain_spec(figure: go.Figure) -> dict[str, Any]:
    """Data and layout as plain Python, for the page to write as escaped JSON."""
    spec: dict[str, Any] = figure.to_plotly_json()
    spec["layout"].pop("template", None)
    return {"data": spec["data"], "layout": spec["layout"]}
