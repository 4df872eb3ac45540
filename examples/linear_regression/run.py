"""The running example of Influence Distillation (section 3.2): linear regression with impostors in the training rows.

    python examples/linear_regression/run.py --data images.npz

Half of the source rows are images of two classes, half are Gaussian noise with the images' mean and standard deviation
and a random label. Weights come from what the target rows say at the start: unconstrained ones, which minimise the loss
after one step exactly, and robust ones, which are positive, sum to the number of rows and are held together by λ. Then
gradient descent runs on with these weights, and the loss on rows that nobody has seen is watched.

The images are a NumPy file with ``x_train`` (rows first, any shape after it, 0 to 255) and ``y_train`` (class numbers),
MNIST or CIFAR-10 for example; nothing is downloaded. The paper uses CIFAR-10, and λ of 0.01 to 0.03; what λ means hangs
on the size of the inputs, which it does not state. Here pixels have the mean 0 and the standard deviation 1.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from tamis.solve.quadratic import DenseQuadratic
from tamis.solve.simplex_qp import solve_simplex_qp

Matrix = npt.NDArray[np.float64]

ROWS = 256  # of each kind: real source rows, impostors, target rows, validation rows
ETA = 1e-3
LAMBDAS = (1.0, 10.0, 30.0)
SHOWN = "robust, λ = 10"
BEYOND = 1e3  # a loss above which a run is given up
NEEDS = "x_train (rows first, values 0 to 255) and y_train (class numbers)"


@dataclass(frozen=True)
class Problem:
    """Source rows, the first half real; target and validation rows; a start for θ."""

    x: Matrix
    y: Matrix
    x_target: Matrix
    y_target: Matrix
    x_held_out: Matrix
    y_held_out: Matrix
    start: Matrix


def problem_from(path: Path, classes: tuple[int, int], seed: int) -> Problem:
    """Three draws without overlap from the images of two classes, and impostors with the first draw's moments."""
    try:
        stored = np.load(path)
        images, labels = stored["x_train"], stored["y_train"]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{path} cannot be used ({error}); give an .npz file with {NEEDS}") from None
    random = np.random.default_rng(seed)
    found = np.flatnonzero(np.isin(labels, classes))
    if len(found) < 3 * ROWS:
        raise SystemExit(f"{path} has {len(found)} images of classes {classes}; {3 * ROWS} are needed")
    chosen = random.permutation(found)[: 3 * ROWS]
    x = images[chosen].reshape(3 * ROWS, -1) / 255.0
    y = (labels[chosen] == classes[1]).astype(np.float64)
    x = (x - x[:ROWS].mean()) / x[:ROWS].std()
    real = x[:ROWS]
    impostors = random.normal(real.mean(0), real.std(0), real.shape)
    return Problem(
        x=np.concatenate([real, impostors]),
        y=np.concatenate([y[:ROWS], random.integers(0, 2, ROWS)]),
        x_target=x[ROWS : 2 * ROWS],
        y_target=y[ROWS : 2 * ROWS],
        x_held_out=x[2 * ROWS :],
        y_held_out=y[2 * ROWS :],
        start=random.normal(0, 0.1 / x.shape[1] ** 0.5, x.shape[1]),  # not 0, where class 0 has no gradient
    )


def gradients(theta: Matrix, x: Matrix, y: Matrix) -> Matrix:
    """Per-sample gradients of ``(θ·x - y)²``, one row each."""
    found: Matrix = 2 * (x @ theta - y)[:, None] * x
    return found


def influence(problem: Problem) -> tuple[Matrix, Matrix]:
    """``p`` and ``Q`` of equations 3 and 4; the loss is quadratic, so its expansion is the loss."""
    g = gradients(problem.start, problem.x, problem.y)
    target = gradients(problem.start, problem.x_target, problem.y_target).mean(0)
    hessian = 2 * problem.x_target.T @ problem.x_target / len(problem.x_target)
    return g @ target, g @ hessian @ g.T / len(g)


