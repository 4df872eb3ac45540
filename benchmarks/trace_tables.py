"""Tables over seeds of what trace_fidelity.py measured: means, intervals, paired differences, figures 2 to 4.

Where runs were measured with several numbers of samples, tables hold those with most.

    python benchmarks/trace_tables.py
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student

from trace_runs import RESULTS, read

Row = Mapping[str, str]
METHODS = ("adamw exact", "adamw exact, finite removal 10", "adamw none", "sgd exact", "tracin")
BINS = ((1, 10), (11, 30), (31, 60), (61, 94))
PARTS = ("part_optimizer", "part_update", "part_rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    everything, samples = (read(args.results / f"trace-fidelity{name}.csv") for name in ("", "-samples"))
    summary, most = with_most_samples(everything), with_most_samples(samples)
    fidelity(summary, "spearman_mean_loss", "Spearman's correlation for the mean loss of the target rows")
    fidelity(summary, "spearman", "Spearman's correlation for single target rows, averaged")
    relative_errors(summary)
    decomposition(most)
    by_update(most)
    lengths_of_errors(samples)
    update_errors(samples)


def fidelity(rows: Sequence[Row], column: str, title: str) -> None:
    print(f"\n{title}: mean ± half a 95 % interval over seeds; last, AdamW- minus SGD-influence of the same seeds")
    print("network, optimizer, updates, rate", "seeds", *METHODS, "difference", sep=" | ")
    for key, own in grouped(rows, ("model", "optimizer", "steps", "rate")).items():
        found = {name: by_seed([row for row in own if row["method"] == name], column) for name in METHODS}
        first, second = found["adamw exact"], found["sgd exact"]
        paired = [first[seed] - second[seed] for seed in first if seed in second]
        if first:
            cells = [interval(list(own.values())) for own in found.values()]
            print(" ".join(key), len(first), *cells, interval(paired), sep=" | ")


def relative_errors(rows: Sequence[Row]) -> None:
    print("\nRelative error of the scores, median over seeds: means say nothing of what explodes")
    for key, own in grouped(rows, ("model", "optimizer", "steps", "rate")).items():
        by_method = grouped(own, ("method",))
        cells = [
            f"{name} {np.median([float(row['relative_error']) for row in lines]):.2g}"
            for (name,), lines in by_method.items()
        ]
        print(*key, *cells, sep=" | ")


def decomposition(rows: Sequence[Row]) -> None:
    print("\nFigure 2, parts of SGD-influence's error by the removed sample's update, mean of absolute values:")
    print("optimizer, update, rest, and the optimizer's share of their sum")
    for key, own in whole_runs(rows).items():
        for low, high in BINS:
            here = [row for row in own if low <= int(row["step"]) <= high]
            if here:
                parts = [float(np.mean([float(row[part]) for row in here])) for part in PARTS]
                shown = [f"{part:.2g}" for part in parts]
                print(*key, f"updates {low} to {high}", *shown, f"{parts[0] / sum(parts):.0%}", sep=" | ")


def by_update(rows: Sequence[Row]) -> None:
    print("\nBy the removed sample's update: Spearman's correlation of AdamW-influence with the truth, within each run")
    for key, own in whole_runs(rows).items():
        for low, high in BINS:
            here = [row for row in own if low <= int(row["step"]) <= high]
            found = [correlation(lines, "adamw", "truth") for lines in grouped(here, ("seed",)).values()]
            if here:
                print(*key, f"updates {low} to {high}", interval(found), sep=" | ")


def lengths_of_errors(rows: Sequence[Row]) -> None:
    print(
        "\nFigure 3, by the removed sample's update: length of the error of the estimated final parameters, median of"
    )
    print("all seeds' samples")
    for key, own in whole_runs([row for row in rows if row["update_error"]]).items():
        for low, high in BINS:
            errors = [float(row["update_error"]) for row in own if low <= int(row["step"]) <= high]
            if errors:
                print(*key, f"updates {low} to {high}", f"{np.median(errors):.2g}", sep=" | ")


def update_errors(rows: Sequence[Row]) -> None:
    print("\nFigure 4, element-wise estimate against true error: Spearman within each run, median ratio, samples")
    for key, own in grouped([row for row in rows if row["proxy"]], ("model", "steps", "rate")).items():
        found = [correlation(lines, "proxy", "update_error") for lines in grouped(own, ("seed",)).values()]
        ratio = float(np.median([float(row["proxy"]) / float(row["update_error"]) for row in own]))
        print(*key, f"{len(found)} seeds", interval(found), f"{ratio:.2g}", len(own), sep=" | ")


def with_most_samples(rows: Sequence[Row]) -> list[Row]:
    """Of every model, optimizer, length, rate and seed, the run of which most samples were left out."""
    found = list[Row]()
    for own in grouped(rows, ("model", "optimizer", "steps", "rate", "seed")).values():
        most = max(int(row["samples"]) for row in own)
        found += [row for row in own if int(row["samples"]) == most]
    return found


def whole_runs(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """AdamW runs of the longest length of each model."""
    own = [row for row in rows if row["optimizer"] == "adamw"]
    longest = {model: max(int(row["steps"]) for row in lines) for (model,), lines in grouped(own, ("model",)).items()}
    return grouped([row for row in own if int(row["steps"]) == longest[row["model"]]], ("model", "rate"))


def grouped(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    found = defaultdict[tuple[str, ...], list[Row]](list)
    for row in rows:
        found[tuple(row[column] for column in columns)].append(row)
    return dict(found)


def by_seed(rows: Sequence[Row], column: str) -> dict[str, float]:
    return {row["seed"]: float(row[column]) for row in rows if row[column]}


def correlation(rows: Sequence[Row], one: str, other: str) -> float:
    measure: Callable[..., tuple[float, float]] = spearmanr
    return float(measure([float(row[one]) for row in rows], [float(row[other]) for row in rows])[0])


def interval(values: Sequence[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    if len(known) < 2:
        return short(known[0]) if known else "-"
    half = student.ppf(0.975, len(known) - 1) * float(np.std(known, ddof=1)) / len(known) ** 0.5
    return f"{short(float(np.mean(known)))} ± {short(half)}"


def short(value: float) -> str:
    """Two decimals, three where two would round to 1.00; no zero before the point."""
    shown = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.3f}"
    return shown.replace("0.", ".", 1) if abs(value) < 1 else shown


if __name__ == "__main__":
    main()
