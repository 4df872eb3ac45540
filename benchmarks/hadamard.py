"""The randomized Hadamard projection: how long, beside other ways to compute it, and how far inner products are off.

    python benchmarks/hadamard.py

Speed: one vector of 2^20 to 2^24 entries, processor time on one thread, against butterflies (one pass over memory a
bit) and against the two-sided matrix product of two factors. Every repeat times all of them in turn; ratios are formed
within a repeat. Distortion: 20 correlated unit vectors of four kinds, 200 draws; the mean error of their inner products
(bias) and its root mean square, beside that of dense random signs.

    python benchmarks/hadamard.py --model MODEL --pool POOL

Instead: what whole gradients of a real model cost a row with each projection, forward and backward pass included, and
how far their cosines lie from those of the Hadamard projection to 32,768 numbers.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tamis.data.batches import collate
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.gradients.per_sample import per_sample_features
from tamis.maths.hadamard import fwht, hadamard_matrix
from tamis.maths.similarity import unit_rows
from tamis.model.load import ModelSettings, load_model, load_tokenizer
from tamis.model.targets import gradient_layers
from tamis.projection import HadamardProjector, make_projector

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


def whole_gradients(model_name: str, pool: str, *, rows: int, dtype: str) -> list[dict[str, object]]:
    """Processor seconds a row, and cosines beside those of the best projection here, for short rows of a pool."""
    renderer = Renderer(load_tokenizer(ModelSettings(name=model_name)), max_length=256)
    settings = ModelSettings(name=model_name, dtype=dtype, device="cpu", attention="eager")
    examples = []
    for example in read_examples([pool]):
        row = renderer.render(example)
        if row.num_supervised and not row.truncated:
            examples.append(row)
        if len(examples) == rows:
            break
    model = load_model(settings).model
    layers, found, lines = gradient_layers(model, include_head=False), {}, list[dict[str, object]]()
    tokens = sum(len(row.input_ids) for row in examples)
    for name, dim in (("hadamard", 32768), ("hadamard", 8192), ("factorized", 32), ("factorized", 16)):
        projector = make_projector(name, dim=dim, seed=0)
        per_sample_features(
            model, collate(np.arange(1), examples[:1], 0), layers, projector
        )  # draws what it needs once
        taken, features = [], []
        for index, row in enumerate(examples):
            batch = collate(np.array([index]), [row], 0)
            start = time.process_time()
            features.append(per_sample_features(model, batch, layers, projector)[1].float())
            taken.append(time.process_time() - start)
        unit = unit_rows(torch.cat(features))
        found[name, dim] = (unit @ unit.T)[torch.triu(torch.ones(rows, rows), 1) > 0]
        truth, own = found["hadamard", 32768], found[name, dim]
        lines.append(
            {
                "projection": name,
                "dim": dim,
                "seconds_a_row": round(statistics.fmean(taken), 3),
                "tokens_a_row": round(tokens / rows, 1),
                "rows": rows,
                "spread_of_cosines": round(float(truth.std()), 4),
                "rms_difference": round(float((own - truth).square().mean().sqrt()), 4),
                "correlation": round(float(torch.corrcoef(torch.stack([own, truth]))[0, 1]), 4),
                "dtype": dtype,
            }
        )
        print(*lines[-1].values(), sep="  ", flush=True)
    return lines


def write(path: Path, lines: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--model", help="measure whole gradients of this model instead")
    parser.add_argument("--pool", help="rows for that")
    parser.add_argument("--rows", type=int, default=32, help="the first so many of at most 256 tokens")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if (options.model is None) != (options.pool is None):
        parser.error("--model and --pool go together")
    if options.model is not None:
        lines = whole_gradients(options.model, options.pool, rows=options.rows, dtype=options.dtype)
        return write(options.folder / "hadamard-gradients.csv", lines)
    write(options.folder / "hadamard-speed.csv", speed(options.repeats))
    write(options.folder / "hadamard-distortion.csv", distortion())
    return None


if __name__ == "__main__":
    main()
