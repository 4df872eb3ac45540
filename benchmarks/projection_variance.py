"""The noise of projected gradients against the formula for it, for rows of 128 to 8,192 tokens.

    python benchmarks/projection_variance.py

The gradient of a linear layer is a sum over a row's tokens, ``X = sum_t g_t a_t^T``. What the two-sided projection does
to ``<X, Y>`` has a variance in closed form (tests/projection_variance.py), in which the length appears only through the
spectra of ``X`` and ``Y``. Here both are made from factors of our own, since the claim is about sketches of sums:
nothing is read from a model, and every length is the same layer. Three kinds of rows:

* ``parallel``: every token's factors are one direction of the row plus a little of their own, so gradients stay near
  rank one however long the row is. The worst case.
* ``decaying``: factors have variances that fall as 1/i and a small mean, shared by both rows, as activations of trained
  models have.
* ``independent``: Gaussian factors with nothing in common; the longer the row, the fuller the rank.

For each: the standard deviation of the projected inner product over ``--draws`` seeds of the library's projector
against the formula's for random signs, both over ``‖X‖ ‖Y‖``; the bias in standard errors; the cosine to hold it
against; and what a dense projection to as many numbers would have. All goes to a CSV file.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tamis.projection.factorized import FactorizedProjector
from tamis.types import LayerSpec

# The formula lives beside the tests that hold it against all sign matrices.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from sketch_variance import dense_variance, factorized_variance

RESULTS = Path(__file__).parent / "results" / "projection-variance.csv"
OUT, IN = 192, 128
LAYER = LayerSpec(name="layer", out_features=OUT, in_features=IN, has_bias=False, kind="linear")
FIELDS = (
    "kind", "tokens", "side", "cosine", "stable_rank", "predicted_sd", "measured_sd", "ratio", "ratio_se", "bias_in_se",
    "dense_sd", "draws",
)  # fmt: skip


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parallel(tokens: int, size: int, row: int, seed: int) -> Tensor:
    shared = normal(size, seed=1000 + size) + normal(size, seed=2000 + size + row)
    return shared + 0.5 * normal(tokens, size, seed=seed)


def decaying(tokens: int, size: int, row: int, seed: int) -> Tensor:
    basis = torch.linalg.qr(normal(size, size, seed=3000 + size))[0]
    found: Tensor = (normal(tokens, size, seed=seed) + 0.15) / torch.arange(1, size + 1).sqrt() @ basis
    return found


def independent(tokens: int, size: int, row: int, seed: int) -> Tensor:
    return normal(tokens, size, seed=seed)


KINDS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "parallel": parallel,
    "decaying": decaying,
    "independent": independent,
}


def factors(kind: str, tokens: int, row: int) -> tuple[Tensor, Tensor]:
    """``grad_out`` (T, O) and ``act`` (T, I) of one row."""
    make = KINDS[kind]
    return make(tokens, OUT, row, 10 * tokens + 2 * row), make(tokens, IN, row, 10 * tokens + 2 * row + 1)


def measure(kind: str, tokens: int, side: int, draws: int) -> dict[str, object]:
    (g, a), (h, c) = (factors(kind, tokens, row) for row in (0, 1))
    x, y = g.T @ a, h.T @ c
    scale = float(x.norm() * y.norm())
    exact = float((x * y).sum())
    found = torch.empty(draws, dtype=torch.float64)
    first_seed = 1_000_000 * (tokens + side)  # lengths and sides share no draw; kinds do
    for draw in range(draws):
        projector = FactorizedProjector(dim=side, seed=first_seed + draw)
        first, second = projector.project_gradient(LAYER, torch.stack([x, y]))
        found[draw] = first @ second
        if draw == 0:  # projecting the sum is projecting every token and adding up
            left, right = projector.sides(LAYER, "cpu", torch.float64)
            small = (g if left is None else g @ left).T @ (a if right is None else a @ right)
            torch.testing.assert_close(first, small.flatten(), rtol=1e-9, atol=1e-9 * scale)
    k_out, k_in = side if side < OUT else None, side if side < IN else None
    predicted = factorized_variance(x, y, k_out=k_out, k_in=k_in) ** 0.5 / scale
    measured = float(found.std()) / scale
    centred = (found - found.mean()) / found.std()
    tails = float((centred**4).mean())  # the standard error of a standard deviation is that of its fourth moment
    stable_rank = float(x.norm() ** 2 / torch.linalg.matrix_norm(x, ord=2) ** 2)
    return {
        "kind": kind,
        "tokens": tokens,
        "side": side,
        "cosine": f"{exact / scale:.4f}",
        "stable_rank": f"{stable_rank:.2f}",
        "predicted_sd": f"{predicted:.5f}",
        "measured_sd": f"{measured:.5f}",
        "ratio": f"{measured / predicted:.3f}",
        "ratio_se": f"{(max(tails - 1, 0.0) / (4 * draws)) ** 0.5 * measured / predicted:.3f}",
        "bias_in_se": f"{(float(found.mean()) - exact) / (float(found.std()) / draws**0.5):.2f}",
        "dense_sd": f"{dense_variance(x.flatten(), y.flatten(), dim=side * side) ** 0.5 / scale:.5f}",
        "draws": draws,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for kind in arguments.kinds:
            for tokens in arguments.tokens:
                for side in arguments.sides:
                    line = measure(kind, tokens, side, arguments.draws)
                    writer.writerow(line)
                    file.flush()
                    print(" ".join(f"{name} {value}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
