"""Do scores foretell what retraining without a sample does? MNIST, as in the trajectory attribution paper (app. D.1).

    python benchmarks/trace_fidelity.py --data mnist --models mlp cnn --seeds 10      # the paper's table, hours
    python benchmarks/trace_fidelity.py --data mnist --models mlp --optimizers sgd --rates 1e-1 1e-2 1e-3
    python benchmarks/trace_fidelity.py --data mnist --errors 40 --steps 24 47 94     # error against length and rate

``--data`` is a folder with ``mnist10.npz``: 6,000 training images (a tenth of MNIST) and 1,000 test images. One epoch
with batches of 64, AdamW (0.9, 0.999) or SGD, constant rate; 200 random samples are left out, one retraining each; the
effect on the loss of 500 test images. Spearman's correlation over the samples, averaged over the images.

Two files grow beside each other, and what stands in them is not computed again: a line per method and run
(``trace-fidelity.csv``), and a line per sample (``trace-fidelity-samples.csv``) with the three parts of the error of
SGD-influence (optimizer, update estimate, rest), and with ``--errors`` the error of the estimated update, its
element-wise estimate and its exact second order. float64, so that effects of 1e-9 at the smallest rates are no noise.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamis.gradients.functional import hessian_vector, per_sample_gradients
from tamis.maths.ranks import rank_correlation
from tamis.trajectory.adjoint import Channel, final_values, start_channel, sweep_step
from tamis.trajectory.classifier import Classifier, LabelledRows
from tamis.trajectory.leave_out import final_parameters_without
from tamis.trajectory.replay import Played, play_segment, train
from tamis.trajectory.run import Group, HeldTrajectory, Rule, State, Step
from tamis.trajectory.secant import SecantWindow
from tamis.trajectory.sweep import target_gradients
from tamis.trajectory.update_error import ErrorProxy, SecondOrder

RESULTS = Path(__file__).parent / "results"
BATCH, WINDOW = 64, 10
KEYS = ("model", "optimizer", "rate", "steps", "seed", "samples", "targets")
SUMMARY = (*KEYS, "method", "spearman", "spearman_mean_loss", "relative_error", "seconds")
SAMPLES = (
    *KEYS, "step", "place", "truth", "adamw", "sgd", "part_optimizer", "part_update", "part_rest",
    "update_error", "proxy", "second_order",
)  # fmt: skip
Use = tuple[int, int]


class Mlp(nn.Module):
    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 49, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


# The paper's networks have ReLU, whose kinks no derivative sees; "mlp-tanh" is the same network without any.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Mlp(nn.ReLU),
    "mlp-tanh": lambda: Mlp(nn.Tanh),
    "cnn": Cnn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["mlp"], choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=["adamw", "sgd"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    parser.add_argument("--steps", nargs="+", type=int, default=[94], help="94 is the whole epoch")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--errors", type=int, default=0, help="samples whose update's error is taken apart")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    summary, samples = args.out / "trace-fidelity.csv", args.out / "trace-fidelity-samples.csv"
    done = {tuple(row[key] for key in KEYS) for row in read(summary)}
    for name in args.models:
        for optimizer in args.optimizers:
            for rate in args.rates:
                for steps in args.steps:
                    for seed in range(args.seeds):
                        counts = (args.samples, args.targets)
                        key = dict(zip(KEYS, (name, optimizer, f"{rate:g}", steps, seed, *counts), strict=True))
                        if tuple(str(value) for value in key.values()) in done:
                            continue
                        lines, details = one_run(args, key, rate)
                        append(samples, SAMPLES, details)
                        append(summary, SUMMARY, lines)  # last: its presence says that the run is done
                        for line in lines:
                            print(
                                *(line[column] for column in (*KEYS[:5], "method", "spearman", "seconds")), flush=True
                            )


def one_run(args: Any, key: dict[str, Any], rate: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    run, target = training(args, key, rate)
    played = play_segment(run, 0, run.num_steps)
    rng = np.random.default_rng(key["seed"])
    total = sum(len(step.rows) for step in run.steps)
    chosen = np.sort(rng.choice(total, size=min(args.samples, total), replace=False))
    uses = [(int(use) // BATCH, int(use) % BATCH) for use in chosen]
    started = time.perf_counter()
    ends = torch.stack([final_parameters_without(run, *use) for use in uses])
    theta = played[-1].after.theta
    before = final_values(run.problem, theta, target)
    truth = torch.stack([final_values(run.problem, end, target) - before for end in ends])
    seconds = {"retraining": time.perf_counter() - started}
    goal = target_gradients(run.problem, theta, target, per_row=True)
    scores = dict[str, Tensor]()
    for name in methods_of(key["optimizer"]):
        started = time.perf_counter()
        scores[name] = scores_of(run, played, goal, uses, name)
        seconds[name] = time.perf_counter() - started
    lines = [
        {
            **key, "method": name, "seconds": round(seconds[name], 2),
            "spearman": mean_spearman(found, truth),
            "spearman_mean_loss": mean_spearman(found.mean(dim=1, keepdim=True), truth.mean(dim=1, keepdim=True)),
            "relative_error": rounded(float((found - truth).norm() / truth.norm())),
        }
        for name, found in scores.items()
    ]  # fmt: skip
    details = sample_lines(key, uses, truth, scores, goal, ends - theta)
    errors_of(args, run, played, uses, ends - theta, details)
    return lines, details


def training(args: Any, key: dict[str, Any], rate: float) -> tuple[HeldTrajectory, tuple[LabelledRows, ...]]:
    data = np.load(args.data / "mnist10.npz")
    torch.manual_seed(key["seed"])
    module = MODELS[key["model"]]()
    problem = Classifier(module.double().to(args.device))
    order = np.random.default_rng(1000 + key["seed"]).permutation(len(data["x_train"]))
    tests = np.random.default_rng(2000 + key["seed"]).permutation(len(data["x_test"]))[: args.targets]

    def rows(split: str, index: Any) -> LabelledRows:
        images = torch.from_numpy(data[f"x_{split}"][index]).double()[:, None] / 255
        labels = torch.from_numpy(data[f"y_{split}"][index]).long()
        return LabelledRows(inputs=((images - 0.1307) / 0.3081).to(args.device), labels=labels.to(args.device))

    steps = []
    for t in range(min(key["steps"], -(-len(order) // BATCH))):
        index = order[t * BATCH : (t + 1) * BATCH]
        weights = torch.full((len(index),), 1 / len(index), dtype=torch.float64, device=args.device)
        steps.append(Step(index=t, micros=(rows("train", index),), rows=index, weights=weights, rates=(rate,)))
    if key["optimizer"] == "adamw":
        rule = Rule(kind="adamw", groups=(Group(numel=problem.layout.numel, decay=0.01),))
    else:
        rule = Rule(kind="sgd", groups=(Group(numel=problem.layout.numel, beta1=0.0),))
    return train(problem, rule, problem.start(), steps, every=10), (rows("test", tests),)


def methods_of(optimizer: str) -> list[str]:
    common = ["adamw exact", "sgd exact", "adamw none"]
    return [*common, "adamw fisher", f"adamw exact, finite removal {WINDOW}"] if optimizer == "adamw" else common


def scores_of(run: HeldTrajectory, played: Sequence[Played], goal: Tensor, uses: Sequence[Use], name: str) -> Tensor:
    words = name.replace(",", "").split()
    steps = list(played)
    if words[0] == "adamw" and run.rule.kind == "sgd":
        steps = as_if_adam(steps)  # what a user gets who takes the wrong method: Adam's moments of an SGD run
    method: Any = f"{words[0]}-influence"
    channel: Channel = start_channel(name, method, words[1], goal, moments=2)  # type: ignore[arg-type]
    window = SecantWindow(WINDOW) if "finite" in words else None
    found: dict[Use, Tensor] = {}
    for one in reversed(steps):
        own = [use for use in uses if use[0] == one.step.index]
        if window is not None:
            window.enter(one, channel.adjoint)
            if own:
                grads = chosen_gradients(run, one, own)
                weights = one.step.weights[[place for _, place in own]]
                found |= dict(zip(own, window.scores(one, grads, weights), strict=True))
        scores = sweep_step(run.problem, one, channel)
        if window is None:
            found |= {use: scores[use[1]] for use in own}
    return torch.stack([found[use] for use in uses])


def as_if_adam(steps: Sequence[Played]) -> list[Played]:
    rule = Rule(kind="adamw", groups=(Group(numel=len(steps[0].g)),))
    state, found = rule.fresh(steps[0].before.theta), []
    for one in steps:
        moved = rule.advance(state, one.g, one.step.rates)
        state = State(theta=one.after.theta, moments=moved.moments, count=moved.count)
        found.append(replace(one, rule=rule, after=state))
    return found


def chosen_gradients(run: HeldTrajectory, one: Played, own: Sequence[Use]) -> Tensor:
    micro = one.step.micros[0]
    places = [place for _, place in own]
    part = LabelledRows(inputs=micro.inputs[places], labels=micro.labels[places])
    return per_sample_gradients(run.problem, one.before.theta, part)


def sample_lines(
    key: dict[str, Any], uses: Sequence[Use], truth: Tensor, scores: dict[str, Tensor], goal: Tensor, moved: Tensor
) -> list[dict[str, Any]]:
    """SGD-influence - truth = (SGD - AdamW) + (AdamW - <∇ℓ, Δθ>) + (<∇ℓ, Δθ> - truth), absolute, mean over images."""
    first_order = moved @ goal.T
    parts = {
        "part_optimizer": scores["sgd exact"] - scores["adamw exact"],
        "part_update": scores["adamw exact"] - first_order,
        "part_rest": first_order - truth,
    }
    return [
        {
            **key, "step": use[0] + 1, "place": use[1],
            "truth": rounded(float(truth[n].mean())),
            "adamw": rounded(float(scores["adamw exact"][n].mean())),
            "sgd": rounded(float(scores["sgd exact"][n].mean())),
            **{name: rounded(float(part[n].abs().mean())) for name, part in parts.items()},
        }
        for n, use in enumerate(uses)
    ]  # fmt: skip


def errors_of(
    args: Any, run: HeldTrajectory, played: Sequence[Played], uses: Sequence[Use], moved: Tensor, lines: list[Any]
) -> None:
    """True error of the estimated update, its element-wise estimate and its exact second order, for some samples."""
    if run.rule.kind != "adamw" or not args.errors:
        return
    some = list(range(0, len(uses), max(1, len(uses) // args.errors)))[: args.errors]
    proxy = ErrorProxy()
    for one in reversed(played):
        proxy.enter(one)
        for n in some:
            if uses[n][0] == one.step.index:
                grads = chosen_gradients(run, one, [uses[n]])
                lines[n]["proxy"] = rounded(float(proxy.norms(one, grads, one.step.weights[[uses[n][1]]])[0]))
    for n in some:
        step, place = uses[n]
        grad = chosen_gradients(run, played[step], [uses[n]])[0]
        weight = float(played[step].step.weights[place])
        if len(grad) < 100_000:  # three nested derivatives of a larger model take too long here
            sample = SecondOrder.start(played[step], grad, weight)
            for one in played[step + 1 :]:
                sample.follow(run.problem, one)
            lines[n]["second_order"] = rounded(float(sample.bend[0].norm()))
            change = sample.change[0]
        else:
            change = forward(run, played[step:], grad, weight)
        lines[n]["update_error"] = rounded(float((moved[n] - change).norm()))


def forward(run: HeldTrajectory, played: Sequence[Played], grad: Tensor, weight: float) -> Tensor:
    zero = torch.zeros_like(grad)
    change = played[0].derivative().push((zero, zero, zero), played[0].clip.jacobian(-weight * grad))
    for one in played[1:]:
        product = hessian_vector(run.problem, one.before.theta, one.step.micros, one.step.weights, change[0])
        change = one.derivative().push(change, one.clip.jacobian(product))
    return change[0]


def mean_spearman(scores: Tensor, truth: Tensor) -> float | None:
    columns = zip(scores.T.cpu().numpy(), truth.T.cpu().numpy(), strict=True)
    found = [value for a, b in columns if (value := rank_correlation(a, b)) is not None]
    return rounded(float(np.mean(found))) if found else None


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
