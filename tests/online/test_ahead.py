"""A trainer's look-ahead scores against differences of real training from where each block began.

The oracle knows the candidates' log, the learning rates, and a copy of the model and its AdamW at the start of a block.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from online_runs import IGNORED, arguments, collate, rows_of
from oracles import reference_loss
from tamis.online import Lookahead, StepSettings
from tamis.online.fate import read_candidates
from tamis.online.target_turns import target_positions
from tamis.online.trainer import OnlineTrainer
from tiny_models import tiny_model

POOL, TARGET = rows_of(24, seed=1), rows_of(6, seed=2)  # four choices of six candidates an epoch
UPDATES = 7
BLOCKS = {1: (1, 2), 3: (3,), 4: (4, 5), 6: (6,)}  # of two; the second ends with the epoch, the last with training
CLIP, EPS = 0.05, 1e-5
PARTS = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.5, 2.5], dtype=torch.float64)  # by which candidates are turned down


def row_losses(model: nn.Module, rows: Any, places: list[int]) -> Tensor:
    """One unpadded row after the other."""
    of = [rows[place] for place in places]
    return torch.stack(
        [reference_loss(model, torch.tensor(row["input_ids"]), torch.tensor(row["labels"]) != IGNORED) for row in of]
    )


class Snapshots(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """The rate of every update, and the model and its optimizer as they are before it."""

    def __init__(self) -> None:
        self.rates, self.before = list[float](), list[tuple[nn.Module, Any]]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.before.append(copy.deepcopy((kwargs["model"], optimizer)))


def run(folder: Path, selection: Lookahead, *, reduction: Any) -> tuple[Snapshots, pd.DataFrame]:
    """Seven updates of which the first is cold, clipped and decayed, by rates that do not fall to zero."""
    seen = Snapshots()
    OnlineTrainer(
        model=tiny_model("gpt2", lora=True, blocks=1),
        args=arguments(
            folder, max_steps=UPDATES, max_grad_norm=CLIP, weight_decay=0.1, lr_scheduler_type="constant_with_warmup",
            warmup_steps=4,
        ),
        train_dataset=POOL, target_dataset=TARGET, data_collator=collate, selection=selection, target_rows=4,
        step_settings=StepSettings(reduction=reduction), callbacks=[seen], forecast_every=0,
    ).train()  # fmt: skip
    return seen, read_candidates(folder / "candidates").to_pandas()


def shares(own: pd.DataFrame, reduction: str) -> Tensor:
    """Of every candidate in the update that all of them would make."""
    size = own["tokens"].to_numpy(dtype=np.float64) if reduction == "tokens" else np.ones(len(own))
    return torch.from_numpy(size / size.sum())


def ends(
    seen: Snapshots, table: pd.DataFrame, block: tuple[int, ...], *, at: int, reduction: str
) -> tuple[nn.Module, nn.Module]:
    """The model after a block of real updates on all candidates, those of update ``at`` turned down, and up."""
    found = []
    for sign in (1, -1):
        model, optimizer = copy.deepcopy(seen.before[block[0]])
        for update in block:
            own = table[table["step"] == update + 1]
            weights = shares(own, reduction) * (1 - sign * EPS * PARTS if update == at else 1)
            optimizer.zero_grad()
            (row_losses(model, POOL, own["row"].tolist()) @ weights).backward()
            norm = nn.utils.clip_grad_norm_(trainable(model), CLIP)
            assert norm > 2 * CLIP, "the case must clip"
            for group in optimizer.param_groups:
                group["lr"] = seen.rates[update]
            optimizer.step()
        found.append(model)
    return found[0], found[1]


def score(table: pd.DataFrame, update: int) -> float:
    """What turning the update's candidates down by their parts does, by the scores that the run had."""
    return float(table[table["step"] == update + 1]["alignment"].to_numpy() @ PARTS.numpy())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def target_places(update: int) -> list[int]:
    return target_positions(update, count=4, total=len(TARGET), seed=3).tolist()


@pytest.mark.parametrize("reduction", ["rows", "tokens"])
def test_rehearsed_scores_of_a_run_are_differences_of_its_coming_updates(tmp_path: Path, reduction: Any) -> None:
    """All candidates of an update are turned down at once, each by a part of its own: one difference tests them all."""
    selection = Lookahead(keep=2, oversample=3, horizon=2, curvature="exact")
    seen, table = run(tmp_path, selection, reduction=reduction)
    for first, block in BLOCKS.items():
        for update in block:
            pair = ends(seen, table, block, at=update, reduction=reduction)
            with torch.no_grad():
                losses = [float(row_losses(model, TARGET, target_places(first)).mean()) for model in pair]
            assert score(table, update) == pytest.approx((losses[0] - losses[1]) / (2 * EPS), rel=1e-5)


def test_a_frozen_horizon_does_not_reach_beyond_the_last_update(tmp_path: Path) -> None:
    """There it is the rule of one step: the target's gradient where the run is, times the update's difference."""
    seen, table = run(tmp_path, Lookahead(keep=2, oversample=3, horizon=3, form="frozen"), reduction="tokens")
    last = UPDATES - 1
    model, _ = seen.before[last]
    goal = torch.autograd.grad(row_losses(model, TARGET, target_places(last)).mean(), trainable(model))
    down, up = ends(seen, table, (last,), at=last, reduction="tokens")
    moved = zip(goal, trainable(down), trainable(up), strict=True)
    expected = sum(float((g * (a - b)).sum()) for g, a, b in moved) / (2 * EPS)
    assert score(table, last) == pytest.approx(expected, rel=1e-5)
