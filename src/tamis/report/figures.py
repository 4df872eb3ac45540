"""Plotly figures from the report's numbers: binned arrays in, one figure each, no colour decided for good.

Every trace says in ``meta`` which role it plays; the page recolours the roles to the reader's theme. Category axes use
positions and ready labels, so that a source called "2020" or "<b>" is drawn as it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, pairwise

import plotly.graph_objects as go

from tamis.report.agreement import Agreement
from tamis.report.content import ReportContent
from tamis.report.drawing import FRAME, PALETTE, ROW_HEIGHT, Figure, bare_figure, bars, categories, listed, plain_spec
from tamis.report.measures import CostStage, LengthGroup, ScoreDistribution, SourceShare, TokenUse
from tamis.report.wording import count, figure_text, number, one_line, percent, seconds

__all__ = ["PALETTE", "Figure", "draw"]

_TARGET_DASHES = {
    "solid": "solid",
    "dash": "dashed",
    "dot": "dotted",
    "dashdot": "dash and dot",
    "longdash": "long dashes",
    "longdashdot": "long dash and dot",
}
_MAX_BARS = 14


def draw(content: ReportContent) -> tuple[Figure, ...]:
    """All figures that the content has numbers for."""
    figures = [
        _score_figure(index, distribution)
        for index, distribution in enumerate(content.scores[: content.max_drawn])
        if distribution.edges
    ]
    figures += [_source_figure(content.sources), _length_figure(content.length_edges, content.lengths)]
    if content.agreements:
        figures.append(_overlap_figure(content.agreements))
        if any(entry.spearman is not None for entry in content.agreements):
            figures.append(_spearman_figure(content.agreements))
    figures.append(_token_figure(content.tokens))
    if any(stage.seconds > 0 for stage in content.cost.stages):
        figures.append(_cost_figure(content.cost.stages))
    return tuple(figures)


def _score_figure(index: int, scores: ScoreDistribution) -> Figure:
    middles = [(low + high) / 2 for low, high in pairwise(scores.edges)]
    ranges = [f"{number(low, 3)} to {number(high, 3)}" for low, high in pairwise(scores.edges)]
    traces = [
        go.Bar(
            x=middles,
            y=list(shares),
            width=scores.edges[1] - scores.edges[0],
            customdata=ranges,
            hovertemplate=f"{label}: %{{y:.1%}} with a score of %{{customdata}}<extra></extra>",
            marker={"color": PALETTE[role][0], "line": {"width": 0}},
            opacity=opacity,
            meta=role,
        )
        for role, label, shares, opacity in (
            ("pool", "scored rows", scores.pool_shares, 1.0),
            ("selected", "selected rows", scores.selected_shares, 0.72),
        )
    ]
    figure = bare_figure(traces, barmode="overlay", bargap=0)
    figure.update_xaxes(title={"text": "score (higher is taken first)"}, nticks=7)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", nticks=5)
    name = one_line(scores.name, 60)
    return Figure(
        key=f"scores-{index}",
        section="scores",
        title=f"Scores for {name}" if name != "all targets" else "Scores",
        alt=f"Distribution of the scores for {name}: median {number(scores.pool_median)} over {count(scores.scored)} "
        f"scored rows, {number(scores.selected_median)} over {count(scores.selected)} selected rows.",
        legend=(("pool", "all scored rows"), ("selected", "selected rows")),
        height=250,
        spec=plain_spec(figure),
    )


def _source_figure(sources: Sequence[SourceShare]) -> Figure:
    shown = list(sources[:_MAX_BARS])
    labels = [entry.name for entry in shown]
    figure = bare_figure(
        [
            bars(
                labels,
                [entry.pool_share for entry in shown],
                "pool",
                [percent(entry.pool_share) for entry in shown],
                "pool",
            ),
            bars(
                labels,
                [entry.selected_share for entry in shown],
                "selected",
                [percent(entry.selected_share) for entry in shown],
                "selection",
            ),
        ],
        barmode="group",
        bargap=0.28,
        bargroupgap=0.06,
    )
    categories(figure, labels)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", nticks=6)
    top = max(shown, key=lambda entry: entry.selected_share) if shown else None
    return Figure(
        key="sources",
        section="sources",
        title="Share of each source, before and after",
        alt="Share of the rows by source in the pool and in the selection."
        + (f" Most selected rows come from {one_line(top.name, 60)}: {percent(top.selected_share)}." if top else ""),
        legend=(("pool", "pool"), ("selected", "selection")),
        height=FRAME + 44 * max(len(shown), 1),
        spec=plain_spec(figure),
    )


def _length_figure(edges: Sequence[float], groups: Sequence[LengthGroup]) -> Figure:
    middles = [(low * high) ** 0.5 for low, high in pairwise(edges)]
    ranges = [count(low) if high - low <= 1 else f"{count(low)} to {count(high - 1)}" for low, high in pairwise(edges)]
    drawn = [group for group in groups if group.shares]
    targets = [group for group in drawn if group.role == "target"]
    dashes = [dash for dash, _ in zip(cycle(_TARGET_DASHES), targets, strict=False)]
    traces = []
    for group in drawn:
        dash = dashes[targets.index(group)] if group.role == "target" else "solid"
        # A line along zero says nothing: each group ends one bin beyond its own rows, except the filled pool.
        shares = group.shares if group.role == "pool" else _trimmed(group.shares)
        traces.append(
            go.Scatter(
                x=middles,
                y=list(shares),
                customdata=ranges,
                mode="lines",
                line={
                    "shape": "hvh",
                    "width": 0 if group.role == "pool" else 2,
                    "dash": dash,
                    "color": PALETTE[group.role][0],
                },
                fill="tozeroy" if group.role == "pool" else "none",
                fillcolor=PALETTE[group.role][0],
                hovertemplate=f"{_words(group)}: %{{y:.1%}} with %{{customdata}} supervised tokens<extra></extra>",
                meta=group.role,
            )
        )
    figure = bare_figure(traces)
    ticks = _log_ticks(edges[0], edges[-1])
    figure.update_xaxes(
        type="log", title={"text": "supervised tokens a row"}, tickvals=ticks, ticktext=[count(tick) for tick in ticks]
    )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", nticks=5)
    labels = [one_line(group.label, 46) for group in targets]
    dashed = [
        (f"target line {dash}", f"{label} ({_TARGET_DASHES[dash]})" if len(labels) > 1 else label)
        for label, dash in zip(labels, dashes, strict=False)
    ]
    return Figure(
        key="lengths",
        section="lengths",
        title="Supervised tokens a row",
        alt=listed(
            "Distribution of supervised tokens a row. Means", ((group.name, number(group.mean, 3)) for group in drawn)
        ),
        legend=(("pool", "pool"), ("selected", "selection"), *dashed),
        height=270,
        spec=plain_spec(figure),
    )


def _log_ticks(low: float, high: float) -> list[int]:
    """Round numbers between ``low`` and ``high``: as few a decade as give at least three."""
    ticks: list[int] = []
    for leading in ((1, 3), (1, 2, 5), range(1, 10)):
        ticks = [digit * 10**power for power in range(9) for digit in leading if low <= digit * 10**power <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _trimmed(shares: Sequence[float]) -> list[float | None]:
    filled = [index for index, share in enumerate(shares) if share > 0]
    return [
        share if filled and filled[0] - 1 <= index <= filled[-1] + 1 else None for index, share in enumerate(shares)
    ]


def _words(group: LengthGroup) -> str:
    """The group's name inside a hover template, where ``%{`` would begin a variable."""
    return group.role if group.role != "target" else figure_text(group.label, 34).replace("%", "&#37;")


