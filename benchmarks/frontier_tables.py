"""What `frontier.py` measured, as tables and as a picture.

    python benchmarks/frontier_tables.py --csv benchmarks/results/frontier.csv --svg docs/frontier.svg

Every number is a mean over the draws of landmarks. On the picture a line is one embedding, and its points are numbers
of landmarks: to the right costs more, higher agrees better with exact scores.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 64, 190, 16, 52
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#8b4513", "#6a3d9a", "#b2182b",
           "#999933", "#117733")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Point:
    """One embedding with one number of landmarks, over its draws."""

    embedding: str
    landmarks: int
    cost: float  # of a pool, as a share of exact gradients for all its rows
    spearman: float
    top5: float
    recovery: float
    expected: float  # rank correlation predicted from the landmarks alone
    spread: float  # of the rank correlation over draws
    chosen: str


def read(path: Path) -> dict[str, list[Point]]:
    """By embedding, in the order of the file, fewest landmarks first."""
    groups: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            groups[line["embedding"], int(line["landmarks"])].append(line)
    found: dict[str, list[Point]] = defaultdict(list)
    for (name, landmarks), lines in sorted(groups.items(), key=lambda item: item[0][1]):

        def mean(column: str, lines: list[dict[str, str]] = lines) -> float:
            return statistics.fmean(float(line[column]) for line in lines)

        ranks = [float(line["spearman"]) for line in lines]
        found[name].append(
            Point(
                embedding=name,
                landmarks=landmarks,
                cost=mean("cost"),
                spearman=mean("spearman"),
                top5=mean("top5"),
                recovery=mean("recovery"),
                expected=mean("expected_spearman"),
                spread=statistics.stdev(ranks) if len(ranks) > 1 else 0.0,
                chosen=", ".join(dict.fromkeys(line["chosen"] for line in lines)),
            )
        )
    return found


def on_frontier(point: Point, every: list[Point]) -> bool:
    """Whether nothing that costs no more agrees better."""
    return not any(p.cost <= point.cost and p.spearman > point.spearman for p in every)


def tables(found: dict[str, list[Point]]) -> list[Table]:
    """One per number of landmarks; a star marks what nothing cheaper beats, whatever its landmarks."""
    every = [point for points in found.values() for point in points]
    made = []
    for count in sorted({point.landmarks for point in every}):
        heads = ("embedding", "cost", "rank correlation", "predicted", "top 5 %", "recovery", "")
        table = Table(*heads, title=f"{count} landmarks")
        for point in (p for points in found.values() for p in points if p.landmarks == count):
            name = f"{point.embedding}: {point.chosen}" if point.embedding.startswith("auto") else point.embedding
            table.add_row(
                name, f"{point.cost:.3f}", f"{point.spearman:.3f} ± {point.spread:.3f}", f"{point.expected:.3f}",
                f"{point.top5:.3f}", f"{point.recovery:.3f}", "*" if on_frontier(point, every) else "",
            )  # fmt: skip
        made.append(table)
    return made


def picture(found: dict[str, list[Point]]) -> str:
    """Rank correlation against cost, both of all points, as an SVG text."""
    every = [point for points in found.values() for point in points]
    lowest, highest = (f(math.log10(p.cost) for p in every) for f in (min, max))
    bottom = math.floor(min(p.spearman for p in every) * 10) / 10

    def x(cost: float) -> float:
        return LEFT + (math.log10(cost) - lowest) / (highest - lowest) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (1 - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tenth in range(round(bottom * 10), 11):
        height = y(tenth / 10)
        parts.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>')
    for cost in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        if lowest <= math.log10(cost) <= highest:
            parts.append(f'<path d="M{x(cost):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eeeeee"/>')
            parts.append(f'<text x="{x(cost):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{cost:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">'
        "cost, as a share of exact gradients for all rows</text>"
    )
    parts.append(
        f'<text transform="translate(16 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "rank correlation with exact scores</text>"
    )
    autos = [name for name in found if name.startswith("auto")]
    for index, (name, points) in enumerate(found.items()):
        is_auto = name in autos
        colour = "black" if is_auto else COLOURS[index % len(COLOURS)]
        line = " ".join(f"{x(p.cost):.1f},{y(p.spearman):.1f}" for p in points)
        pattern = ("", "8 4", "2 3", "8 3 2 3")[autos.index(name) % 4] if is_auto else ""
        dash = f' stroke-dasharray="{pattern}"' if pattern else ""
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{3 if is_auto else 1.5}"{dash}/>'
        )
        parts += [f'<circle cx="{x(p.cost):.1f}" cy="{y(p.spearman):.1f}" r="2.5" fill="{colour}"/>' for p in points]
        height = TOP + 14 + index * 18
        parts.append(
            f'<path d="M{WIDTH - RIGHT + 12} {height - 4}h22" stroke="{colour}" '
            f'stroke-width="{3 if is_auto else 1.5}"{dash}/>'
            f'<text x="{WIDTH - RIGHT + 40}" y="{height}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "frontier.csv")
    parser.add_argument("--svg", type=Path, help="where to draw the picture")
    options = parser.parse_args()
    found = read(options.csv)
    for table in tables(found):
        Console(width=130).print(table)
    if options.svg:
        options.svg.write_text(picture(found), encoding="utf-8")


if __name__ == "__main__":
    main()
