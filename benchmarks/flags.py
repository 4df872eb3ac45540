"""How well an unusually high loss tells wrong answers, for several meanings of "unusually high".

    python benchmarks/flags.py --model DIR --pool pool.jsonl   losses, then the comparison
    python benchmarks/flags.py                                 the comparison from the losses kept in results/

Every row is passed through the model twice, with its own answer and with that of another row of its source. Wrong
answers can then be planted at any rate by choosing which of its two losses a row shows. The demo's pool stands beside
it as it is, with the ten wrong answers (and their copies) that were planted there.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

import tamis
from tamis.selection.flags import HighLoss, flag_high_losses

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "examples" / "demo" / "data"
LOSSES = HERE / "results" / "flags-losses.csv"
RESULTS = HERE / "results" / "flags.csv"
TRIALS = 200  # draws of the rows whose answer is wrong
THRESHOLDS = (1.5, 2.0, 2.25, 2.5, 3.0)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One row of a pool; ``tokens`` are those that carry loss."""

    pool: str
    source: str
    tokens: int
    loss: float
    planted: bool  # its answer is wrong as it stands
    wrong_tokens: int | None  # with the answer of another row
    wrong_loss: float | None


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_wrong_answers(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Row number -> the row with the last answer of another row of its source; left out where the two are the same."""
    of_source = defaultdict(list)
    for number, row in enumerate(rows):
        of_source[row["source"]].append(number)
    wrong = {}
    for source in sorted(of_source):
        numbers = of_source[source]
        random.Random(0).shuffle(numbers)
        for number, other in zip(numbers, numbers[1:] + numbers[:1], strict=True):
            own, answer = (rows[n]["messages"][-1] for n in (number, other))
            if own["content"] != answer["content"]:
                row = rows[number]
                wrong[number] = {**row, "id": f"{row['id']}/wrong", "messages": [*row["messages"][:-1], answer]}
    return wrong


def measure(
    name: str, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace, *, dtype: str, swap: bool
) -> list[Row]:
    """Losses of one pool, each row's own and, with ``swap``, that of a wrong answer."""
    wrong = with_wrong_answers(rows) if swap else {}
    path = arguments.out / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *wrong.values()]), encoding="utf-8")
    table = tamis.select(
        model=arguments.model,
        pool=path,
        target=DEMO / "target.jsonl",
        method="mid-ppl",  # all it does is one forward pass
        budget=1,
        dtype=dtype,
        out=arguments.out / name,
    ).table
    losses, tokens = table["loss"].to_pylist(), table["supervised_tokens"].to_pylist()
    place = {number: len(rows) + i for i, number in enumerate(wrong)}
    corrupted = {row["id"] for row in rows if row.get("planted") == "corrupted"}
    found = []
    for number, row in enumerate(rows):
        other = place.get(number)
        found.append(
            Row(
                pool=name,
                source=row["source"],
                tokens=tokens[number],
                loss=losses[number],
                planted=row["id"] in corrupted or row.get("copy_of") in corrupted,
                wrong_tokens=None if other is None else tokens[other],
                wrong_loss=None if other is None else losses[other],
            )
        )
    return found


def kept_losses() -> list[Row]:
    with LOSSES.open() as file:
        return [
            Row(
                pool=row["pool"],
                source=row["source"],
                tokens=int(row["tokens"]),
                loss=float(row["loss"]),
                planted=row["planted"] == "True",
                wrong_tokens=int(row["wrong_tokens"]) if row["wrong_tokens"] else None,
                wrong_loss=float(row["wrong_loss"]) if row["wrong_loss"] else None,
            )
            for row in csv.DictReader(file)
        ]


def around_median(x: Array) -> Array:
    """Median absolute deviation: the usual robust spread, inflated by wrong answers."""
    z: Array = (x - np.median(x)) / (1.4826 * np.median(np.abs(x - np.median(x))))
    return z


def below_median(x: Array) -> Array:
    """What ``flag_high_losses`` does: one standard deviation is from the median down to the 16th percentile."""
    z: Array = (x - np.median(x)) / (np.median(x) - np.quantile(x, 0.15865525393145707))
    return z


def below_median_log(x: Array) -> Array:
    return below_median(np.log(x))


def clipped(x: Array) -> Array:
    """Below the median, again and again without the rows above 2.5, until no more are left out."""
    kept = np.ones(len(x), bool)
    while True:
        z: Array = (x - np.median(x[kept])) / (np.median(x[kept]) - np.quantile(x[kept], 0.15865525393145707))
        if not (kept & (z > 2.5)).any():
            return z
        kept &= z <= 2.5


def low_quantiles(x: Array) -> Array:
    """Mean and spread from the 10th and 40th percentiles: no assumption that the median row is right."""
    low, high = np.quantile(x, [0.1, 0.4])
    spread = (high - low) / (1.2816 - 0.2533)
    z: Array = (x - high - 0.2533 * spread) / spread
    return z


BY_LENGTH, BY_SOURCE, TOGETHER = "source and length", "source", "all rows"
DESIGNS: dict[str, tuple[Callable[[Array], Array], str]] = {
    "MAD": (around_median, BY_LENGTH),
    "below the median": (below_median, BY_LENGTH),
    "below the median, by source": (below_median, BY_SOURCE),
    "below the median, all rows": (below_median, TOGETHER),
    "below the median, log loss": (below_median_log, BY_LENGTH),
    "below the median, clipped": (clipped, BY_LENGTH),
    "10th and 40th percentile": (low_quantiles, BY_LENGTH),
}


