"""What each embedding costs, beside one plain forward pass of the same batch: processor time, one thread, one process.

    python benchmarks/embeddings.py --model path/to/model --csv benchmarks/results/embeddings.csv

A plain forward pass is the model's own, with logits at every position, as anybody would run it; ``over gathered`` is
against a pass with logits at supervised positions only, which is what the counted column counts. Every repeat times all
embeddings in turn, and a ratio is formed within a repeat, so that what else the machine does cancels.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tamis.embeddings import (
    ErrorMean,
    ErrorOuter,
    Gradient,
    HiddenError,
    HiddenMean,
    Jvp,
    LensGradient,
    ModelEmbedding,
    Rds,
    TailGradient,
    forward_passes,
)
from tamis.model.flops import ModelShape
from tamis.model.loss import per_sample_losses
from tamis.types import Batch


def embeddings_of(depth: int) -> dict[str, ModelEmbedding]:
    return {
        "error-outer, no block": ErrorOuter(depth=0),
        f"hidden-error, {depth} blocks": HiddenError(depth=depth),
        f"jvp, {depth} blocks": Jvp(depth=depth),
        f"jvp, {depth} blocks, 2 concatenated": Jvp(depth=depth, directions=2, combine="concat"),
        f"lens-gradient, {depth} blocks": LensGradient(depth=depth),
        "hidden-mean": HiddenMean(),
        "rds": Rds(),
        "error": ErrorMean(),
        "hidden-error": HiddenError(),
        "error-outer": ErrorOuter(),
        "tail-gradient, 2 blocks": TailGradient(blocks=2),
        "gradient, 8 x 8": Gradient(side=8),
        "gradient, 16 x 16": Gradient(side=16),
    }


def random_rows(rows: int, tokens: int, share: float, vocabulary: int, seed: int) -> Batch:
    """Rows of equal length; the last ``share`` of each carries loss, as an answer behind a prompt does."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
    supervised = (torch.arange(tokens) >= round(tokens * (1 - share))).expand(rows, tokens).clone()
    return Batch(rows=torch.arange(rows), input_ids=ids, attention_mask=torch.ones_like(ids), supervised=supervised)


def processor_time(run: Callable[[Batch], Any], batch: Batch) -> float:
    start = time.process_time()
    run(batch)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of a row's tokens that carry loss")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="write the table here, too")
    options = parser.parse_args()

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    shape = ModelShape.from_model(model)
    batch = random_rows(options.rows, options.tokens, options.supervised, shape.vocabulary, seed=0)
    sizes = {
        "rows": float(options.rows),
        "tokens": float(options.rows * options.tokens),
        "supervised_tokens": float(batch.supervised[:, 1:].sum()),
        "sum_sq_len": float(options.rows * options.tokens**2),
    }

    def plain(batch: Batch) -> Any:
        with torch.no_grad():
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits

    def gathered(batch: Batch) -> Any:
        with torch.no_grad():
            return per_sample_losses(model, batch)

    chosen = embeddings_of(options.depth)
    runs: dict[str, Callable[[Batch], Any]] = {"plain": plain, "gathered": gathered}
    prepared = {}
    for name, embedding in chosen.items():
        start = time.process_time()
        runs[name] = embedding.start(model)
        prepared[name] = time.process_time() - start
    few = random_rows(2, 16, options.supervised, shape.vocabulary, seed=1)
    numbers = {name: runs[name](few)["embedding"].shape[1] for name in chosen}  # and warms everything up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            seconds[name].append(processor_time(run, batch))

    rows = []
    for name, embedding in chosen.items():
        over = {
            base: statistics.median(own / one for own, one in zip(seconds[name], seconds[base], strict=True))
            for base in ("plain", "gathered")
        }
        rows.append(
            {
                "embedding": name,
                "numbers": numbers[name],
                "counted": f"{forward_passes(embedding, shape, **sizes):.3f}",
                "over_gathered": f"{over['gathered']:.3f}",
                "over_plain": f"{over['plain']:.3f}",
                "seconds": f"{statistics.median(seconds[name]):.3f}",
                "plain_seconds": f"{statistics.median(seconds['plain']):.3f}",
                "start_seconds": f"{prepared[name]:.2f}",
                "model": Path(options.model).name,
                "rows": options.rows,
                "tokens": options.tokens,
                "supervised_share": options.supervised,
                "repeats": options.repeats,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    print(f"{'embedding':<34}{'numbers':>8}{'counted':>9}{'gathered':>10}{'plain':>8}{'seconds':>9}{'start':>8}")
    for row in rows:
        print(
            f"{row['embedding']:<34}{row['numbers']:>8}{row['counted']:>9}{row['over_gathered']:>10}"
            f"{row['over_plain']:>8}{row['seconds']:>9}{row['start_seconds']:>8}"
        )
    print(f"plain forward pass: {statistics.median(seconds['plain']):.3f} s of processor time")
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
