"""Forecasts that a run logs against autograd on the right target rows and the step that PyTorch's optimizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from online_runs import IGNORED, arguments, collate, rows_of
from oracles import reference_loss
from tamis.online import StepSettings, TracIn
from tamis.online.target_turns import target_positions
from tamis.online.trainer import OnlineTrainer
from tiny_models import tiny_model

POOL, TARGET = rows_of(48, seed=1, sources=True), rows_of(7, seed=2)
COUNT, SEED = 3, 3  # target rows of a look; the seed of ``arguments``


def mean_loss(model: nn.Module, places: Sequence[int]) -> Tensor:
    """Of target rows, one unpadded row after the other."""
    rows = [TARGET[int(place)] for place in places]
    losses = [reference_loss(model, torch.tensor(r["input_ids"]), torch.tensor(r["labels"]) != IGNORED) for r in rows]
    return torch.stack(losses).mean()


class Watched(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """What every update does to the rows of its look: to first order where it starts, and truly.

    Args:
        choices: that share a look.
        accumulation: choices of an update, whose forecast is that of the last.
    """

    def __init__(self, choices: int, accumulation: int) -> None:
        self._choices, self._accumulation, self.drops = choices, accumulation, list[tuple[float, float]]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        look = ((state.global_step + 1) * self._accumulation - 1) // self._choices
        self._rows = target_positions(look, count=COUNT, total=len(TARGET), seed=SEED).tolist()
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._start = [param.detach().clone() for param in self._params]
        loss = mean_loss(model, self._rows)
        self._loss, self._goal = float(loss), torch.autograd.grad(loss, self._params)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        moved = zip(self._goal, self._start, self._params, strict=True)
        first_order = sum(float((goal * (before - param.detach())).sum()) for goal, before, param in moved)
        with torch.no_grad():
            self.drops.append((first_order, self._loss - float(mean_loss(model, self._rows))))


def compare(folder: Path, model: nn.Module, *, choices: int = 1, accumulation: int = 1, **changes: Any) -> None:
    """Four updates, clipped and decayed, each with a forecast: the logged drops are those that were watched."""
    watched = Watched(choices, accumulation)
    clipped = {"max_grad_norm": 0.02, "weight_decay": 0.3, "gradient_accumulation_steps": accumulation}
    trainer = OnlineTrainer(
        model=model,
        args=arguments(folder, max_steps=4, warmup_steps=0, **clipped),
        train_dataset=POOL, target_dataset=TARGET, data_collator=collate, target_rows=COUNT, forecast_every=1,
        callbacks=[watched], selection=TracIn(keep=2, oversample=4), **changes,
    )  # fmt: skip
    trainer.train()
    keys = ("selection/predicted_drop", "selection/realised_drop")
    logged = [[entry[key] for key in keys] for entry in trainer.state.log_history if keys[0] in entry]
    assert len(logged) == len(watched.drops) == 4
    for found, expected in zip(logged, watched.drops, strict=True):
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-13)


@pytest.mark.parametrize(
    ("settings", "choices", "accumulation"),
    [
        (StepSettings(candidates="sources:3"), 3, 1),
        (StepSettings(candidates="sources:3"), 3, 2),
        (StepSettings(candidates="reuse:3"), 3, 1),
        (StepSettings(target_every=3), 3, 1),
        (StepSettings(target_ema=0.5), 1, 1),
        (StepSettings(candidates="proxy"), 1, 1),
    ],
    ids=["sources", "sources-accumulated", "reuse", "target_every", "target_ema", "proxy"],
)
def test_forecasts_of_choices_made_otherwise_are_of_the_rows_they_were_made_for(
    tmp_path: Path, settings: StepSettings, choices: int, accumulation: int
) -> None:
    """Whatever chose: the last look's rows, their own mean gradient, and both by the trained model as it is now."""
    proxy = tiny_model("gpt2", seed=1, blocks=1) if settings.candidates == "proxy" else None
    spans = {"choices": choices, "accumulation": accumulation}
    compare(tmp_path, tiny_model("gpt2", lora=True), **spans, step_settings=settings, proxy_model=proxy)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_forecasts_follow_every_groups_own_rate_and_decay(tmp_path: Path, kind: Any) -> None:
    """The slower group comes first, the one without decay last."""
    model = tiny_model("gpt2", lora=True)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    slow, decayed, rest = (
        [param for name, param in named if chosen(name)]
        for chosen in (
            lambda name: ".mlp." in name,
            lambda name: ".attn." in name and "lora_A" in name,
            lambda name: ".attn." in name and "lora_B" in name,
        )
    )
    assert slow and decayed and rest and len(slow) + len(decayed) + len(rest) == len(named)
    optimizer = kind(
        [
            {"params": slow, "lr": 2e-3, "weight_decay": 0.2},
            {"params": decayed, "lr": 1e-2, "weight_decay": 0.4},
            {"params": rest, "lr": 5e-3, "weight_decay": 0.0},
        ]
    )
    compare(tmp_path, model, optimizers=(optimizer, None))
