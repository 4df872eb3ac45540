"""Time and memory from scores to selection: ``python benchmarks/selection.py [--rows 1000000 --targets 100]``.

Each case runs in a process of its own, so that its peak memory is its own: the interpreter, the scores and everything
the selection needs. Prints a table and writes every repeat to ``benchmarks/results/selection.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tamis.budget import parse_budget
from tamis.selection.choose import choose
from tamis.types import TargetScores

RESULTS = Path(__file__).parent / "results" / "selection.csv"

# name: how alike the columns are (0 independent, 1 equal), where the scores lie, copies, aggregate, budget
CASES: dict[str, dict[str, Any]] = {
    "independent": {"alike": 0.0},
    "alike": {"alike": 0.9},
    "equal columns": {"alike": 1.0},
    "alike, memmap": {"alike": 0.9, "memmap": True},
    "alike, 10% copies": {"alike": 0.9, "copies": 0.1},
    "alike, mean": {"alike": 0.9, "aggregate": "mean"},
    "alike, tokens": {"alike": 0.9, "budget": "10m-tokens"},
    "alike, 50%": {"alike": 0.9, "budget": "50%"},
}


def make_values(rows: int, columns: int, alike: float, folder: str | None) -> np.ndarray:
    """Normal scores with a common part per row, made in blocks so that making them does not set the peak."""
    if folder is None:
        values = np.empty((rows, columns), np.float32)
    else:
        values = np.memmap(Path(folder) / "values.f32", np.float32, "w+", shape=(rows, columns))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 20_000):
        stop = min(rows, start + 20_000)
        common = rng.standard_normal((stop - start, 1), np.float32)
        own = rng.standard_normal((stop - start, columns), np.float32)
        values[start:stop] = np.sqrt(alike, dtype=np.float32) * common + np.sqrt(1 - alike, dtype=np.float32) * own
    return values


def measure(case: str, rows: int, columns: int) -> dict[str, float]:
    """One repeat of one case, in this process."""
    settings = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        values = make_values(rows, columns, settings["alike"], folder if settings.get("memmap") else None)
        rng = np.random.default_rng(1)
        first_of = np.arange(rows)
        copies = np.flatnonzero(rng.random(rows) < settings.get("copies", 0.0))
        first_of[copies] = first_of[rng.integers(0, np.maximum(copies, 1))]  # of an earlier row
        first_of = np.minimum(first_of, first_of[first_of])
        scores = TargetScores(
            rows=np.arange(rows),
            values=values,
            group=np.arange(columns) * 4 // columns,  # four targets of equally many rows
            target_names=("a", "b", "c", "d"),
        )
        tokens = rng.integers(20, 400, rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        choice = choose(
            scores,
            budget=parse_budget(settings.get("budget", "5%")),
            tokens=tokens,
            aggregate=settings.get("aggregate", "round-robin"),
            first_of=first_of if settings.get("copies") else None,
        )
        elapsed = time.perf_counter() - started
    unit = 1024 if platform.system() == "Linux" else 1024**2  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "selected": len(choice.order),
        "elapsed_s": round(elapsed, 3),
        "peak_mb": round(peak / unit),
        "extra_mb": round((peak - before) / unit),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--targets", type=int, default=100, help="score columns, in four targets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help="measure this one here and print JSON (what the parent runs)")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.rows, arguments.targets)))
        return

    records = []
    for repeat in range(arguments.repeats):
        for case in CASES:
            command = [sys.executable, __file__, "--case", case]
            command += ["--rows", str(arguments.rows), "--targets", str(arguments.targets)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            shape = {"case": case, "rows": arguments.rows, "columns": arguments.targets, "repeat": repeat}
            records.append({**shape, **json.loads(answer), "cores": os.cpu_count()})
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)

    print(f"{arguments.rows} rows x {arguments.targets} columns; median of {arguments.repeats} (least - most)")
    for case in CASES:
        own = [record for record in records if record["case"] == case]
        times, peaks = [r["elapsed_s"] for r in own], [r["peak_mb"] for r in own]
        print(
            f"{case:18} {statistics.median(times):6.1f} s ({min(times):.1f} - {max(times):.1f})"
            f"   peak {max(peaks)} MB, of which above the scores {max(r['extra_mb'] for r in own)} MB"
            f"   {own[0]['selected']} rows"
        )
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
