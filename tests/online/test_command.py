"""What is typed after ``tamis train`` reaches the step: autograd finds the alignments that the run has logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oracles import reference_loss
from tamis.cli.main import run
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.online.fate import read_candidates
from tamis.online.target_turns import target_positions
from tiny_run import make_run

FLAGS = {"--target-rows": 3, "--target-every": 2, "--target-ema": 0.8}
BASE = {"--method": "tracin", "--steps": 4, "--keep": 2, "--oversample": 2, "--held-out": 0, "--seed": 5}
# Every step is lost in float32's rounding, so that one model stands for the run.
STILL = {"--tune": "full", "--learning-rate": 1e-30, "--forecast-every": 0, "--log-steps": 1, "--device": "cpu"}


def gradients(model: Any, renderer: Renderer, path: Path, places: Sequence[int]) -> dict[int, torch.Tensor]:
    """Of the rows' losses, all weights in a line."""
    examples, found = list(read_examples([str(path)])), {}
    for place in sorted(set(places)):
        tokens = renderer.render(examples[place])
        ids, supervised = torch.from_numpy(tokens.input_ids).long(), torch.from_numpy(tokens.supervised)
        grads = torch.autograd.grad(reference_loss(model, ids, supervised), list(model.parameters()))
        found[place] = torch.cat([grad.flatten() for grad in grads])
    return found


def test_the_targets_flags_of_tamis_train_make_the_gradient_that_candidates_are_compared_with(tmp_path: Path) -> None:
    """Three rows a look, a look for two choices, and a running mean of looks with Adam's correction."""
    tiny, out = make_run(tmp_path / "tiny", rows=30), tmp_path / "out"
    words = {
        "--model": tiny.model,
        "--pool": tiny.pool,
        "--target": tiny.target,
        "--out": out,
        **BASE,
        **STILL,
        **FLAGS,
    }
    assert run(["train", "--quiet", *(str(word) for pair in words.items() for word in pair)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64)
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny.model), max_length=2048)
    looks = [target_positions(look, count=3, total=4, seed=5).tolist() for look in range(2)]
    of_target = gradients(model, renderer, tiny.target, [place for look in looks for place in look])
    means = [torch.stack([of_target[place] for place in look]).mean(dim=0) for look in looks]
    table = read_candidates(out / "candidates").to_pandas()
    of_pool = gradients(model, renderer, tiny.pool, table["row"].tolist())
    for choice, part in table.groupby("choice"):
        last = int(choice) // 2
        shares = [0.8 ** (last - look) * 0.2 / (1 - 0.8 ** (last + 1)) for look in range(last + 1)]
        goal = sum(share * mean for share, mean in zip(shares, means[: last + 1], strict=True))
        expected = np.array([float(of_pool[row] @ goal) for row in part["row"]])
        # The run computes in float32.
        np.testing.assert_allclose(part["alignment"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = [entry["selection/target_rows_seen"] for entry in log if "selection/target_rows_seen" in entry]
    assert seen == [len({place for look in looks[: number + 1] for place in look}) for number in range(2)]
