"""The pictures of a comparison: where every run ended, the gain at equal cost, what it cost, what more rows bring."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tamis.comparison.result import CompareResult
from tamis.comparison.verdict import Difference, Standing
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
from tamis.report.wording import figure_text, number, one_line

__all__ = ["cost_figure", "curve_figures", "gain_figure", "run_figure"]

_MOST_CURVES = 6


def role_of(standing: Standing) -> str:
    """How a contender is drawn: methods named, ``full`` at equal cost, all others."""
    if standing.kind == "equal-cost":
        return "target"
    return "pool" if standing.is_baseline else "selected"


def run_figure(standings: Sequence[Standing], metric: str) -> Figure:
    """Every run as a dot, every mean as a stroke, best first."""
    labels = [standing.name for standing in standings]
    traces = []
    for role in ("pool", "target", "selected"):
        places = [i for i, standing in enumerate(standings) if role_of(standing) == role]
        dots = [(value, i) for i in places for value in standings[i].values]
        if dots:
            traces.append(
                go.Scatter(
                    x=[value for value, _ in dots],
                    y=[place for _, place in dots],
                    mode="markers",
                    marker={"size": 9, "opacity": 0.7, "color": PALETTE[role][0], "line": {"width": 0}},
                    hovertext=[f"{figure_text(labels[place], 60)}: {number(value)}" for value, place in dots],
                    hovertemplate="%{hovertext}<extra></extra>",
                    meta=role,
                )
            )
    traces.append(
        go.Scatter(
            x=[standing.mean for standing in standings],
            y=list(range(len(labels))),
            mode="markers",
            marker={"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": PALETTE["ink"][0]}},
            hovertext=[f"{figure_text(s.name, 60)}, mean: {number(s.mean)}" for s in standings],
            hovertemplate="%{hovertext}<extra></extra>",
            meta="ink",
        )
    )
    figure = bare_figure(traces)
    categories(figure, labels)
    figure.update_layout(margin={"r": 18})  # no value is written behind a point
    better = "lower" if metric == "loss" else "higher"
    figure.update_xaxes(title={"text": f"held-out {metric} ({better} is better)"}, nticks=6)
    return Figure(
        key="runs",
        title="Where every run ended",
        alt=listed(f"Held-out {metric} of every contender, best first", ((s.name, number(s.mean)) for s in standings)),
        legend=(
            ("selected", "methods named"),
            ("target", "full at equal cost"),
            ("pool", "other baselines"),
            ("ink", "mean"),
        ),
        height=FRAME + ROW_HEIGHT * len(labels),
        spec=plain_spec(figure),
    )


def gain_figure(differences: Sequence[Difference], metric: str) -> Figure:
    """The gain of each method over ``full`` at equal cost, with its interval over seeds where there is one."""
    labels = [difference.contender for difference in differences]
    reach = [
        0.0 if d.over_seeds.high is None else d.over_seeds.high - d.gain for d in differences
    ]  # no bar for a single seed
    points = go.Scatter(
        x=[difference.gain for difference in differences],
        y=list(range(len(labels))),
        mode="markers",
        marker={"size": 11, "color": PALETTE["selected"][0], "line": {"width": 0}},
        error_x={"type": "data", "array": reach, "thickness": 2, "width": 6, "color": PALETTE["selected"][0]},
        hovertext=[f"{figure_text(d.contender, 60)}: {number(d.gain, 3)}" for d in differences],
        hovertemplate="%{hovertext}<extra></extra>",
        meta="selected",
    )
    figure = bare_figure([points])
    categories(figure, labels)
    figure.update_layout(margin={"r": 18})  # no value is written behind a point
    figure.update_xaxes(
        title={"text": f"gain in {metric}"}, rangemode="tozero", zeroline=True, zerolinewidth=2, nticks=6
    )
    return Figure(
        key="gains",
        title="Does selecting pay at equal cost?",
        alt=listed("Gain over full training at equal cost", ((d.contender, number(d.gain, 3)) for d in differences)),
        legend=(
            (
                "selected",
                "gain over full at equal cost, 95% interval over seeds, of each by itself; right of 0 selecting pays",
            ),
        ),
        height=FRAME + 30 + 40 * len(labels),
        spec=plain_spec(figure),
    )


def cost_figure(standings: Sequence[Standing]) -> Figure:
    """Operations of selecting and of training, one upon the other."""
    shown = [standing for standing in standings if standing.tflops]
    labels = [standing.name for standing in shown]
    written = [f"{number(standing.tflops, 3)}" for standing in shown]
    training = bars(labels, [s.train_tflops for s in shown], "pool", written, "TFLOPs in all").update(text=None)
    selecting = bars(labels, [s.select_tflops for s in shown], "selected", written, "TFLOPs in all")
    figure = bare_figure([training, selecting], barmode="stack")
    categories(figure, labels)
    figure.update_xaxes(title={"text": "TFLOPs of one run"}, rangemode="tozero", tickformat="~s", nticks=6)
    return Figure(
        key="cost",
        title="What a run costs, selection included",
        alt=listed("TFLOPs of one run, selection included", ((s.name, number(s.tflops, 3)) for s in shown)),
        legend=(("pool", "training"), ("selected", "selecting (in full, though runs may share one selection)")),
        height=FRAME + 20 + ROW_HEIGHT * len(labels),
        spec=plain_spec(figure),
    )


def curve_figures(result: CompareResult) -> tuple[Figure, ...]:
    """For each method, what a larger part of the pool brings; none for a single budget."""
    budgets = sorted(
        dict.fromkeys(s.budget for s in result.standings),
        key=lambda budget: (result.standing("uniform", budget) or result.standings[0]).rows,
    )
    if len(budgets) < 2:
        return ()
    rows = [(result.standing("uniform", budget) or result.standings[0]).rows for budget in budgets]
    names = [s.name for s in result.at(result.budget) if not s.is_baseline][:_MOST_CURVES]
    return tuple(_curve(result, index, name, budgets, rows) for index, name in enumerate(names))


def _curve(result: CompareResult, index: int, name: str, budgets: Sequence[str], rows: Sequence[float]) -> Figure:
    drawn = (("pool", "uniform"), ("ink", "bm25"), ("target", f"full at {name}'s cost"), ("selected", name))
    traces, legend, said = [], [], []
    for role, other in drawn:
        means = [None if (s := result.standing(other, budget)) is None else s.mean for budget in budgets]
        if all(mean is None for mean in means):
            continue
        legend.append((f"{role} line", one_line(other, 46)))
        said.append(f"{one_line(other, 40)} " + ", ".join(number(mean) for mean in means))
        traces.append(line(rows, means, role, other))
    figure = bare_figure(traces)
    figure.update_xaxes(
        type="log", tickvals=list(rows), ticktext=list(budgets), title={"text": "budget (rows, log scale)"}
    )
    figure.update_yaxes(title={"text": result.metric}, nticks=5)
    return Figure(
        key=f"curve-{index}",
        title=f"More rows: {one_line(name, 60)}",
        alt=f"Held-out {result.metric} at budgets {', '.join(budgets)}: " + "; ".join(said) + ".",
        legend=tuple(legend),
        height=280,
        spec=plain_spec(figure),
    )
