"""How far alignments with a target direction cut to a rank are from those with the whole direction.

    python benchmarks/target_rank.py --model DIR --pool pool.jsonl --targets squad=squad.jsonl gsm8k=gsm8k.jsonl

All weights of the model are trained for ``--updates`` updates of 8 random rows of the pool, so that Adam has moments.
Then the alignments of ``--candidates`` other rows with the mean of ``--target-rows`` target rows, in Adam's form
(``D * grad t``), are measured exactly and with every matrix of the direction cut to each of ``--ranks``. Seeds draw
other rows everywhere. For each seed, target and rank: correlations over candidates, how many of the best quarter are
the same, and the share of the direction's squared length that is kept. A seed's lines go to a CSV file together.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import pearsonr, spearmanr
from torch import nn

from online_quality import Row, collate, tokens_of
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients, hold_gradients, summed_gradient
from tamis.maths.low_rank import cut_to_rank
from tamis.model.load import ModelSettings, load_model, load_tokenizer
from tamis.model.trainable import trainable_layers
from tamis.online.adam_state import read_adam
from tamis.online.measure import measure_alignments
from tamis.types import Batch

RESULTS = Path(__file__).parent / "results" / "target-rank.csv"
FIELDS = ("model", "settings", "target", "seed", "rank", "pearson", "spearman", "top_shared", "kept")
ROWS = 8  # of an update and of a forward pass


def batches(rows: Sequence[Row]) -> list[Batch]:
    found = []
    for first in range(0, len(rows), ROWS):
        part = collate(rows[first : first + ROWS])
        ids, mask, labels = part["input_ids"], part["attention_mask"], part["labels"]
        at = torch.arange(first, first + len(ids))
        found.append(Batch(rows=at, input_ids=ids, attention_mask=mask, supervised=labels != -100))
    return found


def measure(
    model: nn.Module, rows: list[Row], targets: dict[str, list[Row]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One line per target and rank."""
    model.requires_grad_(True)
    matrices = param_matrices(model, trainable_layers(model))
    params = {name: param for matrix in matrices for name, param in matrix.params}
    optimizer = torch.optim.AdamW(params.values(), lr=arguments.rate)
    for update in range(arguments.updates):
        (batch,) = batches(rows[update * ROWS : (update + 1) * ROWS])
        total, _ = summed_gradient(model, matrices, [(batch, torch.ones(ROWS))])
        for name, param in params.items():
            param.grad = total[name] / ROWS
        optimizer.step()
        optimizer.zero_grad()
    candidates = batches(rows[arguments.updates * ROWS :][: arguments.candidates])
    held = RowGradients(matrices)
    for batch in candidates:
        hold_gradients(model, batch, held, keep_factors=True)
    moments = read_adam(optimizer, params)
    found = []
    for name, own in targets.items():
        ones = [(batch, torch.ones(len(batch.rows))) for batch in batches(own)]
        total, _ = summed_gradient(model, matrices, ones)
        goal = {of: grad / len(own) for of, grad in total.items()}
        exact = measure_alignments("adam", held, goal, moments).numpy()
        best = max(1, len(exact) // 4)
        direction = {of: moments[of].diagonal() * grad for of, grad in goal.items()}
        for rank in arguments.ranks:
            kept = whole = 0.0
            for matrix in matrices:
                joined = matrix.joined(direction)
                whole += float(joined.double().square().sum())
                if matrix.is_cut_to(rank):
                    joined = cut_to_rank(joined, rank, seed=0).right  # as long as the whole cut matrix
                kept += float(joined.double().square().sum())
            cut = measure_alignments("adam", held, goal, moments, rank=rank).numpy()
            top = set(np.argsort(-exact)[:best]) & set(np.argsort(-cut)[:best])
            found.append(
                {"target": name, "rank": rank, "pearson": round(float(pearsonr(exact, cut)[0]), 5),
                 "spearman": round(float(spearmanr(exact, cut)[0]), 5), "top_shared": round(len(top) / best, 3),
                 "kept": round(kept / whole, 4)}
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--window", type=int, nargs=2, default=[48, 48], metavar=("PROMPT", "ANSWER"))
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--target-rows", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    settings = ModelSettings(name=arguments.model, dtype="float32", device="cpu")
    renderer = Renderer(load_tokenizer(settings), max_length=2048)

    def drawn(path: str, count: int, seed: int) -> list[Row]:
        examples = list(read_examples([path]))
        order = random.Random(seed).sample(range(len(examples)), len(examples))
        rendered = (tokens_of(renderer, examples[i], arguments.window) for i in order)
        return [row for row, _ in zip((row for row in rendered if row is not None), range(count), strict=False)]

    name = Path(arguments.model).name
    named = ("updates", "rate", "candidates", "target_rows", "window", "ranks")
    asked = " ".join(f"{key}={getattr(arguments, key)}" for key in named)
    lines: list[dict[str, Any]] = []
    is_new = not arguments.csv.is_file()
    if not is_new:
        with arguments.csv.open(newline="") as file:
            lines = list(csv.DictReader(file))
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        for seed in range(arguments.seeds):
            if any((line["model"], line["settings"], line["seed"]) == (name, asked, str(seed)) for line in lines):
                continue
            rows = drawn(str(arguments.pool), arguments.updates * ROWS + arguments.candidates, seed)
            paths = dict(text.split("=", 1) for text in arguments.targets)
            targets = {key: drawn(path, arguments.target_rows, seed) for key, path in paths.items()}
            for line in measure(load_model(settings).model, rows, targets, arguments):
                lines.append({"model": name, "settings": asked, "seed": str(seed), **line})
                writer.writerow(lines[-1])
                print(lines[-1], flush=True)
            file.flush()
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if (line["model"], line["settings"]) == (name, asked):
            groups[line["model"], int(line["rank"])].append(line)
    table = Table("model", "rank", "kept", "Pearson", "Spearman", "best quarter shared", title="mean (least)")
    for (model, rank), own in sorted(groups.items()):
        cells = []
        for field in ("kept", "pearson", "spearman", "top_shared"):
            values = [float(line[field]) for line in own]
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f})")
        table.add_row(model, str(rank), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
