"""Figure 8 of Influence Distillation: the second-order term beside the first, against the learning rate.

    python benchmarks/second_order_ratio.py --model MODEL --pool POOL --target GSM8K MMLU --csv results.csv

As the paper has it: p and Q exactly, by Hessian products, for a few pool and target rows; |T2 / T1| with T1 = p·w and
T2 = (η/2) w·Qw. Beyond it: raw gradients and gradients of length 1 (the target's loss scaled alike), weights 1 and
weights on the best tenth, and how many of the best tenth by the first order alone stay in when the robust weights are
solved with Q. The normalisation changes the ratio by a factor of ten; the paper does not say which one it has.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tamis.data.batches import collate
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.gradients.hessian import hessian_products
from tamis.gradients.per_sample import MaterialisedGradients, run_batch
from tamis.maths.second_order import TermRatio
from tamis.model.load import ModelSettings, load_model
from tamis.model.targets import gradient_layers
from tamis.solve.quadratic import LowRankQuadratic, landmark_root
from tamis.solve.simplex_closed_form import weights_for_count
from tamis.solve.simplex_qp import solve_simplex_qp_for_count
from tamis.types import Batch

ETAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TOP = 0.1


def read_rows(path: Path, count: int, tokenizer: Any, folder: Path, *, max_length: int) -> list[Batch]:
    """The first rows whose answers are not cut off, each a batch of its own; chats as prompt and answer."""
    kept = folder / f"{path.stem}-{count}.jsonl"
    with path.open(encoding="utf-8") as lines, kept.open("w", encoding="utf-8") as out:
        for line in lines:
            messages = json.loads(line)["messages"]
            out.write(json.dumps({"prompt": messages[0]["content"] + " ", "completion": messages[1]["content"]}) + "\n")
    renderer = Renderer(tokenizer, max_length=max_length)
    batches = []
    for number, example in enumerate(read_examples([str(kept)])):
        row = renderer.render(example)
        if row.num_supervised and not row.truncated:
            batches.append(collate(np.array([number]), [row], 0))
        if len(batches) == count:
            break
    return batches


def gradients_of(model: Any, layers: Any, batches: list[Batch]) -> Tensor:
    found = []
    for batch in batches:
        whole = MaterialisedGradients(layers)
        run_batch(model, batch, layers, whole)
        found.append(whole.grads.double())
    return torch.cat(found)


def quadratic_of(model: Any, layers: Any, pool: Tensor, target: list[Batch], coefficients: Tensor) -> Tensor:
    """``Q`` of equation 4, ``(n, n)``, from one Hessian product per pool row."""
    parts = torch.split(pool.float(), [layer.numel for layer in layers], dim=1)
    directions = {layer.name: part.view(-1, *layer.shape) for layer, part in zip(layers, parts, strict=True)}
    batches = [(batch, coefficients[j : j + 1].float()) for j, batch in enumerate(target)]
    products = hessian_products(model, batches, layers, directions)
    flat = torch.cat([products[layer.name].flatten(1) for layer in layers], dim=1).double()
    q = pool @ flat.T / max(len(pool), 1)
    return (q + q.T) / 2


def lines_of(p: Tensor, q: Tensor) -> list[dict[str, Any]]:
    n = len(p)
    count = max(1, round(TOP * n))
    first = torch.from_numpy(np.asarray(weights_for_count(p.numpy(), count, break_ties=True).value))
    eigenvalues = torch.linalg.eigvalsh(q)
    lines = []
    for eta in ETAS:
        equal, top = (
            TermRatio(first=float(p @ w), second=eta / 2 * float(w @ q @ w)) for w in (torch.ones_like(p), first)
        )
        root = landmark_root(q, eta=eta, pool_size=n).root
        solved = solve_simplex_qp_for_count(p, LowRankQuadratic(root), count)
        kept = int(((solved.value > 0) & (first > 0)).sum())
        lines.append(
            {
                "eta": f"{eta:g}",
                "ratio_equal_weights": f"{equal.ratio:.3g}",
                "ratio_top_tenth": f"{top.ratio:.3g}",
                "top_tenth_kept": f"{kept / count:.2f}",
                "gap": f"{float(solved.stats['gap']):.1e}",
                "negative_eigenvalues": int((eigenvalues < -1e-12 * eigenvalues.abs().max()).sum()),
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True, help="JSONL of chats")
    parser.add_argument("--target", type=Path, nargs="+", required=True, help="JSONL of chats, one file per target")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--target-rows", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("second-order-ratio"), help="folder for what is rendered")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = load_model(ModelSettings(name=given.model, dtype="float32")).model
    layers, tokenizer = gradient_layers(model), AutoTokenizer.from_pretrained(given.model)
    raw_pool = gradients_of(
        model, layers, read_rows(given.pool, given.rows, tokenizer, given.work, max_length=given.max_length)
    )
    lines: list[dict[str, Any]] = []
    for path in given.target:
        target = read_rows(path, given.target_rows, tokenizer, given.work, max_length=given.max_length)
        raw_target = gradients_of(model, layers, target)
        for form in ("raw", "length 1"):
            pool, scale = raw_pool, torch.ones(len(target), dtype=torch.float64)
            if form == "length 1":
                pool, scale = raw_pool / raw_pool.norm(dim=1, keepdim=True), 1 / raw_target.norm(dim=1)
            coefficients = scale / len(target)
            p = pool @ (coefficients @ raw_target)
            q = quadratic_of(model, layers, pool, target, coefficients)
            for line in lines_of(p, q):
                lines.append({"target": path.stem, "gradients": form, "pool_rows": len(pool), **line})
                print(lines[-1], flush=True)
    if given.csv:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
