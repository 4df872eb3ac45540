"""Held-out loss of online methods beside plain training, at equal steps and at equal compute, paired over seeds.

    python benchmarks/online_quality.py --model DIR --pool pool.jsonl --targets squad=squad.jsonl gsm8k=source:gsm8k

A run fine-tunes the model on the pool with one method and measures the loss on rows of the target that nothing else
sees. ``NAME=FILE`` takes both from a file; ``NAME=source:SOURCE`` from the rows of one source of the pool, which are
taken out of it. The rate of every method is tuned first, on seeds of its own, and counts for all targets. A method that
measures candidates costs a pass over all of them, as ``full`` does, so ``full`` is its equal at equal steps and equal
compute; ``uniform-long`` is a random choice with as many times the steps as candidates per row kept, which costs the
same too. The data of a seed (candidates, target rows, held-out rows) is the same for all methods.

``--pools`` makes the pool worse on purpose: ``noise`` gives half of the rows the answer of another row, ``copies``
replaces half of the rows by copies of a twentieth, ``clean`` leaves it. Every run is one line of the CSV file;
interrupt it and run it again: it goes on where it was. At the end come means, differences to ``full`` and to
``uniform-long``, and two-sided paired t-tests.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch when it first allocates

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_rel
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

import tamis
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.errors import BadRow
from tamis.model.load import ModelSettings, load_model, load_tokenizer
from tamis.online import METHODS, FilterThenWeight
from tamis.types import Example

RESULTS = Path(__file__).parent / "results" / "online-quality.csv"
FIELDS = ("model", "weights", "pool", "target", "method", "rate", "stage", "seed", "steps", "rows", "held_out_before")
FIELDS += ("held_out_after", "held_out_mean", "processor_seconds")  # the mean is over eight measurements on the way
TUNING_SEEDS, FIRST_SEED = (1000, 1001), 0
TARGET_ROWS, HELD_OUT_ROWS = 64, 64

Row = dict[str, list[int]]


def make_method(name: str, keep: int, oversample: int) -> Any:
    """By its name, or one of the variants that the tables name."""
    sizes = {"keep": keep, "oversample": oversample}
    variants = {
        "paper": lambda: FilterThenWeight.paper(**sizes),
        "top-k": lambda: FilterThenWeight(filter="top", weights="none", **sizes),
        "filter-only": lambda: FilterThenWeight(weights="none", **sizes),
        "uniform-long": lambda: METHODS["uniform"](**sizes),
    }
    return variants[name]() if name in variants else METHODS[name](**sizes)


class Data:
    """Token ids and labels of a pool and of its targets, and how a seed divides them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        renderer = Renderer(load_tokenizer(arguments.settings), max_length=arguments.max_length)
        self._render = lambda examples: [
            row for row in (_tokens(renderer, e, arguments.window) for e in examples) if row is not None
        ]
        pool = list(read_examples([str(arguments.pool)], kind="pool"))
        self._pool = [
            pool[i] for i in sorted(random.Random(0).sample(range(len(pool)), min(len(pool), arguments.rows)))
        ]
        self._targets: dict[str, list[Row]] = {}
        for name, where in arguments.targets.items():
            if where.startswith("source:"):
                own = [e for e in self._pool if str(e.source) == where.removeprefix("source:")]
                own = own[: TARGET_ROWS + HELD_OUT_ROWS]
                self._pool = [e for e in self._pool if not any(e is taken for taken in own)]
            else:
                own = list(read_examples([where], kind="target"))
            self._targets[name] = self._render(own)
            if len(self._targets[name]) < 16:
                raise SystemExit(f"target {name}: {len(self._targets[name])} usable rows; at least 16 are needed")
        self._pools: dict[str, list[Row]] = {}

    def pool(self, kind: str) -> list[Row]:
        if kind not in self._pools:
            self._pools[kind] = self._render(spoilt(self._pool, kind))
        return self._pools[kind]

    def target(self, name: str, seed: int) -> tuple[list[Row], list[Row]]:
        """Target rows and held-out rows of one seed."""
        rows = list(self._targets[name])
        random.Random(seed).shuffle(rows)
        held_out = min(HELD_OUT_ROWS, len(rows) // 2)
        return rows[held_out : held_out + TARGET_ROWS], rows[:held_out]


def spoilt(pool: Sequence[Example], kind: str) -> list[Example]:
    """The pool as it is, or made worse in a known way."""
    order = random.Random(1)
    if kind == "noise":
        wrong = order.sample(range(len(pool)), len(pool) // 2)
        answers = [pool[i].messages[-1] for i in wrong[1:] + wrong[:1]]
        rows = list(pool)
        for i, answer in zip(wrong, answers, strict=True):
            rows[i] = replace(pool[i], messages=(*pool[i].messages[:-1], answer))
        return rows
    if kind == "copies":
        few = order.sample(list(pool), max(1, len(pool) // 20))
        return [row if order.random() < 0.5 else order.choice(few) for row in pool]
    return list(pool)


def _tokens(renderer: Renderer, example: Example, window: Sequence[int] | None) -> Row | None:
    try:
        row = renderer.render(example)
    except BadRow:
        return None
    if not row.num_supervised:
        return None
    ids, labels = row.input_ids, np.where(row.supervised, row.input_ids, -100)
    if window is not None:
        answer = int(row.supervised.argmax())
        part = slice(max(0, answer - window[0]), answer + window[1])
        ids, labels = ids[part], labels[part]
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = defaultdict(list)
    for row in rows:
        size = len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * (longest - size))
        batch["labels"].append(row["labels"] + [-100] * (longest - size))
        batch["attention_mask"].append([1] * size + [0] * (longest - size))
    return {name: torch.tensor(values) for name, values in batch.items()}


def held_out_loss(model: nn.Module, rows: Sequence[Row]) -> float:
    """Mean over rows of the mean loss of a row's answer."""
    losses = []
    model.eval()
    with torch.no_grad():
        for first in range(0, len(rows), 8):
            batch = collate(rows[first : first + 8])
            labels = batch["labels"][:, 1:]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            each = nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
            losses += (each.sum(1) / (labels != -100).sum(1)).tolist()
    return statistics.fmean(losses)


def train(
    data: Data, method: str, kind: str, target: str, rate: float, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One run."""
    steps = arguments.steps * (arguments.oversample if method == "uniform-long" else 1)
    pool, (target_rows, held_out) = data.pool(kind), data.target(target, seed)
    torch.manual_seed(seed)
    model = load_model(arguments.settings).model.requires_grad_(True)
    if arguments.weights == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    curve = [held_out_loss(model, held_out)]
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = tamis.OnlineTrainer(
            model=model,
            args=TrainingArguments(
                folder, max_steps=steps, learning_rate=rate, per_device_train_batch_size=16, warmup_steps=steps // 10,
                lr_scheduler_type="cosine", seed=seed, save_strategy="no", report_to=[], logging_strategy="no",
                disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
            ),
            train_dataset=pool,
            target_dataset=target_rows,
            data_collator=collate,
            selection=make_method(method, arguments.keep, arguments.oversample),
            forecast_every=0,
            log_candidates=False,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        spent = [0.0]
        trainer.add_callback(_measuring(lambda: held_out_loss(model, held_out), curve, spent, every=max(1, steps // 8)))
        trainer.train()
    return {
        "steps": steps,
        "rows": len(pool),
        "held_out_before": round(curve[0], 5),
        "held_out_after": round(held_out_loss(model, held_out), 5),
        "held_out_mean": round(statistics.fmean(curve[1:]), 5),
        "processor_seconds": round(time.process_time() - started - spent[0], 1),
    }


def _measuring(measure: Any, curve: list[float], spent: list[float], *, every: int) -> Any:
    class Measuring(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                started = time.process_time()
                curve.append(measure())
                spent[0] += time.process_time() - started

    return Measuring()


class Runs:
    """Finished runs, in a CSV file that grows by one line for each."""

    def __init__(self, data: Data, arguments: argparse.Namespace) -> None:
        self._data, self._arguments = data, arguments
        self._path: Path = arguments.csv
        self.lines: list[dict[str, str]] = []
        if self._path.is_file():
            with self._path.open(newline="") as file:
                self.lines = list(csv.DictReader(file))
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w", newline="") as file:
                csv.DictWriter(file, FIELDS).writeheader()

    def get(self, method: str, kind: str, target: str, rate: float, seed: int, stage: str) -> dict[str, str]:
        arguments = self._arguments
        key = {"model": arguments.model_name, "weights": arguments.weights, "pool": kind, "target": target}
        key |= {"method": method, "rate": f"{rate:g}", "stage": stage, "seed": str(seed)}
        for line in self.lines:
            if all(line[name] == value for name, value in key.items()):
                return line
        found = train(self._data, method, kind, target, rate, seed, arguments)
        line = {name: str(value) for name, value in {**key, **found}.items()}
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(line)
        self.lines.append(line)
        print(f"{stage} {kind} {target} {method} {rate:g} seed {seed}: {line['held_out_after']}", flush=True)
        return line


def best_rate(runs: Runs, method: str, arguments: argparse.Namespace) -> float:
    """The rate with the lowest held-out loss, relative to that before, on the tuning seeds of all targets."""

    def score(rate: float) -> float:
        lines = [
            runs.get(method, "clean", target, rate, seed, "tune")
            for target in arguments.targets
            for seed in TUNING_SEEDS
        ]
        return statistics.fmean(float(line["held_out_after"]) / float(line["held_out_before"]) for line in lines)

    return min(arguments.rates, key=score)


def summary(lines: Sequence[dict[str, str]], kind: str, target: str, methods: Sequence[str]) -> Table:
    after = {
        method: {
            int(line["seed"]): float(line["held_out_after"])
            for line in lines
            if (line["method"], line["pool"], line["target"], line["stage"]) == (method, kind, target, "final")
        }
        for method in methods
    }
    table = Table("method", "held-out loss", "to full", "p", "to uniform-long", "p", title=f"{target}, {kind} pool")
    for method, own in after.items():
        cells = [f"{statistics.fmean(own.values()):.4f} ± {statistics.stdev(own.values()):.4f}"]
        for other in ("full", "uniform-long"):
            if other == method or other not in after:
                cells += ["", ""]
                continue
            seeds = sorted(own.keys() & after[other].keys())
            a, b = (np.array([of[seed] for seed in seeds]) for of in (own, after[other]))
            cells += [f"{(a - b).mean():+.4f}", f"{ttest_rel(a, b).pvalue:.3f}"]
        table.add_row(method, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME=FILE|NAME=source:SOURCE")
    methods = ["uniform", "uniform-long", "full", "tilt", "anchored", "filter-then-weight", "paper", "tracin", "less"]
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--pools", nargs="+", choices=("clean", "noise", "copies"), default=["clean"])
    parser.add_argument("--weights", choices=("lora", "full"), default="lora")
    parser.add_argument("--rows", type=int, default=4000, help="a random sample of the pool")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--oversample", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--window", type=int, nargs=2, metavar=("PROMPT", "ANSWER"), help="keep so many tokens of both")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.targets = dict(text.split("=", 1) for text in arguments.targets)
    arguments.model_name = Path(arguments.model).name
    arguments.settings = ModelSettings(name=arguments.model, dtype="float32", device="cpu")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    runs = Runs(Data(arguments), arguments)
    for method in arguments.methods:
        rate = best_rate(runs, method, arguments)
        for kind in arguments.pools:
            for target in arguments.targets:
                for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
                    runs.get(method, kind, target, rate, seed, "final")
    for kind in arguments.pools:
        for target in arguments.targets:
            Console().print(summary(runs.lines, kind, target, arguments.methods))


if __name__ == "__main__":
    main()
