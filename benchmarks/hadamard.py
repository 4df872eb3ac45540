"""The randomized Hadamard projection: how long, beside other ways to compute it, and how far inner products are off.

    python benchmarks/hadamard.py

Speed: one vector of 2^20 to 2^24 entries, processor time on one thread, against butterflies (one pass over memory a
bit) and against the two-sided matrix product of two factors. Every repeat times all of them in turn; ratios are formed
within a repeat. Distortion: 20 correlated unit vectors of four kinds, 200 draws; the mean error of their inner products
(bias) and its root mean square, beside that of dense random signs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tamis.maths.hadamard import fwht, hadamard_matrix
from tamis.projection import HadamardProjector

RESULTS = Path(__file__).parent / "results"
DRAWS, VECTORS = 200, 20


def butterflies(x: Tensor) -> Tensor:
    """The transform as textbooks have it: one addition and one subtraction for every pair, bit by bit."""
    x = x.clone()
    half = 1
    while half < len(x):
        pairs = x.view(-1, 2, half)
        left, right = pairs[:, 0].clone(), pairs[:, 1]
        torch.add(left, right, out=pairs[:, 0])
        torch.sub(left, right, out=pairs[:, 1])
        half *= 2
    return x


def two_factors(x: Tensor) -> Tensor:
    """``H_m X H_n`` with two large matrices, as published."""
    bits = len(x).bit_length() - 1
    rows = 1 << (bits // 2)
    left, right = hadamard_matrix(rows, dtype=x.dtype), hadamard_matrix(len(x) // rows, dtype=x.dtype)
    return (left @ x.view(rows, -1) @ right).reshape(-1)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def speed(repeats: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for bits in (20, 22, 24):
        x = torch.randn(1 << bits, generator=torch.Generator().manual_seed(0))
        ways: dict[str, Callable[[], object]] = {
            "factors of 32 (ours)": lambda x=x: fwht(x),  # type: ignore[misc]
            "butterflies": lambda x=x: butterflies(x),  # type: ignore[misc]
            "two factors": lambda x=x: two_factors(x),  # type: ignore[misc]
        }
        for outputs in (256, 8192, 131072):
            projector = HadamardProjector(dim=outputs, seed=0)
            ways[f"projection to {outputs}"] = lambda x=x, p=projector: p.project(x[None])  # type: ignore[misc]
        expected = fwht(x)
        for other in (butterflies(x), two_factors(x)):
            torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            run()  # draws signs and buffers once
        for _ in range(repeats):
            for name, run in ways.items():
                taken[name].append(seconds(run))
        for name, own in taken.items():
            ratios = [mine / ours for mine, ours in zip(own, taken["factors of 32 (ours)"], strict=True)]
            lines.append(
                {
                    "entries": 1 << bits,
                    "what": name,
                    "seconds": round(statistics.median(own), 5),
                    "over_ours": round(statistics.median(ratios), 2),
                    "least": round(min(ratios), 2),
                    "most": round(max(ratios), 2),
                    "repeats": repeats,
                }
            )
            print(*lines[-1].values(), sep="  ", flush=True)
    return lines


def unit_vectors(kind: str, entries: int) -> Tensor:
    """Correlated rows of length 1, as gradients of related rows are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(VECTORS, entries, generator=generator) + torch.randn(entries, generator=generator)
    if kind == "heavy-tailed":
        x = x.sign() * x.abs() ** 4
    elif kind == "sparse":
        x = x * (torch.rand(entries, generator=generator) < 0.01)
    elif kind == "one block":
        x = x * (torch.arange(entries) < entries // 50)
    return torch.nn.functional.normalize(x)


def dense_signs(x: Tensor, outputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (x.shape[1], outputs), generator=generator).mul_(2).sub_(1).float()
    return torch.mm(x, signs).mul_(outputs**-0.5)


def randomized_hadamard(x: Tensor, outputs: int, seed: int) -> Tensor:
    return HadamardProjector(dim=outputs, seed=seed).project(x)


def distortion() -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for entries in (3000, 5000):
        for kind in ("Gaussian", "heavy-tailed", "sparse", "one block"):
            x = unit_vectors(kind, entries)
            exact = (x @ x.T)[torch.triu(torch.ones(VECTORS, VECTORS), 1) > 0]
            for outputs in (256, 1024):
                for name, projector in (("hadamard", randomized_hadamard), ("dense signs", dense_signs)):
                    errors = []
                    for seed in range(DRAWS):
                        y = projector(x, outputs, seed)
                        errors.append((y @ y.T)[torch.triu(torch.ones(VECTORS, VECTORS), 1) > 0] - exact)
                    error = torch.stack(errors)
                    lines.append(
                        {
                            "entries": entries,
                            "kind": kind,
                            "outputs": outputs,
                            "projection": name,
                            "bias": round(float(error.mean()), 5),
                            "worst_pair_bias": round(float(error.mean(0).abs().max()), 5),
                            "rms": round(float(error.square().mean().sqrt()), 5),
                            "one_over_root": round(outputs**-0.5, 5),
                            "draws": DRAWS,
                        }
                    )
                    print(*lines[-1].values(), sep="  ", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, lines in (("hadamard-speed", speed(options.repeats)), ("hadamard-distortion", distortion())):
        with (options.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