def _overlap_figure(agreements: Sequence[Agreement]) -> Figure:
    labels = [entry.name for entry in agreements]
    overlaps = [entry.overlap for entry in agreements]
    written = [percent(entry.overlap) for entry in agreements]
    overlap = bars(labels, overlaps, "selected", written, "overlap").update(text=None)
    chance = go.Scatter(
        x=[entry.chance for entry in agreements],
        y=list(range(len(labels))),
        mode="markers",
        marker={"symbol": "line-ns", "size": 22, "line": {"width": 2, "color": PALETTE["target"][0]}},
        customdata=[percent(entry.chance) for entry in agreements],
        hovertemplate="expected by chance: %{customdata}<extra></extra>",
        meta="target",
    )
    values = go.Scatter(  # to the right of both the bar and the mark, which would run through a bar's own text
        x=[max(entry.overlap, entry.chance) for entry in agreements],
        y=list(range(len(labels))),
        mode="text",
        text=[f"\u00a0{value}" for value in written],
        textposition="middle right",
        cliponaxis=False,
        hovertemplate="overlap: %{text}<extra></extra>",
        meta="ink",
    )
    figure = bare_figure([overlap, chance, values])
    categories(figure, labels)
    figure.update_xaxes(tickformat=".0%", range=[0, max(0.3, min(1.0, 1.2 * max(overlaps))) + 0.02], nticks=6)
    return Figure(
        key="overlap",
        section="baselines",
        title="Overlap of the chosen rows",
        alt=listed(
            "Share of the selected rows that each baseline chooses too",
            ((entry.name, percent(entry.overlap)) for entry in agreements),
        ),
        legend=(("selected", "also chosen by the baseline"), ("target line", "expected by chance")),
        height=FRAME + 40 * len(labels),
        spec=plain_spec(figure),
    )