def robust_weights(p: Matrix, q: Matrix, lam: float) -> tuple[Matrix, float]:
    """Equation 7, and its certified relative gap."""
    solution = solve_simplex_qp(torch.from_numpy(p), DenseQuadratic(torch.from_numpy(ETA * q)), lam)
    return solution.value.numpy(), float(solution.stats["gap"])


def losses_of_training(problem: Problem, weights: Matrix, steps: int) -> Matrix:
    """The loss on held-out rows before and after every step of weighted gradient descent; shorter if it runs away."""
    theta, losses = problem.start.copy(), []
    for _ in range(steps + 1):
        losses.append(float(((problem.x_held_out @ theta - problem.y_held_out) ** 2).mean()))
        if losses[-1] > BEYOND:
            break
        theta -= ETA / len(problem.x) * gradients(theta, problem.x, problem.y).T @ weights
    return np.array(losses)


def draw(weights: dict[str, Matrix], losses: dict[str, Matrix], path: Path) -> None:
    """Both weight distributions, real rows and impostors apart, and held-out losses; one file that works offline."""
    titles = ("Unconstrained weights", f"Weights, {SHOWN}", "Held-out loss")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles)
    for place, name in enumerate(("unconstrained", SHOWN), start=1):
        for kind, part, colour in (("real", slice(0, ROWS), "#0b6b63"), ("impostors", slice(ROWS, None), "#b86e00")):
            figure.add_trace(
                go.Histogram(
                    x=weights[name][part], name=kind, marker_color=colour, opacity=0.7, nbinsx=60, showlegend=place == 1
                ),
                row=1,
                col=place,
            )
    for name, values in losses.items():
        figure.add_trace(go.Scatter(x=np.arange(len(values)), y=values, name=name, mode="lines"), row=1, col=3)
    figure.update_layout(barmode="overlay", template="simple_white", height=420, width=1250)
    figure.update_xaxes(title="weight", col=1).update_xaxes(title="weight", col=2)
    figure.update_xaxes(title="step", type="log", col=3).update_yaxes(title="loss", type="log", col=3)
    figure.write_html(path, include_plotlyjs=True)


def main() -> None:
    """From the command line to the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"an .npz file with {NEEDS}")
    parser.add_argument("--classes", type=int, nargs=2, default=(0, 1), help="class numbers; the second is labelled 1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("linear-regression"), help="folder for the plot and numbers")
    given = parser.parse_args()
    problem = problem_from(given.data, tuple(given.classes), given.seed)
    p, q = influence(problem)
    n = len(p)
    weights = {"equal": np.ones(n), "unconstrained": np.linalg.pinv(ETA * q, rcond=1e-10, hermitian=True) @ p}
    gaps = {}
    for lam in LAMBDAS:
        name = f"robust, λ = {lam:g}"
        weights[name], gaps[name] = robust_weights(p, q, lam)
    losses = {name: losses_of_training(problem, w, given.steps) for name, w in weights.items()}
    rows = []
    for name, w in weights.items():
        size = np.abs(w)
        rows.append(
            {
                "weights": name,
                "least": float(w.min()),
                "largest": float(w.max()),
                "negative": int((w < 0).sum()),
                "nonzero": int((size > 0).sum()),
                "share_on_real_rows": float(size[:ROWS].sum() / size.sum()),
                "loss_at_start": float(losses[name][0]),
                "loss_after_1_step": float(losses[name][1]),
                "loss_after_10_steps": float(losses[name][10]) if len(losses[name]) > 10 else None,
                "least_loss": float(losses[name].min()),
                "steps": len(losses[name]) - 1,
                "loss_at_end": float(losses[name][-1]),
                **({"gap": gaps[name]} if name in gaps else {}),
            }
        )
    given.out.mkdir(parents=True, exist_ok=True)
    draw(weights, losses, given.out / "weights.html")
    (given.out / "numbers.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    for row in rows:
        print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    print(f"{given.out / 'weights.html'}, {given.out / 'numbers.json'}")


if __name__ == "__main__":
    main()
