"""Held-out loss of online methods beside plain training, at equal steps and at equal compute, paired over seeds.

    python benchmarks/online_quality.py --model DIR --pool pool.jsonl --targets squad=squad.jsonl gsm8k=source:gsm8k

A run fine-tunes the model on the pool with one method and measures the loss on rows of the target that nothing else
sees. ``NAME=FILE`` takes both from a file; ``NAME=source:SOURCE`` from the rows of one source of the pool, which are
taken out of it. The data of a seed (candidates, target rows, held-out rows) is the same for all methods.

Two budgets, ``--budgets``: ``steps`` gives every method ``--steps`` updates. ``compute`` gives it as many as cost the
operations of ``full`` at ``--steps`` on the same pool and target, by the run's own counter over ``--cost-steps``, and
corrected once by that of a run as long as was found: ``uniform`` then makes about ``oversample`` times the steps, a
method that scores candidates and looks at target rows somewhat fewer than ``full``, and one with cheaper candidates
more. The rate is tuned for every method and budget, on seeds of its own and the clean
pool, and counts for all targets and pools; one at the edge of ``--rates`` is said.

A method is a name of ``tamis.online`` or one of ``paper``, ``top-k``, ``filter-only`` and ``ftw-raw``; then changes to
its settings, to those of a step or to the number of target rows, ``paper:filter=top``, ``tilt:target_every=4``,
``less:target_rows=8``; then a way to score candidates: ``tracin@reuse:2``, ``top-k@jvp``, ``ftw-raw@proxy:DIR``.

``--pools`` makes the pool worse on purpose: ``noise`` gives half of the rows the answer of another row, ``copies``
replaces half of the rows by copies of a twentieth, ``irrelevant`` makes nine tenths of it of one source that is no
target's (by name), ``clean`` leaves it. Every run is one line of the CSV file; interrupt it and run it again: it goes
on where it was, and what was measured under other settings does not count. At the end come means over seeds,
differences to ``full`` and to ``uniform`` within each budget, and two-sided paired t-tests, as they are and corrected
by Holm for all comparisons printed.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch when it first allocates

import numpy as np
import torch
import yaml
from datasets import Dataset
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
from tamis.online import StepSettings
from tamis.online.cost import as_plain
from tamis.online.methods.by_name import make_online_method
from tamis.online.methods.choice import Method, cold_updates
from tamis.online.settings import check_combination
from tamis.types import Example

RESULTS = Path(__file__).parent / "results" / "online-quality.csv"
FIELDS = (
    "model", "weights", "settings", "pool", "target", "method", "budget", "rate", "stage", "seed", "steps", "rows",
    "held_out_before", "held_out_after", "held_out_mean",  # the mean is over --on-the-way measurements
    "tflops", "tflops_candidates", "tflops_target", "tflops_update", "processor_seconds",
)  # fmt: skip
FIRST_TUNING_SEED, FIRST_SEED = 1000, 0
TARGET_ROWS, HELD_OUT_ROWS = 64, 64

Row = dict[str, Any]


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # names of the tables
    "paper": ("filter-then-weight", {"preset": "paper"}),
    "top-k": ("filter-then-weight", {"filter": "top", "weights": "none"}),
    "filter-only": ("filter-then-weight", {"weights": "none"}),
    "ftw-raw": ("filter-then-weight", {"alignment": "raw", "interactions": "raw"}),
}


@dataclass(frozen=True, kw_only=True)
class Online:
    """What a method's text on the command line asks for."""

    selection: Method
    settings: StepSettings
    target_rows: int | None


def online(text: str, keep: int, oversample: int) -> Online:
    """``NAME[:KEY=VALUE...][@CANDIDATES]``: a method or a variant, changes to it, how its candidates are scored."""
    words, _, candidates = text.partition("@")
    name, *changes = words.split(":")
    name, values = VARIANTS.get(name, (name, {}))
    values = values | {key: yaml.safe_load(value) for key, value in (change.split("=", 1) for change in changes)}
    target_rows = values.pop("target_rows", None)
    keep, oversample = values.pop("keep", keep), values.pop("oversample", oversample)
    of_step = {field.name: values.pop(field.name) for field in fields(StepSettings) if field.name in values}
    settings = StepSettings(candidates=candidates or "exact", **of_step)
    selection = make_online_method(name, values, keep=keep, oversample=oversample)
    check_combination(selection, settings)
    return Online(selection=selection, settings=settings, target_rows=target_rows)


