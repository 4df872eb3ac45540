"""Do two implementations of AdamW-influence agree? dattri-llm's, run in an environment of its own, and this one.

    python benchmarks/trace_agreement.py --python PEERS/bin/python

dattri-llm (see peers-requirements.txt) trains a network of two linear layers without biases and scores every row of
every update; the same updates are replayed here. Where the definitions coincide: AdamW, no clipping (dattri-llm takes
no derivative of it), one update per batch, rows of equal weight, curvature by the empirical Fisher, scores of single
target rows. Its numbers are float32, and of the opposite sign: positive where removing the row lowers the target's
loss. So they are turned around here; retraining without some rows says which sign is which.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tamis.maths.ranks import rank_correlation
from tamis.trajectory.leave_out import leave_out_effect
from tamis.trajectory.replay import train
from tamis.trajectory.run import Group, HeldTrajectory, Rule, Step
from tamis.trajectory.sweep import SweepSettings, run_sweep

# Shared with the tests: the package itself trains language models only.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from classifier import Classifier, LabelledRows

RUNNER = Path(__file__).parent / "peers" / "run_dattri_trajectory.py"
WIDTHS, BATCH, STEPS, TARGETS = (20, 16, 5), 8, 30, 6
RATES, DECAY = (1e-2, 1e-3, 1e-4), 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has dattri-llm")
    args = parser.parse_args()
    for rate in RATES:
        given = problem_of(rate)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("given.npz", "found.npz")]
            np.savez(files[0], **given)
            subprocess.run([args.python, RUNNER, *files], check=True, stdout=subprocess.DEVNULL)
            found = dict(np.load(files[1]))
        run, target = same_run(given, found["rows"])
        end = run.problem.layout.named(run.state(STEPS).theta)
        away = max(float(np.abs(end[f"{2 * i}.weight"].numpy() - found[f"layer{i}"]).max()) for i in range(2))
        print(f"rate {rate:g}, dattri-llm {found['version']}: final weights differ by at most {away:.1e}")
        theirs = -found["scores"].astype(np.float64)
        for settings in (SweepSettings(curvature="fisher"), SweepSettings(curvature="exact")):
            own = torch.stack(run_sweep(run, (target,), settings, per_row=True)["scores"]).numpy()
            error = float(np.linalg.norm(own - theirs) / np.linalg.norm(own))
            print(f"  our {settings.curvature:6} and theirs: relative difference {error:.1e}, {against(own, theirs)}")
        truth = np.stack([leave_out_effect(run, step, 0, (target,)).numpy() for step in range(STEPS)])
        print(f"  theirs and retraining without the first row of each update: {against(theirs[:, 0], truth)}")


def against(one: Any, other: Any) -> str:
    return f"Spearman {rank_correlation(one.reshape(-1), other.reshape(-1)):.6f}"


def problem_of(rate: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    layers = {
        f"layer{i}": (rng.normal(size=(WIDTHS[i + 1], WIDTHS[i])) / WIDTHS[i] ** 0.5).astype(np.float32)
        for i in range(2)
    }
    rows = {"train": BATCH * STEPS, "target": TARGETS}
    inputs = {f"x_{name}": rng.normal(size=(count, WIDTHS[0])).astype(np.float32) for name, count in rows.items()}
    labels = {f"y_{name}": rng.integers(0, WIDTHS[2], count) for name, count in rows.items()}
    return {**layers, **inputs, **labels, "rate": rate, "decay": DECAY, "batch": BATCH, "steps": STEPS}


def same_run(given: dict[str, Any], rows: Any) -> tuple[HeldTrajectory, LabelledRows]:
    """The run that dattri-llm trained, in float64, from the rows in the order in which they came."""
    layers = [nn.Linear(WIDTHS[i], WIDTHS[i + 1], bias=False) for i in range(2)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(torch.from_numpy(given[f"layer{i}"]))
    problem = Classifier(nn.Sequential(layers[0], nn.Tanh(), layers[1]).double())

    def micro(name: str, index: Any) -> LabelledRows:
        return LabelledRows(
            inputs=torch.from_numpy(given[f"x_{name}"][index]).double(),
            labels=torch.from_numpy(given[f"y_{name}"][index]),
        )

    weights = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)
    steps = [
        Step(index=t, micros=(micro("train", own),), rows=own, weights=weights, rates=(given["rate"],))
        for t, own in enumerate(rows)
    ]
    rule = Rule(kind="adamw", groups=(Group(numel=problem.layout.numel, decay=DECAY),))
    return train(problem, rule, problem.start(), steps, every=STEPS), micro("target", slice(None))


if __name__ == "__main__":
    main()
