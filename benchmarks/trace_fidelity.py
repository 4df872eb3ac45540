"""Do scores foretell what retraining without a sample does? As in the trajectory attribution paper (app. D.1).

    python benchmarks/trace_fidelity.py --data mnist --models mlp mlp-tanh --seeds 10
    python benchmarks/trace_fidelity.py --data mnist --models cnn --samples 200 --targets 500 --singles 500   # hours
    python benchmarks/trace_fidelity.py --data wikitext-2 --models gpt2-bytes gpt2-bytes-lora --rates 3e-3 1e-3 3e-4 \\
        --samples 50 --targets 256 --singles 4 --seeds 5

``--data`` is a folder with ``mnist10.npz`` (trace_mnist.py: 6,000 training images, one epoch, batches of 64) or with
WikiText-2's ``test.txt.gz`` and ``valid.txt.gz`` (trace_wikitext.py). Random samples are left out of the update that
used them, one retraining each; the effect on the loss of target rows is compared with every method's scores:
Spearman's correlation over the samples, for the mean of the target rows and for some of them one by one.

Two files grow beside each other, and what stands in them is not computed again: a line per method and run
(``trace-fidelity.csv``), and a line per sample (``trace-fidelity-samples.csv``) with the three parts of the error of
SGD-influence (optimizer, update estimate, rest), and with ``--errors`` the true error of the estimated update and its
element-wise estimate, for the first seeds. ``trace_tables.py`` makes tables of both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trace_mnist
import trace_wikitext
from tamis.trajectory.update_error import ErrorProxy
from trace_runs import (
    RESULTS,
    Case,
    Use,
    append,
    chosen_gradients,
    ends_without,
    first_order_changes,
    mean_spearman,
    random_uses,
    read,
    replayed,
    rounded,
    scores_of,
    true_effects,
)

METHODS = ["adamw exact", "sgd exact", "adamw fisher", "adamw none", "tracin"]
KEYS = ("model", "optimizer", "rate", "steps", "seed", "samples", "targets", "singles")
SUMMARY = (*KEYS, "method", "spearman", "spearman_mean_loss", "relative_error", "seconds")
SAMPLES = (
    *KEYS, "step", "place", "truth", "adamw", "sgd", "part_optimizer", "part_update", "part_rest", "update_error",
    "proxy",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--models", nargs="+", default=["mlp"], choices=[*trace_mnist.NETWORKS, *trace_wikitext.NETWORKS]
    )
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=["adamw", "sgd"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    parser.add_argument("--steps", type=int, help="the first updates only; all: 94 of MNIST, 24 of WikiText-2")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--targets", type=int, default=500, help="target rows, whose mean loss is scored")
    parser.add_argument("--singles", type=int, default=12, help="of them, those also scored one by one")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--errors", type=int, default=0, help="seeds for which updates' errors are measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    summary, samples = args.out / "trace-fidelity.csv", args.out / "trace-fidelity-samples.csv"
    done = {tuple(row[key] for key in KEYS) for row in read(summary)}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for seed in seeds:  # outermost, so that an interrupted measurement is balanced
        for model in args.models:
            for optimizer in args.optimizers:
                for rate in args.rates:
                    steps = args.steps or (
                        trace_wikitext.STEPS if model in trace_wikitext.NETWORKS else trace_mnist.STEPS
                    )
                    values = (model, optimizer, f"{rate:g}", steps, seed, args.samples, args.targets, args.singles)
                    key = dict(zip(KEYS, values, strict=True))
                    if tuple(str(value) for value in values) in done:
                        continue
                    lines, details = one_run(args, key, rate)
                    append(samples, SAMPLES, details)
                    append(summary, SUMMARY, lines)  # last: its presence says that the run is done
                    for line in lines:
                        found = (line[name] for name in ("method", "spearman_mean_loss", "spearman", "seconds"))
                        print(*values[:5], *found, flush=True)


def one_run(args: Any, key: dict[str, Any], rate: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    case = make_case(args, key, rate)
    uses = random_uses(case.run, key["samples"], key["seed"])
    started = time.perf_counter()
    ends = ends_without(case, uses)
    truth = true_effects(case, ends)
    print("retraining", round(time.perf_counter() - started, 1), "s", flush=True)
    goal = case.goal(case.theta)
    scores, seconds = dict[str, Tensor](), dict[str, float]()
    for name in args.methods:
        started = time.perf_counter()
        found = scores_of(case, goal, uses, name)
        scores |= found
        seconds |= dict.fromkeys(found, time.perf_counter() - started)
    lines = [
        {
            **key, "method": name, "seconds": round(seconds[name], 2),
            "spearman": mean_spearman(found[:, 1:], truth[:, 1:]),
            "spearman_mean_loss": mean_spearman(found[:, :1], truth[:, :1]),
            "relative_error": rounded(float((found - truth).norm() / truth.norm())),
        }
        for name, found in scores.items()
    ]  # fmt: skip
    details = sample_lines(key, uses, truth, scores, goal, ends - case.theta)
    if key["optimizer"] == "adamw" and key["seed"] < args.errors:
        add_errors(case, uses, ends - case.theta, details)
    return lines, details


def make_case(args: Any, key: dict[str, Any], rate: float) -> Case:
    options = {name: key[name] for name in ("seed", "steps", "targets")}
    if key["model"] in trace_wikitext.NETWORKS:
        run, target = trace_wikitext.training_run(args.data, key["model"], key["optimizer"], rate, **options)
        further, together = run.problem, False
    else:
        own = trace_mnist.NETWORKS[key["model"]]
        data = trace_mnist.load_mnist(args.data, own.dtype)
        run, further, target = trace_mnist.training_run(data, key["model"], key["optimizer"], rate, **options)
        together = own.together
    return Case(
        run=run, played=replayed(run), problem=further, target=target, singles=key["singles"], together=together
    )


def sample_lines(
    key: dict[str, Any], uses: Sequence[Use], truth: Tensor, scores: dict[str, Tensor], goal: Tensor, moved: Tensor
) -> list[dict[str, Any]]:
    """SGD-influence - truth = (SGD - AdamW) + (AdamW - <∇ℓ, Δθ>) + (<∇ℓ, Δθ> - truth), absolute, mean over targets.

    Over the single target rows where there are some, of the mean loss otherwise.
    """
    first_order = moved @ goal.T
    parts = {
        "part_optimizer": scores["sgd exact"] - scores["adamw exact"],
        "part_update": scores["adamw exact"] - first_order,
        "part_rest": first_order - truth,
    }
    own = slice(1 if truth.shape[1] > 1 else 0, None)
    return [
        {
            **key, "step": use[0] + 1, "place": use[1],
            "truth": rounded(float(truth[n, 0])),
            "adamw": rounded(float(scores["adamw exact"][n, 0])),
            "sgd": rounded(float(scores["sgd exact"][n, 0])),
            **{name: rounded(float(part[n, own].abs().mean())) for name, part in parts.items()},
        }
        for n, use in enumerate(uses)
    ]  # fmt: skip


def add_errors(case: Case, uses: Sequence[Use], moved: Tensor, lines: Sequence[dict[str, Any]]) -> None:
    """The true error of the estimated update, and its element-wise estimate."""
    errors = torch.linalg.vector_norm(moved - first_order_changes(case, uses), dim=1)
    proxy = ErrorProxy()
    for one in reversed(case.played):
        proxy.enter(one)
        here = [n for n, use in enumerate(uses) if use[0] == one.step.index]
        if here:
            norms = proxy.norms(one, *chosen_gradients(case, one, [uses[n] for n in here]))
            for n, norm in zip(here, norms.tolist(), strict=True):
                lines[n]["proxy"] = rounded(norm)
                lines[n]["update_error"] = rounded(float(errors[n]))


if __name__ == "__main__":
    main()
