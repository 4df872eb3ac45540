"""The page of a proxy: what it keeps of its target, at what cost, and what to do. One file, no script, nothing fetched.

It looks like the report of a selection and is as safe against hostile names: the template escapes everything, hidden
characters are made visible, and the page's own policy lets no script run and no request leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tamis.proxies.align import Aligned
from tamis.proxies.retention import Retention
from tamis.report import figures
from tamis.report.environment import page_environment, page_style

__all__ = ["Drawing", "retention_page", "round_numbers"]

_Y_STEP = 0.25
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 260, 48, 16, 14, 40


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Lines in the coordinates of an SVG of fixed size; numbers only, so nothing in it needs escaping."""

    title: str
    alt: str
    x_label: str
    lines: tuple[tuple[str, str, tuple[tuple[float, float], ...]], ...]  # role, label, points
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    wanted: tuple[float, str] | None  # a level, and what it is called
    width: int = _WIDTH
    height: int = _HEIGHT


def retention_page(content: Retention, *, command: str, warnings: Sequence[str]) -> str:
    """The page as text."""
    return (
        page_environment()
        .get_template("retention.html.j2")
        .render(
            content=content,
            command=command,
            warnings=list(warnings),
            sweep=_sweep(content),
            curves=_curves(content),
            palette=figures.PALETTE,
            style=page_style(),
        )
    )


def _sweep(content: Retention) -> list[Drawing]:
    if len(content.sweep) < 2 or content.sparsity is None:
        return []
    points = [(p.sparsity, p.kept.agreement.spearman.value) for p in content.sweep]
    losses = [(p.sparsity, content.loss_full / p.kept.loss) for p in content.sweep if p.kept.loss]
    final = content.final.agreement.spearman.value
    said = ", ".join(f"{value:.2f} at {rho:g}" for rho, value in points)
    lines = [("selected", "ranking kept, before alignment", points), ("pool", "loss kept (full over proxy)", losses)]
    lines.append(("target", "ranking kept by this proxy", [(content.sparsity, final)]))
    return [
        _drawing(
            "What is kept at each sparsity",
            f"Rank correlation with the full model before alignment: {said}. This proxy: {final:.2f}.",
            "sparsity",
            lines,
            wanted=content.advice.keep,
            x_ticks=[rho for rho, _ in points],
        )
    ]


def _curves(content: Retention) -> list[Drawing]:
    curves = [("selected", content.objective, content.aligned), ("pool", "control: outputs alone", content.control)]
    known = [(role, label, aligned) for role, label, aligned in curves if aligned is not None]
    if not known or all(len(aligned.curve) < 2 for _, _, aligned in known):
        return []
    lines = [(role, label, _by_seconds(aligned)) for role, label, aligned in known]
    ends = ", ".join(f"{label} {aligned.curve[-1].retention:.2f}" for _, label, aligned in known)
    return [
        _drawing(
            "Alignment: ranking kept on validation rows",
            f"Rank correlation on validation rows over seconds of training; at the end: {ends}.",
            "seconds of training",
            lines,
            wanted=content.advice.keep,
        )
    ]


def _by_seconds(aligned: Aligned) -> list[tuple[float, float]]:
    return [(point.seconds, point.retention) for point in aligned.curve]


def _drawing(
    title: str,
    alt: str,
    x_label: str,
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    wanted: float,
    x_ticks: Sequence[float] | None = None,
) -> Drawing:
    xs = [x for _, _, points in lines for x, _ in points]
    ys = [y for _, _, points in lines for _, y in points]
    low_x, high_x = min(xs), max(xs)
    low_y = _Y_STEP * math.floor(min(0.0, *ys) / _Y_STEP)
    high_y = _Y_STEP * math.ceil(max(1.0, *ys) / _Y_STEP)

    def across(x: float) -> float:
        return round(_LEFT + (x - low_x) / ((high_x - low_x) or 1) * (_WIDTH - _LEFT - _RIGHT), 1)

    def up(y: float) -> float:
        return round(_TOP + (high_y - y) / ((high_y - low_y) or 1) * (_HEIGHT - _TOP - _BOTTOM), 1)

    lowest, highest = round(low_y / _Y_STEP), round(high_y / _Y_STEP)
    every = 1 + (highest - lowest) // 8  # a ratio of losses can be far above 1
    levels = [_Y_STEP * step for step in range(lowest, highest + 1) if step % every == 0]  # 0 among them
    return Drawing(
        title=title,
        alt=alt,
        x_label=x_label,
        lines=tuple((role, label, tuple((across(x), up(y)) for x, y in points)) for role, label, points in lines),
        x_ticks=tuple((across(x), f"{x:.3g}") for x in (x_ticks or round_numbers(low_x, high_x))),
        y_ticks=tuple((up(y), f"{y:g}".replace("-", "−")) for y in levels),
        wanted=(up(wanted), f"wanted: {wanted:g}") if low_y <= wanted <= high_y else None,
    )


def round_numbers(low: float, high: float, most: int = 7) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between ``low`` and ``high``, ``most`` at most."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
