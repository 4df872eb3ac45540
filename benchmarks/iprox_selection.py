"""What is selected through a proxy, and how it differs from what the full model selects.

    python benchmarks/iprox_selection.py --model DIR --proxies PROXY1 PROXY2 --pool pool.jsonl \\
        --target a.jsonl b.jsonl --budget 5% --out tamis-out/iprox-selection

Table 6 of *IProX* (2026), and more. The proxies are folders of ``tamis proxy``; ``uniform`` and ``bm25`` stand beside
them. Of every selection, all in the full model's sketched gradients:

- ``overlap``: its share that the full model selects, too; ``expected`` is what a random choice would share.
- ``spearman``: of the pool's scores with the full model's.
- ``affinity``: of the span of the selected rows' gradients with that of the target rows': ``|U^T V|_F`` over the root
  of the smaller dimension, 0 to 1 (Soltanolkotabi et al., 2014). Spans of as many rows as the budget: compare at one.
- ``nearest``: the mean distance of a selected row's gradient, brought to length 1, to the nearest other one (1-NND).
- ``sources``: its largest sources, in percent.

Features are shared between targets through one store per model. Interrupt it and run it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import tamis
from tamis.maths.ranks import rank_correlation
from tamis.maths.similarity import unit_rows
from tamis.score.features import read_features
from tamis.store.reader import StageReader

FIELDS = (
    "method",
    "model",
    "target",
    "budget",
    "rows",
    "selected",
    "overlap",
    "expected",
    "spearman",
    "affinity",
    "nearest",
    "seconds",
    "sources",
)
FULL, BASELINES = "full", ("uniform", "bm25")


def sample(file: Path, rows: int | None, folder: Path) -> Path:
    """The whole file, or a random sample of its lines in their order (seed 0)."""
    if rows is None:
        return file
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = sorted(random.Random(0).sample(range(len(lines)), min(rows, len(lines))))
    path = folder / f"{file.stem}-{rows}.jsonl"
    path.write_text("".join(lines[index] for index in kept), encoding="utf-8")
    return path


def unit_features(selection: tamis.Selection, store: Path, kind: str) -> torch.Tensor:
    """Gradients of length 1 that a ``tracin`` selection left in its store, of its "pool" or its "target" rows."""
    content = selection.manifest["data"][kind]["content"]
    stages = [StageReader(path.parent) for path in sorted(store.glob(f"*-{kind}-*/manifest.json"))]
    tokens = [stage.fingerprint for stage in stages if stage.spec.get("data") == content]
    found = [stage for stage in stages if stage.spec.get("tokens") in tokens and "feature" in stage.names]
    if len(found) != 1:
        raise SystemExit(f"{store}: expected one stage of {kind} gradients, found {len(found)}; delete the folder")
    return unit_rows(read_features(found[0], 0, found[0].num_rows))


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """A basis ``(K, r)`` of the span of ``(n, K)`` rows, without the directions that are rounding."""
    values, vectors = torch.linalg.eigh(rows.double() @ rows.double().T)  # n is small, K is not
    kept = values > 1e-6 * values.max()
    basis: torch.Tensor = rows.double().T @ vectors[:, kept] / values[kept].sqrt()
    return basis


def affinity(rows: torch.Tensor, others: torch.Tensor) -> float:
    """How much of one span lies in the other: 1 if the smaller one is part of the larger one."""
    first, second = orthonormal(rows), orthonormal(others)
    return float((first.T @ second).norm()) / math.sqrt(min(first.shape[1], second.shape[1]))


def nearest_distance(units: torch.Tensor) -> float:
    """Mean distance to the nearest other row."""
    cosines = (units @ units.T).fill_diagonal_(-1.0)
    return float((2 - 2 * cosines.amax(dim=1)).clamp_min(0).sqrt().mean())


def select(name: str, method: str, target: Path, pool: Path, arguments: argparse.Namespace) -> tamis.Selection:
    """By the full model or a proxy; ``BASELINES`` ask no model."""
    label = Path(name).name
    return tamis.select(
        model=arguments.model if name == FULL or method in BASELINES else name,
        method=method,
        set=arguments.set if method == arguments.method else {},
        pool=pool,
        target=target,
        budget=arguments.budget,
        dtype=arguments.dtype,
        attention=arguments.attention,
        batch_tokens=arguments.batch_tokens,
        max_length=arguments.max_length,
        on_bad_row="skip",
        report=False,
        out=arguments.out / f"{method}-{label}-{target.stem}-{pool.stem}-{arguments.budget}",
        store=str(arguments.out / f"store-{label}"),
    )


def scored(selection: tamis.Selection) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Scores of the pool, NaN where there is none."""
    return np.array(selection.table["score"].to_pylist(), dtype=np.float64)


def lines(target: Path, pool: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything about the selections for one target, the full model's first."""
    measuring = select(FULL, "tracin", target, pool, arguments)
    store = arguments.out / f"store-{FULL}"
    units, of_target = (unit_features(measuring, store, kind) for kind in ("pool", "target"))
    place = {int(row): index for index, row in enumerate(np.flatnonzero(~np.isnan(scored(measuring))))}
    full = select(FULL, arguments.method, target, pool, arguments)
    theirs, wanted = scored(full), set(full.order.tolist())
    for name in (FULL, *arguments.proxies, *BASELINES):
        method = name if name in BASELINES else arguments.method
        selection = select(name, method, target, pool, arguments)
        rows = selection.order.tolist()
        ours = scored(selection)
        both = ~np.isnan(theirs) & ~np.isnan(ours)
        correlation = None if name == "uniform" else rank_correlation(ours[both], theirs[both])
        own = units[[place[row] for row in rows if row in place]]
        sources = Counter(np.array(selection.table["source"].to_pylist())[rows].tolist()).most_common(4)
        yield {
            "method": method,
            "model": Path(name).name,
            "target": target.stem,
            "budget": arguments.budget,
            "rows": len(theirs),
            "selected": len(rows),
            "overlap": round(len(wanted & set(rows)) / len(rows), 4),
            "expected": round(len(wanted) / len(place), 4),
            "spearman": "" if correlation is None else round(correlation, 4),
            "affinity": round(affinity(own, of_target), 4),
            "nearest": round(nearest_distance(own), 4),
            "seconds": round(selection.manifest["cost"]["total_seconds"], 1),
            "sources": ", ".join(f"{source} {count / len(rows):.0%}" for source, count in sources),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--proxies", nargs="+", required=True, help="folders of different names")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--target", type=Path, nargs="+", required=True)
    parser.add_argument("--method", default="tracin", help="by which full model and proxies select")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=VALUE of the method")
    parser.add_argument("--budget", default="5%")
    parser.add_argument("--rows", type=int, help="a random sample of the pool")
    parser.add_argument("--target-rows", type=int, help="a random sample of every target")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--out", type=Path, default=Path("tamis-out/iprox-selection"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/iprox_selection.csv"))
    arguments = parser.parse_args()
    arguments.set = {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in arguments.set)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    pool = sample(arguments.pool, arguments.rows, arguments.out)
    with arguments.csv.open(
        "w", newline=""
    ) as file:  # from what the folders of --out hold, so it is whole or cut short
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for path in arguments.target:
            for line in lines(sample(path, arguments.target_rows, arguments.out), pool, arguments):
                writer.writerow(line)
                file.flush()
                print(
                    ", ".join(f"{name} {line[name]}" for name in FIELDS if name not in ("budget", "rows")), flush=True
                )


if __name__ == "__main__":
    main()
