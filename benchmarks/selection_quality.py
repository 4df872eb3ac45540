"""Does training on a selection help? `tamis compare` on one task after another, over a sample of a pool.

    python benchmarks/selection_quality.py --model DIR --pool pool.jsonl --targets targets --eval eval --tasks gsm8k

``targets/TASK.jsonl`` are the rows to select for, ``eval/TASK.jsonl`` those that measure. To fit a small machine, the
pool is a random sample of rows of at most ``--max-tokens``, and target and held-out rows are of at most
``--task-tokens``. Features of the pool are shared between tasks. Interrupt it and run it again: it goes on where it
was.

Every task has its page in ``--out``; all runs go to one CSV file, and the differences that the pages test to a second.
The tests of a task are adjusted for one another, not for those of other tasks.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tamis
from tamis.cli.config import parse_pairs
from tamis.comparison.result import CompareResult
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.errors import BadRow
from tamis.model.load import ModelSettings, load_tokenizer

RESULTS = Path(__file__).parent / "results"
DIFFERENCES = ("task", "contender", "against", "opponent", "gain", "relative", "over_seeds", "over_rows", "p")


def short_rows(file: Path, renderer: Renderer, *, most_tokens: int, rows: int | None, folder: Path) -> Path:
    """A random draw (seed 0) from the rows of at most so many tokens, in their order, as lines of a file."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    fitting = []
    for example in read_examples([str(file)]):
        try:
            tokens = len(renderer.render(example).input_ids)
        except BadRow:
            continue
        if tokens <= most_tokens:
            fitting.append(example.row)
    if rows is not None and rows < len(fitting):
        fitting = sorted(random.Random(0).sample(fitting, rows))
    path = folder / file.name
    path.write_text("".join(lines[row] for row in fitting), encoding="utf-8")
    print(f"{file.name}: {len(fitting)} rows of at most {most_tokens} tokens", flush=True)
    return path


def write(task: str, result: CompareResult, runs: Path, differences: Path, *, first: bool) -> None:
    """The task's runs and tested differences, behind those of the tasks before it."""
    with (result.out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with runs.open("w" if first else "a", newline="") as file:
        writer = csv.DictWriter(file, ("task", *lines[0]))
        if first:
            writer.writeheader()
        writer.writerows({"task": task, **line} for line in lines)
    with differences.open("w" if first else "a", newline="") as file:
        table = csv.DictWriter(file, DIFFERENCES)
        if first:
            table.writeheader()
        for found in result.differences:
            table.writerow(
                {
                    "task": task,
                    "contender": found.contender,
                    "against": found.against,
                    "opponent": found.opponent,
                    "gain": f"{found.gain:.5f}",
                    "relative": found.relative if found.relative is None else f"{found.relative:.4f}",
                    "over_seeds": found.seeds_p if found.seeds_p is None else f"{found.seeds_p:.4g}",
                    "over_rows": found.rows_p if found.rows_p is None else f"{found.rows_p:.4g}",
                    "p": found.p if found.p is None else f"{found.p:.4g}",
                }
            )


def summary(results: dict[str, CompareResult]) -> Table:
    """Mean and standard deviation of the held-out loss, and the cost in TFLOPs, of every contender."""
    table = Table("contender", *results, title="held-out loss (TFLOPs of selecting and training)")
    names = dict.fromkeys(standing.name for result in results.values() for standing in result.at(result.budget))
    for name in names:
        cells = []
        for result in results.values():
            found = result.standing(name)
            if found is None:
                cells.append("")
                continue
            spread = f" ± {statistics.stdev(found.values):.3f}" if len(found.values) > 1 else ""
            cells.append(f"{found.mean:.3f}{spread} ({found.tflops:.0f})")
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--targets", type=Path, required=True, help="folder of TASK.jsonl")
    parser.add_argument("--eval", type=Path, required=True, help="folder of TASK.jsonl")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=["tracin", "bm25:5x+tracin", "online:tilt"])
    parser.add_argument("--set", nargs="+", default=[], metavar="LABEL.NAME=VALUE", help="settings of methods")
    parser.add_argument("--rows", type=int, default=1000, help="of the pool")
    parser.add_argument("--max-tokens", type=int, default=144, help="of a row of the pool")
    parser.add_argument("--task-tokens", type=int, default=180, help="of a target row or a held-out one")
    parser.add_argument("--held-out", type=int, default=40, help="rows of each task that measure")
    parser.add_argument("--target-rows", type=int, default=64, help="of each task, at most")
    parser.add_argument("--budget", default="40")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--update-rows", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="sdpa", help="on CPU in bfloat16, eager is faster for short rows")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--out", type=Path, default=Path("tamis-out/selection-quality"))
    parser.add_argument("--csv", type=Path, default=RESULTS / "selection-quality.csv")
    arguments = parser.parse_args()
    renderer = Renderer(load_tokenizer(ModelSettings(name=arguments.model)), max_length=2048)
    folders = {name: arguments.out / "data" / name for name in ("pool", "target", "eval")}
    for folder in (*folders.values(), arguments.csv.parent):
        folder.mkdir(parents=True, exist_ok=True)

    def rows_of(kind: str, file: Path, most: int, rows: int) -> Path:
        return short_rows(file, renderer, most_tokens=most, rows=rows, folder=folders[kind])

    pool = rows_of("pool", arguments.pool, arguments.max_tokens, arguments.rows)
    differences = arguments.csv.with_name(f"{arguments.csv.stem}-differences.csv")
    results: dict[str, CompareResult] = {}
    for task in arguments.tasks:
        settings: dict[str, Any] = {
            "steps": arguments.steps,
            "update_rows": arguments.update_rows,
            "learning_rate": arguments.learning_rate,
            "dtype": arguments.dtype,
            "attention": arguments.attention,
            "batch_tokens": arguments.batch_tokens,
            "store": arguments.out / "store",
        }
        result = tamis.compare(
            model=arguments.model,
            pool=pool,
            target=rows_of("target", arguments.targets / f"{task}.jsonl", arguments.task_tokens, arguments.target_rows),
            eval=rows_of("eval", arguments.eval / f"{task}.jsonl", arguments.task_tokens, arguments.held_out),
            methods=arguments.methods,
            set=parse_pairs("--set", arguments.set),
            budget=arguments.budget,
            seeds=arguments.seeds,
            out=arguments.out / task,
            **settings,
        )
        assert isinstance(result, CompareResult)
        write(task, result, arguments.csv, differences, first=not results)
        results[task] = result
        print(f"{task}: {result.conclusion.title}\n  {result.conclusion.sentence}", flush=True)
    Console(width=150).print(summary(results))


if __name__ == "__main__":
    main()
