"""What each method selects from a real pool: the sources of its choice, method by method and target by target.

    python benchmarks/composition.py --model DIR --pool pool.jsonl --target a.jsonl b.jsonl --methods bm25 tracin

Features are shared between targets through one store. Interrupt it and run it again: it goes on where it was. All goes
to a CSV file, one line per method, target and source, with what the run cost.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

import tamis

FIELDS = (
    "method",
    "target",
    "source",
    "selected",
    "of_selection",
    "of_pool",
    "budget",
    "dtype",
    "shortlist",
    "seconds",
    "tflops",
)


def sample(file: Path, rows: int | None, folder: Path) -> Path:
    """The whole file, or a random sample of its lines in their order (seed 0), so that a smaller machine can do it."""
    if rows is None:
        return file
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = sorted(random.Random(0).sample(range(len(lines)), min(rows, len(lines))))
    path = folder / f"{file.stem}-{rows}.jsonl"
    path.write_text("".join(lines[i] for i in kept), encoding="utf-8")
    return path


def own_settings(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said to one method only."""
    of_method = [text.removeprefix(f"{method}.") for text in arguments.set if text.startswith(f"{method}.")]
    chosen: dict[str, Any] = {
        "set": {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in of_method)}
    }
    if method in ("tracin", "less"):
        chosen |= {"shortlist": arguments.shortlist, "projection": arguments.projection}
    return {name: value for name, value in chosen.items() if value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--target", type=Path, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=["uniform", "length", "bm25", "mid-ppl", "rds+", "tracin"])
    parser.add_argument("--budget", default="5%")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="sdpa", help="on CPU in bfloat16, eager is faster for short rows")
    parser.add_argument("--batch-tokens", type=int, help="as `tamis select --batch-tokens`")
    parser.add_argument("--shortlist", help="for the gradient methods, as `tamis select --shortlist`")
    parser.add_argument("--projection", help="for the gradient methods, as `tamis select --projection`")
    parser.add_argument("--set", nargs="*", default=[], help="METHOD.NAME=VALUE, a setting of one of the methods")
    parser.add_argument("--rows", type=int, help="a random sample of the pool")
    parser.add_argument("--target-rows", type=int, help="a random sample of every target")
    parser.add_argument("--out", type=Path, default=Path("tamis-out/composition"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/composition.csv"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    pool = sample(arguments.pool, arguments.rows, arguments.out)
    targets = {path.stem: sample(path, arguments.target_rows, arguments.out) for path in arguments.target}

    console = Console()
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for method in arguments.methods:
            own = own_settings(method, arguments)
            for target, path in targets.items():
                selection = tamis.select(
                    model=arguments.model,
                    pool=pool,
                    target=path,
                    method=method,
                    budget=arguments.budget,
                    dtype=arguments.dtype,
                    attention=arguments.attention,
                    batch_tokens=arguments.batch_tokens,
                    **own,
                    out=arguments.out / f"{method}-{target}-{pool.stem}",
                    store=str(arguments.out / "store"),
                )
                sources = selection.table["source"].to_pylist()
                chosen = Counter(sources[row] for row in selection.order)
                in_pool = Counter(sources)
                cost = selection.manifest["cost"]
                for source, count in chosen.most_common():
                    writer.writerow(
                        {
                            "method": method,
                            "target": target,
                            "source": source,
                            "selected": count,
                            "of_selection": round(count / len(selection), 4),
                            "of_pool": round(in_pool[source] / len(sources), 4),
                            "budget": arguments.budget,
                            "dtype": arguments.dtype,
                            "shortlist": own.get("shortlist", ""),
                            "seconds": round(cost["total_seconds"], 1),
                            "tflops": round(cost["total_tflops"], 2),
                        }
                    )
                file.flush()
                shares = ", ".join(f"{source} {count / len(selection):.0%}" for source, count in chosen.most_common(4))
                console.print(f"{method:>10} {target:>8}: {shares}", highlight=False)
    console.print(summary(arguments.csv))


def summary(path: Path) -> Table:
    """The three largest sources of every selection."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    table = Table("method", *targets, title="largest sources of the selection, in percent")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for target in targets:
            own = [row for row in rows if row["method"] == method and row["target"] == target][:3]
            cells.append(", ".join(f"{row['source']} {float(row['of_selection']):.0%}" for row in own))
        table.add_row(method, *cells)
    return table


if __name__ == "__main__":
    main()