def _spearman_figure(agreements: Sequence[Agreement]) -> Figure:
    known = [entry for entry in agreements if entry.spearman is not None]
    labels = [entry.name for entry in agreements]  # all of them, so that the bars stand level with the overlap's
    written = ["no scores" if entry.spearman is None else number(entry.spearman, 2) for entry in agreements]
    figure = bare_figure([bars(labels, [entry.spearman or 0.0 for entry in agreements], "pool", written, "Spearman")])
    categories(figure, labels)
    figure.update_xaxes(range=[-1.15, 1.15], tickvals=[-1, -0.5, 0, 0.5, 1], zeroline=True)
    return Figure(
        key="spearman",
        section="baselines",
        title="Rank correlation over all rows",
        alt=listed(
            "Spearman rank correlation with each baseline's score over all rows",
            ((entry.name, f"{entry.spearman:.2f}") for entry in known),
        ),
        legend=(("pool", "Spearman, −1 to 1: says little about the top"),),
        height=FRAME + 40 * len(labels),
        spec=plain_spec(figure),
    )


def _token_figure(tokens: Sequence[TokenUse]) -> Figure:
    labels = [entry.name for entry in tokens]
    tokens_bars = bars(
        labels, [entry.tokens for entry in tokens], "pool", [count(entry.tokens) for entry in tokens], "tokens"
    )
    supervised = bars(
        labels,
        [entry.supervised for entry in tokens],
        "selected",
        [count(entry.supervised) for entry in tokens],
        "supervised",
    )
    supervised.update(text=None, width=0.3)
    tokens_bars.update(width=0.62)
    figure = bare_figure([tokens_bars, supervised], barmode="overlay")
    categories(figure, labels)
    figure.update_xaxes(tickformat="~s", rangemode="tozero", nticks=6)
    return Figure(
        key="tokens",
        section="budget",
        title="Tokens in one pass over the chosen rows",
        alt=listed("Tokens of each choice", ((entry.name, count(entry.tokens)) for entry in tokens)),
        legend=(("pool", "all tokens"), ("selected", "supervised tokens (they carry the loss)")),
        height=FRAME + 40 * len(labels),
        spec=plain_spec(figure),
    )


def _cost_figure(stages: Sequence[CostStage]) -> Figure:
    shown = sorted(stages, key=lambda stage: -stage.seconds)[:_MAX_BARS]
    labels = [stage.name for stage in shown]
    figure = bare_figure(
        [
            bars(
                labels,
                [stage.seconds for stage in shown],
                "selected",
                [seconds(stage.seconds) for stage in shown],
                "time",
            )
        ]
    )
    categories(figure, labels)
    figure.update_xaxes(rangemode="tozero", ticksuffix=" s", nticks=6)
    return Figure(
        key="cost",
        section="cost",
        title="Seconds by stage",
        alt=listed("Time by stage", ((stage.name, seconds(stage.seconds)) for stage in shown)),
        legend=(),
        height=FRAME + ROW_HEIGHT * len(labels),
        spec=plain_spec(figure),
    )