class Data:
    """Token ids and labels of a pool and of its targets, and how a seed divides them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._renderer = Renderer(load_tokenizer(arguments.settings), max_length=arguments.max_length)
        self._window = arguments.window
        pool = list(read_examples([str(arguments.pool)]))
        self._rows = arguments.rows
        self._taken = {where.removeprefix("source:") for where in arguments.targets.values()} | set(arguments.targets)
        order = random.Random(0).sample(range(len(pool)), len(pool))
        self._pool, self._rest = (
            [pool[i] for i in sorted(part)] for part in (order[: self._rows], order[self._rows :])
        )
        self._targets: dict[str, list[Row]] = {}
        for name, where in arguments.targets.items():
            if where.startswith("source:"):
                own = [e for e in self._pool if str(e.source) == where.removeprefix("source:")]
                own = own[: TARGET_ROWS + HELD_OUT_ROWS]
                self._pool = [e for e in self._pool if not any(e is taken for taken in own)]
            else:
                own = list(read_examples([where]))
            self._targets[name] = self._render(own)
            if len(self._targets[name]) < 16:
                raise SystemExit(f"target {name}: {len(self._targets[name])} usable rows; at least 16 are needed")
        self._pools: dict[str, list[Row]] = {}

    def _render(self, examples: Sequence[Example]) -> list[Row]:
        rows = (tokens_of(self._renderer, example, self._window) for example in examples)
        return [row for row in rows if row is not None]

    def pool(self, kind: str) -> list[Row]:
        if kind not in self._pools:
            rows = self._mostly_irrelevant() if kind == "irrelevant" else spoilt(self._pool, kind)
            self._pools[kind] = self._render(rows)
        return self._pools[kind]

    def _mostly_irrelevant(self) -> list[Example]:
        """Nine tenths of the most frequent source that is no target's, also from rows outside the sample."""
        every = [*self._pool, *self._rest]
        counts = Counter(str(row.source) for row in every if str(row.source) not in self._taken)
        if not counts:
            raise SystemExit("--pools irrelevant: every source of the pool is a target's")
        source, most = counts.most_common(1)[0]
        wanted = min(most, self._rows * 9 // 10)
        others = [row for row in self._pool if str(row.source) != source][: wanted // 9]
        rows = [*[row for row in every if str(row.source) == source][:wanted], *others]
        random.Random(2).shuffle(rows)
        print(f"irrelevant: {wanted} rows of {source}, {len(others)} others", flush=True)
        return rows

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
        if len({bool(row.messages) for row in pool}) > 1 or any(row.text is not None for row in pool):
            raise SystemExit("--pools noise: rows must be all chats, or all prompts with completions, to swap answers")
        rows = list(pool)
        for i, j in zip(wrong, wrong[1:] + wrong[:1], strict=True):
            if pool[i].messages:
                rows[i] = replace(pool[i], messages=(*pool[i].messages[:-1], pool[j].messages[-1]))
            else:
                rows[i] = replace(pool[i], completion=pool[j].completion)
        return rows
    if kind == "copies":
        few = order.sample(list(pool), max(1, len(pool) // 20))
        return [row if order.random() < 0.5 else order.choice(few) for row in pool]
    return list(pool)


def tokens_of(renderer: Renderer, example: Example, window: Sequence[int] | None) -> Row | None:
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
    return {"input_ids": ids.tolist(), "labels": labels.tolist(), "source": str(example.source)}


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
    data: Data, method: str, kind: str, target: str, rate: float, seed: int, steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One run."""
    asked = online(method, arguments.keep, arguments.oversample)
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
                bf16=arguments.dtype == "bfloat16",
                lr_scheduler_type="cosine", seed=seed, save_strategy="no", report_to=[], logging_strategy="no",
                disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(pool),
            target_dataset=target_rows,
            data_collator=collate,
            selection=asked.selection,
            step_settings=asked.settings,
            target_rows=asked.target_rows,
            forecast_every=0,
            log_candidates=False,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        spent = [0.0]
        trainer.add_callback(
            _measuring(
                lambda: held_out_loss(model, held_out), curve, spent, every=max(1, steps // arguments.on_the_way)
            )
        )
        trainer.train()
        cost = {part: row["tflops"] for part, row in as_plain(trainer.work()).items()}
    return {
        "steps": steps,
        "rows": len(pool),
        "held_out_before": round(curve[0], 5),
        "held_out_after": round(held_out_loss(model, held_out), 5),
        "held_out_mean": round(statistics.fmean(curve[1:]), 5),
        "tflops": round(sum(cost.values()), 5),
        **{f"tflops_{part}": round(value, 5) for part, value in cost.items()},
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
        named = ("steps", "rows", "keep", "oversample", "max_length", "window")
        self._settings = " ".join(f"{name}={getattr(arguments, name)}" for name in named)
        if self._path.is_file():
            text = self._path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:  # killed while it wrote: that run is done again
                self._path.write_bytes(whole)
            with self._path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.lines = list(reader)
            if tuple(reader.fieldnames or ()) != FIELDS:
                raise SystemExit(f"{self._path} has other columns than this script writes; name another --csv")
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w", newline="") as file:
                csv.DictWriter(file, FIELDS).writeheader()

    def get(
        self, method: str, budget: str, kind: str, target: str, rate: float, seed: int, stage: str, steps: int
    ) -> dict[str, str]:
        arguments = self._arguments
        key = {"model": arguments.model_name, "weights": arguments.weights, "settings": self._settings, "pool": kind}
        key |= {"target": target, "method": method, "budget": budget, "rate": f"{rate:g}", "stage": stage}
        key |= {"seed": str(seed), "steps": str(steps)}
        same = [li for li in self.lines if all(li[name] == value for name, value in key.items() if name != "budget")]
        for line in same:
            if line["budget"] == budget:
                return line
        if same:  # both budgets pay for as many updates, as they do for ``full``
            line = {**same[0], "budget": budget}
        else:
            found = train(self._data, method, kind, target, rate, seed, steps, arguments)
            line = {name: str(value) for name, value in {**key, **found}.items()}
            self._check_held_out(line)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(line)
        self.lines.append(line)
        print(
            f"{stage} {kind} {target} {method} {budget} ({steps} steps) {rate:g} seed {seed}: {line['held_out_after']}",
            flush=True,
        )
        return line

    def _check_held_out(self, line: dict[str, str]) -> None:
        """Runs of a target and seed are measured on the same rows, so the model starts from the same loss."""
        same = ("model", "settings", "target", "seed")
        for other in self.lines:
            before = [float(each["held_out_before"]) for each in (line, other)]
            if all(other[name] == line[name] for name in same) and abs(before[0] - before[1]) > 1e-3:
                raise SystemExit(
                    f"{self._path}: target {line['target']} was measured on other rows before ({before[1]} and now "
                    f"{before[0]} before training); give the file of then, or another --csv"
                )


def steps_of(runs: Runs, method: str, budget: str, kind: str, target: str, arguments: argparse.Namespace) -> int:
    """Updates that the budget pays for on this pool and target, from what short runs of the method and ``full`` cost.

    The updates before a method starts cost what ``uniform`` or ``full`` costs, so the later ones are counted apart.
    """
    if budget == "steps" or method == "full":
        return int(arguments.steps)
    selection = online(method, arguments.keep, arguments.oversample).selection
    cold, steps = cold_updates(selection), int(arguments.steps)
    measured = min(steps, cold + arguments.cost_steps)
    if measured <= cold:
        raise SystemExit(f"{method} starts after {cold} updates, and --steps is {steps}; give more")

    def cost(name: str, updates: int) -> float:
        rate = arguments.rates[0]
        return float(runs.get(name, "steps", kind, target, rate, FIRST_TUNING_SEED, "cost", updates)["tflops"])

    before = cold * cost("full" if selection.keeps_all else "uniform", measured) / measured if cold else 0.0
    left = cost("full", measured) / measured * steps - before
    found: int = max(1, round(left / (cost(method, measured) - before) * (measured - cold)))
    # What a method takes may change on the way, and with it what an update costs.
    spent = cost(method, cold + found) - before
    if abs(spent / left - 1) > 0.02:
        found = max(1, round(found * left / spent))
    return cold + found


def best_rate(runs: Runs, method: str, budget: str, arguments: argparse.Namespace) -> float:
    """The rate with the lowest held-out loss, relative to that before, on the tuning seeds of all targets."""
    if len(arguments.rates) == 1:
        return float(arguments.rates[0])

    def score(rate: float) -> float:
        lines = [
            runs.get(
                method, budget, "clean", target, rate, seed, "tune",
                steps_of(runs, method, budget, "clean", target, arguments),
            )
            for target in arguments.targets
            for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + arguments.tuning_seeds)
        ]  # fmt: skip
        found = statistics.fmean(float(line["held_out_after"]) / float(line["held_out_before"]) for line in lines)
        return found if math.isfinite(found) else math.inf

    best: float = min(arguments.rates, key=score)
    if best in (min(arguments.rates), max(arguments.rates)):
        print(f"{method}, {budget}: the best rate {best:g} is at the edge of --rates; widen them", flush=True)
    return best


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One method against one baseline on one pool, target and budget; negative: the method ends lower."""

    other: str
    difference: float
    p: float


def compared(own: dict[int, float], other: dict[int, float], name: str) -> Compared | None:
    """Over the seeds that both have; None if those are fewer than two, or the same run."""
    seeds = sorted(own.keys() & other.keys())
    if len(seeds) < 2 or own == other:
        return None
    a, b = (np.array([of[seed] for seed in seeds]) for of in (own, other))
    return Compared(other=name, difference=float((a - b).mean()), p=float(ttest_rel(a, b).pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all comparisons together; 1 where there is no p-value."""
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i]))  # of runs that diverged
    corrected, largest = [1.0] * len(values), 0.0
    for rank, i in enumerate(order):
        own = 1.0 if math.isnan(values[i]) else (len(values) - rank) * values[i]
        largest = max(largest, min(1.0, own))
        corrected[i] = largest
    return corrected


def summary(lines: Sequence[dict[str, str]], arguments: argparse.Namespace) -> list[Table]:
    """One table for each pool, target and budget, of the final runs at the chosen rates."""
    groups = [(k, t, b) for k in arguments.pools for t in arguments.targets for b in arguments.budgets]
    after: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    cost: dict[tuple[str, ...], float] = {}
    for group in groups:
        kind, target, budget = group
        own = [li for li in lines if (li["pool"], li["target"], li["budget"]) == group]
        after[group] = {
            m: {int(li["seed"]): float(li["held_out_after"]) for li in own if li["method"] == m}
            for m in arguments.methods
        }
        for m in arguments.methods:
            spent = [float(li["tflops"]) for li in own if li["method"] == m]
            cost[kind, target, budget, m] = statistics.fmean(spent) if spent else math.nan
    pairs: dict[tuple[tuple[str, str, str], str, str], Compared] = {
        (group, method, other): found
        for group in groups
        for method in arguments.methods
        for other in ("full", "uniform")
        if other in after[group] and (found := compared(after[group][method], after[group][other], other)) is not None
    }
    # The two baselines meet in both columns, which is one comparison.
    tests = {(group, frozenset((method, other))): pair.p for (group, method, other), pair in pairs.items()}
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    tables = []
    for group in groups:
        kind, target, budget = group
        heads = ("method", "TFLOPs", "held-out loss", "to full", "p", "p (Holm)", "to uniform", "p", "p (Holm)")
        table = Table(*heads, title=f"{target}, {kind} pool, equal {budget}")
        for method, own_losses in after[group].items():
            values = list(own_losses.values())
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            mean = f"{statistics.fmean(values):.4f}{spread}" if values else "-"
            cells = [f"{cost[kind, target, budget, method]:.3g}", mean]
            for other in ("full", "uniform"):
                key = (group, method, other)
                found = pairs.get(key)
                cells += ["", "", ""] if found is None else [
                    f"{found.difference:+.4f}", f"{found.p:.3f}", f"{corrected[group, frozenset((method, other))]:.3f}"
                ]  # fmt: skip
            table.add_row(method, *cells)
        tables.append(table)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME=FILE|NAME=source:SOURCE")
    methods = ["full", "uniform", "tilt", "anchored", "filter-then-weight", "paper", "tracin", "less"]
    methods += ["tracin@reuse:2", "filter-then-weight@reuse:2", "top-k@jvp"]
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--pools", nargs="+", choices=("clean", "noise", "copies", "irrelevant"), default=["clean"])
    parser.add_argument("--budgets", nargs="+", choices=("steps", "compute"), default=["steps", "compute"])
    parser.add_argument("--weights", choices=("lora", "full"), default="lora")
    parser.add_argument("--rows", type=int, default=4000, help="a random sample of the pool")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--oversample", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--window", type=int, nargs=2, metavar=("PROMPT", "ANSWER"), help="keep so many tokens of both")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument(
        "--cost-steps", type=int, default=64, help="updates after the cold ones that the cost is read of"
    )
    parser.add_argument("--on-the-way", type=int, default=8, help="measurements of the held-out loss while training")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="computes; with LoRA")
    parser.add_argument("--attention", default="sdpa", help="kernel, as in tamis")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.targets = dict(text.split("=", 1) for text in arguments.targets)
    arguments.model_name = Path(arguments.model).name
    arguments.settings = ModelSettings(
        name=arguments.model, dtype=arguments.dtype, attention=arguments.attention, device="cpu"
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    for method in arguments.methods:
        online(method, arguments.keep, arguments.oversample)  # refuses what does not go together
    runs = Runs(Data(arguments), arguments)
    finals = []  # not all that the file holds: runs at a rate that lost since are in it, too
    for budget in arguments.budgets:
        for method in arguments.methods:
            rate = best_rate(runs, method, budget, arguments)
            for kind in arguments.pools:
                for target in arguments.targets:
                    steps = steps_of(runs, method, budget, kind, target, arguments)
                    finals += [
                        runs.get(method, budget, kind, target, rate, seed, "final", steps)
                        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
                    ]
    for table in summary(finals, arguments):
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
