"""Seconds, certified gap and linear solves of the robust-weight solvers on synthetic pools.

    python benchmarks/simplex_qp.py
    python benchmarks/simplex_qp.py --sizes 200000 --rank 4096 --quick --first-order-rows 0 --csv /tmp/wide.csv

First order is the closed form at 5.8 million rows. Second order is ``Q = U U^T`` with U (n, rank): rows that share a
direction and have a decaying spectrum, as gradients have, scores that follow the same factors plus noise, and a size of
Q at which the second-order term is ``--ratio`` of the first-order one at the first-order weights. λ leaves 5 % of the
rows in first order; the last line of each size looks for the λ that leaves 5 % with Q. All of it goes to a CSV file.
"""

from __future__ import annotations

import argparse
import csv
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tamis.solve.quadratic import LowRankQuadratic
from tamis.solve.simplex_closed_form import lambda_interval, weights_for_count
from tamis.solve.simplex_qp import solve_simplex_qp, solve_simplex_qp_for_count
from tamis.solve.solution import Solution

FIELDS = ("problem", "n", "rank", "dtype", "start", "seconds", "gap", "solves", "gradient_steps", "nonzero", "peak_gb")


def first_order(n: int) -> dict[str, object]:
    p = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    begin = time.perf_counter()
    solution = weights_for_count(p, n // 20)
    return line("first order, k = 5%", n, 0, "float32", "-", time.perf_counter() - begin, solution)


def pool(n: int, rank: int, dtype: torch.dtype, ratio: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Scores, U and the first-order λ."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(n, rank, generator=generator, dtype=dtype)
    u *= torch.arange(1, rank + 1, dtype=dtype) ** -0.5
    u[:, 0] += 1
    p = u @ torch.randn(rank, generator=generator, dtype=dtype) / 3 + torch.randn(n, generator=generator, dtype=dtype)
    first = weights_for_count(p.numpy(), n // 20)
    w = torch.from_numpy(first.value).to(dtype)
    size = float((u.T @ w).double().square().sum()) / 2 / abs(float((p @ w).double()))
    u *= (ratio / size) ** 0.5
    return p, u, lambda_interval(p.numpy(), n // 20)[1]


def second_order(n: int, rank: int, dtype: torch.dtype, ratio: float, *, quick: bool) -> list[dict[str, object]]:
    p, u, lam = pool(n, rank, dtype, ratio)
    name = str(dtype).removeprefix("torch.")
    lines = []
    starts = {"first-order support": None} if quick else {"first-order support": None, "all rows": p == p}
    for label, start in starts.items():
        quadratic = LowRankQuadratic(u)
        begin = time.perf_counter()
        solution = solve_simplex_qp(p, quadratic, lam, start=start)
        lines.append(line("second order, given λ", n, rank, name, label, time.perf_counter() - begin, solution))
    if quick:
        return lines
    begin = time.perf_counter()
    solution = solve_simplex_qp_for_count(p, LowRankQuadratic(u), n // 20)
    lines.append(line("second order, k = 5%", n, rank, name, "-", time.perf_counter() - begin, solution))
    return lines


def line(
    problem: str, n: int, rank: int, dtype: str, start: str, seconds: float, solution: Solution[Any]
) -> dict[str, object]:
    stats = solution.stats
    values = {
        "problem": problem,
        "n": n,
        "rank": rank,
        "dtype": dtype,
        "start": start,
        "seconds": round(seconds, 2),
        "gap": f"{stats['gap']:.1e}",
        "solves": stats.get("solves", 0),
        "gradient_steps": stats.get("gradient_steps", 0),
        "nonzero": stats["nonzero"],
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),  # of the process so far
    }
    print(", ".join(f"{key} {value}" for key, value in values.items()), flush=True)
    print(f"    {solution.status}", flush=True)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 200_000])
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "float64"), default="auto", help="auto: float64 to 20,000"
    )
    parser.add_argument("--first-order-rows", type=int, default=5_800_000)
    parser.add_argument("--quick", action="store_true", help="only a given λ, from the first-order support")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/simplex_qp.csv"))
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    lines = [first_order(arguments.first_order_rows)] if arguments.first_order_rows else []
    for n in arguments.sizes:
        small = n <= 20_000 if arguments.dtype == "auto" else arguments.dtype == "float64"
        dtype = torch.float64 if small else torch.float32
        lines += second_order(n, arguments.rank, dtype, arguments.ratio, quick=arguments.quick)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
