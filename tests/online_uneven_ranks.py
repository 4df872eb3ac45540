"""Two processes with unequal shares of a step; started by test_two_ranks with a folder for what they found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from online_case import factors, matrix, moments
from tamis.gradients.held import Factored
from tamis.gradients.rows import RowGradients
from tamis.model.processes import rank
from tamis.online import TracIn, Uniform, measure
from tamis.online.step import OnlineStep
from tamis.online.together import add_up, gather_rows
from tiny_models import permuted, random_batch, tiny_model


def main(folder: Path) -> None:
    """Five candidates here and one there; then one candidate each, of which only one is chosen."""
    measure._CHUNK = 6  # the case's matrix in parts: all processes must cut it alike
    mine = range(5) if rank() == 0 else range(5, 6)
    rows = RowGradients([matrix()])
    act, grad_out = factors(mine)
    rows.add({"layer": Factored(act, grad_out, has_bias=False)}, len(act))
    found = {"gram": measure.exact_interactions("metric", rows, moments(), gather=gather_rows)}
    squares, total = measure.measure_lengths(
        "metric", rows, moments(), torch.ones(len(act)), gather=gather_rows, add_up=add_up
    )
    found |= {"squares": gather_rows(squares), "total": torch.tensor(total)}

    model = tiny_model("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = random_batch((6, 5), seed=1)
    here, target = [permuted(batch, [rank()])], [batch] if rank() == 0 else []
    for name, method in (("uniform", Uniform(keep=1, oversample=2)), ("tracin", TracIn(keep=1, oversample=2))):
        proposal = OnlineStep(model, method).propose(here, target, optimizer, seed=0)
        parts = torch.cat([add_up(grad).flatten() for grad in proposal.gradient.values()])
        found |= {name: parts / proposal.divisor, f"{name}-rows": torch.from_numpy(proposal.choice.rows)}
    torch.save(found, folder / f"uneven-{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
