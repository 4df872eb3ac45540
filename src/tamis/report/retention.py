"""The page of a proxy: what it keeps of its model, at what cost, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tamis.proxies.align import CurvePoint
from tamis.proxies.influence import Interval
from tamis.proxies.retention import Kept, Retention
from tamis.report.document import Document, KeyNumber, Section, Table
from tamis.report.drawing import PALETTE, Figure, bare_figure, line, listed, plain_spec
from tamis.report.finding import Finding
from tamis.report.provenance import provenance
from tamis.report.wording import count, counted, number, one_line, percent, seconds

__all__ = ["retention_document"]

_HEIGHT = 280
_Line = tuple[str, str, Sequence[tuple[float, float]]]  # role, name, points


def retention_document(found: Retention, manifest: Mapping[str, Any]) -> Document:
    """All that the page shows; of ``manifest`` are read ``command`` and ``warnings``, all else is listed as it is."""
    how = f"the preset {found.preset}" + (f", aligned by {found.objective}" if found.aligned else "")
    place = "loads wherever tamis takes a model"
    if found.final.loss is None:
        place = "holds no model; its scores of the pool are in scores.parquet"
    return Document(
        eyebrow="tamis: what a proxy keeps of its model",
        title=f"Rank correlation {_correlation(found.final.agreement.spearman.value)} with the full model, at "
        f"{percent(found.cost.flops_ratio)} of the blocks' work",
        lede=f"A proxy of {one_line(found.model, 120)} by {how}. How it ranks "
        f"{counted(found.rows['held_out'], 'held-out pool row')}, against the ranking by the full model.",
        numbers=_numbers(found),
        sections=(
            Section(key="advice", title="What to do", findings=_findings(found, manifest["warnings"])),
            Section(
                key="kept",
                title="What is kept",
                paragraphs=_meaning(found),
                figures=(*_sweep_figure(found), *_alignment_figure(found)),
                tables=(_kept_table(found), _target_table(found), _sweep_table(found), _alignment_table(found)),
            ),
            Section(
                key="cost",
                title="What it costs",
                short_title="Cost",
                tables=(_cost_table(found), _left_out_table(found)),
                remarks=_remarks_on_cost(found),
            ),
        ),
        repeat=f"The folder itself {place}.",
        command=one_line(manifest["command"], 2000),
        provenance=provenance(manifest, without=("warnings",)),
        footer="Made by tamis from files beside this page: retention.json has every number, manifest.json what "
        "determines the result. This page fetches nothing and sends nothing.",
    )


def _numbers(found: Retention) -> tuple[KeyNumber, ...]:
    ranking, best = found.final.agreement.spearman, found.final.agreement.top_overlap
    return (
        KeyNumber(
            value=_correlation(ranking.value),
            label="ranking kept",
            detail=f"rank correlation, {_range(ranking, _correlation)}",
        ),
        KeyNumber(value=percent(best.value), label="best 5% kept", detail=_range(best, percent)),
        KeyNumber(value=number(found.final.loss), label="loss", detail=f"full model: {number(found.loss_full)}"),
        KeyNumber(
            value=percent(found.cost.seconds_ratio), label="time of a pass", detail="of the full model's, measured"
        ),
    )


def _findings(found: Retention, warnings: Sequence[str]) -> tuple[Finding, ...]:
    is_enough = found.final.agreement.spearman.value >= found.advice.keep
    said, *advice = found.advice.sentences
    return (
        Finding(
            key="advice",
            severity="passed" if is_enough else "warning",
            title="Does it keep enough of the ranking?",
            sentence=said,
            advice=" ".join(advice),
        ),
        *(
            Finding(key=f"warning-{i}", severity="warning", title="Mind this", sentence=one_line(text, 600))
            for i, text in enumerate(warnings)
        ),
        *(
            Finding(key=f"note-{i}", severity="note", title="Said by the build", sentence=one_line(text, 600))
            for i, text in enumerate(found.notes)
        ),
    )


def _meaning(found: Retention) -> tuple[str, ...]:
    scores = (
        "Scores are mean gradient cosines with a target's rows. The rank correlation (Spearman) is 1 if both models "
        "put the rows in the same order, and 0 if their orders have nothing to do with each other. In brackets: the "
        "middle 95% over resampled rows."
    )
    factors = (
        "Gradients of a layer in factors are those of their product, one matrix like the full model's, or those of the "
        "two factors."
    )
    return (scores, factors) if found.ranks else (scores,)


def _sweep_figure(found: Retention) -> tuple[Figure, ...]:
    if len(found.sweep) < 2 or found.sparsity is None:
        return ()
    points = [(point.sparsity, point.kept.agreement.spearman.value) for point in found.sweep]
    losses = [(point.sparsity, found.loss_full / point.kept.loss) for point in found.sweep if point.kept.loss]
    final = found.final.agreement.spearman.value
    drawn = [("selected", "ranking kept, before alignment", points), ("pool", "loss kept (full over proxy)", losses)]
    figure = _figure_of(drawn, "sparsity", found.advice.keep)
    figure.add_scatter(
        x=[found.sparsity],
        y=[final],
        mode="markers",
        marker={"size": 12, "symbol": "diamond", "color": PALETTE["target"][0], "line": {"width": 0}},
        hovertemplate="this proxy: %{y:.2f} at %{x}<extra></extra>",
        meta="target",
    )
    figure.update_xaxes(tickvals=[rho for rho, _ in points])
    said = listed("Rank correlation before alignment", ((f"at {rho:g}", _correlation(kept)) for rho, kept in points))
    return (
        Figure(
            key="sweep",
            title="What is kept at each sparsity",
            alt=f"{said} This proxy: {_correlation(final)} at {found.sparsity:g}.",
            legend=(*_legend(drawn, found.advice.keep), ("target", "ranking kept by this proxy")),
            height=_HEIGHT,
            spec=plain_spec(figure),
        ),
    )


def _alignment_figure(found: Retention) -> tuple[Figure, ...]:
    drawn = [
        (role, name, [(point.seconds, point.retention) for point in curve])
        for role, (name, curve) in zip(("selected", "pool"), _alignments(found), strict=False)
    ]
    if all(len(points) < 2 for _, _, points in drawn):
        return ()
    ends = ((name, _correlation(points[-1][1])) for _, name, points in drawn)
    return (
        Figure(
            key="alignment",
            title="Alignment: ranking kept on validation rows",
            alt=listed("Rank correlation on validation rows at the end of training", ends),
            legend=_legend(drawn, found.advice.keep),
            height=_HEIGHT,
            spec=plain_spec(_figure_of(drawn, "seconds of training", found.advice.keep)),
        ),
    )


def _alignments(found: Retention) -> list[tuple[str, Sequence[CurvePoint]]]:
    named = ((found.objective, found.aligned), ("control: outputs alone", found.control))
    return [(name, aligned.curve) for name, aligned in named if aligned is not None and aligned.curve]


def _figure_of(drawn: Sequence[_Line], x_title: str, keep: float) -> go.Figure:
    """Lines and the level that is wanted, on an axis that shows all of a correlation."""
    xs = [x for _, _, points in drawn for x, _ in points]
    ys = [y for _, _, points in drawn for _, y in points]
    wanted = line([min(xs), max(xs)], [keep, keep], "quiet", "wanted", dash="dot", is_measured=False)
    lines = [line([x for x, _ in points], [y for _, y in points], role, name) for role, name, points in drawn]
    figure = bare_figure([wanted, *lines])
    figure.update_xaxes(title={"text": x_title}, nticks=7)
    low, high = min(0.0, keep, *ys), max(1.0, keep, *ys)
    room = 0.06 * (high - low)
    return figure.update_yaxes(range=[low - room, high + room], nticks=6)


def _legend(drawn: Sequence[_Line], keep: float) -> tuple[tuple[str, str], ...]:
    return (*((f"{role} line", name) for role, name, _ in drawn), ("quiet line dot", f"wanted: {keep:g}"))


def _kept_table(found: Retention) -> Table:
    return Table(
        label="Agreement with the full model",
        heads=("scored with", "rank correlation", "best 5% shared", "loss"),
        rows=tuple((kept.name, *_kept(kept)) for kept in (found.final, *found.others)),
    )


def _target_table(found: Retention) -> Table:
    return Table(
        label="Agreement by target",
        heads=("target", "rows", "rank correlation"),
        rows=tuple(
            (one_line(name, 80), count(rows), _correlation(found.final.agreement.by_target[name]))
            for name, rows in found.targets.items()
        ),
    )


def _sweep_table(found: Retention) -> Table:
    return Table(
        label="Other sparsities, measured before alignment",
        heads=("sparsity", "removed of the layers' numbers", "rank correlation", "best 5% shared", "loss"),
        rows=tuple((f"{point.sparsity:g}", percent(point.achieved), *_kept(point.kept)) for point in found.sweep),
    )


def _alignment_table(found: Retention) -> Table:
    return Table(
        label="Alignment, measured on validation rows",
        heads=("aligned by", "steps", "time", "rank correlation"),
        rows=tuple(
            (name, count(point.step), seconds(point.seconds), _correlation(point.retention))
            for name, curve in _alignments(found)
            for point in curve
        ),
    )


def _cost_table(found: Retention) -> Table:
    cost = found.cost
    timed = f"measured time, {counted(cost.timed_rows, 'held-out row')}, best of three, in turn"

    def tflops(value: float) -> str:
        return number(value, 3)

    def row(what: str, full: float, proxy: float, written: Callable[[float], str]) -> tuple[str, ...]:
        return what, written(full), written(proxy), percent(proxy / full)

    return Table(
        label="Cost of scoring",
        heads=("of a scoring pass", "full model", "proxy", "proxy of full"),
        rows=(
            row("parameters", cost.params_full, cost.params_proxy, count),
            row("operations in the blocks, TFLOPs", cost.block_tflops_full, cost.block_tflops_proxy, tflops),
            row("operations with the LM head, TFLOPs", cost.tflops_full, cost.tflops_proxy, tflops),
            row(timed, cost.seconds_full, cost.seconds_proxy, seconds),
        ),
    )


def _left_out_table(found: Retention) -> Table:
    return Table(
        label="Layers that stay as they are",
        heads=("layers", "numbers", "why"),
        words=("why",),
        rows=tuple(
            (one_line(entry.layers, 120), count(entry.numel), one_line(entry.reason, 300)) for entry in found.left_out
        ),
    )


def _remarks_on_cost(found: Retention) -> tuple[str, ...]:
    cost = found.cost
    remarks = [
        f"Made in {seconds(cost.build_seconds)} of factors and {seconds(cost.align_seconds)} of alignment: "
        f"{percent(cost.build_share)} of what the full model's pass over the pool would take "
        f"({seconds(cost.pool_pass_seconds)}, extrapolated)."
    ]
    if found.ranks:
        remarks.append(
            f"{counted(found.compressed_layers, 'layer')} in factors, of ranks {found.ranks[0]} to {found.ranks[1]}: "
            f"{percent(found.achieved)} of the numbers removed there, {percent(found.achieved_whole)} of the model's. "
            "The LM head stays."
        )
    rows = ", ".join(f"{role.replace('_', ' ')} {count(number_of)}" for role, number_of in found.rows.items())
    return (*remarks, f"Rows: {rows}.")


def _kept(kept: Kept) -> tuple[str, str, str]:
    """Rank correlation, best 5% shared, loss."""
    agreement = kept.agreement
    return _interval(agreement.spearman, _correlation), _interval(agreement.top_overlap, percent), number(kept.loss)


def _interval(found: Interval, written: Callable[[float], str]) -> str:
    return f"{written(found.value)} ({_range(found, written)})"


def _range(found: Interval, written: Callable[[float], str]) -> str:
    return "–" if found.low is None or found.high is None else f"{written(found.low)} to {written(found.high)}"


def _correlation(value: float) -> str:
    """Two decimals, so that a column can be read down."""
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"
