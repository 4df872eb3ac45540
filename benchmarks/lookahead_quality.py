"""Does choosing data by what it does k updates later beat choosing by the next update? MNIST (the paper's app. D.3).

    python benchmarks/lookahead_quality.py --data mnist --seeds 5

Every update draws 64 candidates and trains on 32 of them, with AdamW at a constant rate: by ``tamis.online``'s
look-ahead scores (``k=1`` is the exact per-step rule, longer horizons rehearse a block of k updates), by TracIn's
``<∇ℓ, g_i>``, or at random (``uniform``). ``full`` trains on all 64. 250 test images are the target and say which epoch
is best; the other 750 measure.

A line per run and epoch in ``lookahead-quality.csv``, which is not computed again. Cost is counted in rows that go
forwards and backwards: what the method says of its scoring (``Lookahead.spent``), the target's rows and the update's
own. ``uniform`` and ``full`` run ``--longer`` times as many epochs, so that they can be read at equal cost, too.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from tamis.gradients.functional import products
from tamis.online.methods.lookahead import Lookahead
from tamis.online.rehearsal import look_ahead
from tamis.trajectory.adjoint import final_values
from tamis.trajectory.replay import mean_gradient, play
from tamis.trajectory.run import Group, Rule, State, Step
from trace_mnist import NETWORKS, TARGETS_AT_ONCE, Classifier, Images, load_mnist
from trace_runs import RESULTS, append, read

CANDIDATES, KEEP, TARGET = 64, 32, 250
KEYS = ("model", "rate", "seed", "method", "epochs")
COLUMNS = (*KEYS, "epoch", "updates", "cost_rows", "cpu_s", "target_error", "error", "loss")
ALL = ["uniform", "full", "tracin", "k=1", "k=2", "k=5", "k=10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with mnist10.npz; without it only the tables are printed")
    parser.add_argument("--models", nargs="+", default=["mlp"], choices=list(NETWORKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-2, 1e-3, 1e-4])
    parser.add_argument("--methods", nargs="+", default=ALL, help="uniform, full, tracin, or k=NUMBER")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--longer", type=int, default=3, help="times as many epochs of uniform and full")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = args.out / "lookahead-quality.csv"
    done = {tuple(row[key] for key in KEYS) for row in read(path)}
    for seed in range(args.seeds if args.data else 0):
        for model in args.models:
            for rate in args.rates:
                for method in args.methods:
                    epochs = args.epochs * (args.longer if method in ("uniform", "full") else 1)
                    key = dict(zip(KEYS, (model, f"{rate:g}", seed, method, epochs), strict=True))
                    if tuple(str(value) for value in key.values()) not in done:
                        lines = one_run(args.data, key, rate)
                        append(path, COLUMNS, lines)
                        print(*(lines[-1][name] for name in COLUMNS), flush=True)
    print_tables(read(path), args.epochs)


def one_run(folder: Path, key: dict[str, Any], rate: float) -> list[dict[str, Any]]:
    data = load_mnist(folder, torch.float32)
    shuffled = np.random.default_rng(3000 + key["seed"]).permutation(len(data.test)).tolist()
    target, measured = data.test.at(shuffled[:TARGET]), data.test.at(shuffled[TARGET:])
    torch.manual_seed(key["seed"])
    problem = Classifier(NETWORKS[key["model"]].train())
    rule = Rule(kind="adamw", groups=(Group(numel=problem.layout.numel, decay=0.01),))
    state = rule.fresh(problem.start())
    rng, picks = (np.random.default_rng(start + key["seed"]) for start in (4000, 5000))  # the same candidates for all
    lines, updates, cost, started = [], 0, 0.0, time.process_time()
    for epoch in range(1, key["epochs"] + 1):
        order = rng.permutation(len(data.train))
        whole = len(order) // CANDIDATES
        batches = [order[i * CANDIDATES : (i + 1) * CANDIDATES].tolist() for i in range(whole)]
        scored = list[Tensor]()
        for index, batch in enumerate(batches):
            if key["method"].startswith("k="):
                if not scored:
                    horizon = int(key["method"][2:])
                    coming = [data.train.at(rows) for rows in batches[index : index + horizon]]
                    scored, spent = rehearsed(problem, rule, state, horizon, coming, target, rate)
                    cost += spent
                kept = best(scored.pop(0))
            elif key["method"] == "tracin":
                kept = best(aligned(problem, state, data.train.at(batch), target))
                cost += TARGET + 2 * CANDIDATES
            else:
                count = CANDIDATES if key["method"] == "full" else KEEP
                kept = picks.permutation(CANDIDATES)[:count].tolist()
            own = whole_step(data.train.at([batch[place] for place in kept]), rate)
            state = play(problem, rule, state, own).after
            updates += 1
            cost += len(kept)
        lines.append(
            {
                **key, "epoch": epoch, "updates": updates, "cost_rows": round(cost),
                "cpu_s": round(time.process_time() - started, 2),
                "target_error": error_of(problem, state, target),
                "error": error_of(problem, state, measured),
                "loss": round(float(final_values(problem, state.theta, measured.split(TARGETS_AT_ONCE)).mean()), 5),
            }
        )  # fmt: skip
    return lines


def rehearsed(
    problem: Classifier, rule: Rule, state: State, horizon: int, coming: Sequence[Images], target: Images, rate: float
) -> tuple[list[Tensor], float]:
    """Scores of a block of updates, and the rows they cost; a block ends with its epoch."""
    method = Lookahead(keep=KEEP, oversample=CANDIDATES // KEEP, horizon=horizon)
    steps = [whole_step(images, rate) for images in coming]
    scores = look_ahead(method, problem, rule, state, steps, target.split(TARGETS_AT_ONCE), rates=[(rate,)] * horizon)
    return scores, TARGET + CANDIDATES * sum(method.spent(slot) for slot in range(len(coming)))


def aligned(problem: Classifier, state: State, images: Images, target: Images) -> Tensor:
    _, goal = mean_gradient(problem, state.theta, target.split(TARGETS_AT_ONCE))
    weights = torch.full((len(images),), 1 / len(images))
    inner, _ = products(problem, state.theta, [images], weights, goal[None], "none")
    return inner[0]


def best(scores: Tensor) -> list[int]:
    found: list[int] = torch.topk(scores, KEEP).indices.tolist()
    return found


def whole_step(images: Images, rate: float) -> Step:
    weights = torch.full((len(images),), 1 / len(images), dtype=torch.float64)
    return Step(index=0, micros=(images,), rows=np.arange(len(images)), weights=weights, rates=(rate,))


def error_of(problem: Classifier, state: State, images: Images) -> float:
    with torch.no_grad():
        logits = problem.predict(problem.layout.named(state.theta), images).logits
    return round(float((logits.argmax(dim=1) != images.labels).double().mean()), 5)


def print_tables(rows: Sequence[dict[str, str]], epochs: int) -> None:
    """Per rate, at the best epoch by the target: against k=1 there; and at the last epoch against k=1 at equal cost."""
    runs = defaultdict[tuple[str, str], dict[str, dict[str, list[dict[str, str]]]]](lambda: defaultdict(dict))
    for row in rows:
        runs[row["model"], row["rate"]][row["method"]].setdefault(row["seed"], []).append(row)
    for (model, rate), by_method in runs.items():
        print(f"\n{model}, rate {rate}: % wrong of 750 test images, mean ± half a 95 % interval over seeds")
        print(
            "method | epochs | seeds | wrong | rows / 1000 | cpu s | minus k=1, equal updates | minus k=1, equal cost"
        )
        first = by_method.get("k=1", {})
        for method, by_seed in by_method.items():
            lengths = {epochs, int(next(iter(by_seed.values()))[-1]["epoch"])}
            for length in sorted(lengths):
                own = {
                    seed: [line for line in lines if int(line["epoch"]) <= length] for seed, lines in by_seed.items()
                }
                wrong = {seed: best_epoch(lines) for seed, lines in own.items()}
                ends = [lines[-1] for lines in own.values()]
                cost, seconds = (float(np.mean([float(end[name]) for end in ends])) for name in ("cost_rows", "cpu_s"))
                both = [seed for seed in own if seed in first]
                equal = [wrong[seed] - best_epoch(first[seed]) for seed in both if length == epochs]
                there = {seed: at_cost(first[seed], cost) for seed in both}
                matched = [float(own[seed][-1]["error"]) - found for seed, found in there.items() if found is not None]
                print(
                    method, length, len(own), percent(list(wrong.values())), round(cost / 1000), round(seconds, 1),
                    percent(equal), percent(matched), sep=" | ",
                )  # fmt: skip


def best_epoch(lines: Sequence[dict[str, str]]) -> float:
    return float(min(lines, key=lambda line: float(line["target_error"]))["error"])


def at_cost(lines: Sequence[dict[str, str]], cost: float) -> float | None:
    """Error once so much was spent, in a line between epochs; None before the first one's end or after the last."""
    spent = [float(line["cost_rows"]) for line in lines]
    errors = [float(line["error"]) for line in lines]
    return float(np.interp(cost, spent, errors)) if spent[0] <= cost <= spent[-1] else None


def percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = student.ppf(0.975, len(values) - 1) * 100 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:.2f} ± {half:.2f}"


if __name__ == "__main__":
    main()