def scores(design: str, losses: Array, sources: Array, tokens: Array) -> Array:
    """z of every row within its group of 20 rows or more, or within the next larger one."""
    z_of, grouping = DESIGNS[design]
    together = np.zeros(len(losses), int)
    by_length = sources * 64 + np.floor(np.log2(tokens)).astype(int)
    groupings = {BY_LENGTH: [by_length, sources, together], BY_SOURCE: [sources, together], TOGETHER: [together]}
    z = np.full(len(losses), np.nan)
    for groups in groupings[grouping]:
        for group in np.unique(groups):
            members = groups == group
            waiting = members & np.isnan(z)
            if members.sum() >= 20 and waiting.any():
                z[waiting] = z_of(losses[members])[waiting[members]]
    return z


def separation(right: Array, wrong: Array) -> float:
    """How often a wrong row lies above a right one."""
    ranks = rankdata(np.concatenate([right, wrong]))[len(right) :]
    return float((ranks.sum() - len(wrong) * (len(wrong) + 1) / 2) / (len(right) * len(wrong)))


@dataclass(frozen=True)
class Result:
    """One design at one threshold; rates are means over the draws."""

    design: str
    threshold: float
    flagged_if_clean: float
    precision_5: float  # with wrong answers in 5 % of the rows
    recall_5: float
    precision_20: float
    recall_20: float
    separation_20: float  # whatever the threshold
    demo_found: int  # of the planted wrong answers
    demo_false: int


def compare(rows: Sequence[Row]) -> Iterator[Result]:
    pool, demo = ([row for row in rows if row.pool == name] for name in ("pool", "demo"))
    sources = np.unique([row.source for row in pool], return_inverse=True)[1]
    tokens, loss = np.array([row.tokens for row in pool]), np.array([row.loss for row in pool])
    wrong_tokens = np.array([row.wrong_tokens or row.tokens for row in pool])
    wrong_loss = np.array([row.wrong_loss if row.wrong_loss is not None else np.nan for row in pool])
    demo_sources = np.unique([row.source for row in demo], return_inverse=True)[1]
    demo_arrays = np.array([row.loss for row in demo]), demo_sources, np.array([row.tokens for row in demo])
    planted = np.array([row.planted for row in demo])
    check_library(*demo_arrays)

    for design in DESIGNS:
        clean = scores(design, loss, sources, tokens)
        demo_z = scores(design, *demo_arrays)
        drawn: dict[float, list[tuple[Array, Array]]] = {}
        for share in (0.05, 0.2):
            draws = np.random.default_rng(0)
            drawn[share] = []
            for _ in range(TRIALS):
                bad = np.zeros(len(pool), bool)
                bad[draws.choice(np.flatnonzero(~np.isnan(wrong_loss)), round(share * len(pool)), replace=False)] = True
                shown = np.where(bad, wrong_loss, loss), sources, np.where(bad, wrong_tokens, tokens)
                drawn[share].append((scores(design, *shown), bad))
        separations = [separation(z[~bad], z[bad]) for z, bad in drawn[0.2]]
        for threshold in THRESHOLDS:
            few, many = (mean_rates([(z > threshold, bad) for z, bad in drawn[share]]) for share in (0.05, 0.2))
            yield Result(
                design=design,
                threshold=threshold,
                flagged_if_clean=round(float((clean > threshold).mean()), 4),
                precision_5=few[0],
                recall_5=few[1],
                precision_20=many[0],
                recall_20=many[1],
                separation_20=round(float(np.mean(separations)), 3),
                demo_found=int((demo_z > threshold)[planted].sum()),
                demo_false=int((demo_z > threshold)[~planted].sum()),
            )


def mean_rates(flags: Sequence[tuple[Array, Array]]) -> tuple[float, float]:
    """Precision and recall, means over draws."""
    precision = np.mean([(flagged & bad).sum() / max(1, flagged.sum()) for flagged, bad in flags])
    recall = np.mean([(flagged & bad).sum() / bad.sum() for flagged, bad in flags])
    return round(float(precision), 3), round(float(recall), 3)


def check_library(losses: Array, sources: Array, tokens: Array) -> None:
    """The design that is described here as the library's is the library's."""
    found = flag_high_losses(losses, sources, tokens, HighLoss(min_group=20))
    np.testing.assert_allclose(found.z, scores("below the median", losses, sources, tokens), rtol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--rows", type=int, default=600, help="a random sample of the pool")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("tamis-out/flags"))
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.pool is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = read_rows(arguments.pool)
        sample = [lines[i] for i in sorted(random.Random(0).sample(range(len(lines)), min(arguments.rows, len(lines))))]
        rows = measure("demo", read_rows(DEMO / "pool.jsonl"), arguments, dtype="float32", swap=False)
        write(LOSSES, [*rows, *measure("pool", sample, arguments, dtype=arguments.dtype, swap=True)])
    elif arguments.model is not None or arguments.pool is not None:
        parser.error("--model and --pool go together")
    results = list(compare(kept_losses()))
    write(RESULTS, results)

    table = Table()
    for name in (
        "design",
        "threshold",
        "flagged if clean",
        "5 % wrong: precision",
        "recall",
        "20 %: precision",
        "recall",
    ):
        table.add_column(name, justify="left" if name == "design" else "right")
    table.add_column("separation", justify="right")
    table.add_column("demo: found", justify="right")
    table.add_column("false", justify="right")
    for result in results:
        table.add_row(*map(str, asdict(result).values()))
    Console(width=150).print(table)


def write(path: Path, rows: Sequence[Any]) -> None:
    """Dataclasses as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
