"""Batches, an optimizer, gradients by autograd and a counter of forward passes, for tests of single online steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oracles import reference_loss
from tamis.types import Batch
from tiny_models import one_row, random_batch

CANDIDATES = random_batch((9, 4, 7, 6, 8, 5), seed=3)
TARGET = random_batch((6, 8, 5), seed=4)


def row_loss(model: nn.Module, batch: Batch, row: int) -> Tensor:
    one = one_row(batch, row)
    return reference_loss(model, one.input_ids[0], one.supervised[0])


def autograd_rows(model: nn.Module, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Per-sample gradients, one backward pass for each row."""
    params = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(row_loss(model, batch, row), [params[name] for name in names], allow_unused=True)
        for row in range(len(batch.rows))
    ]
    return {
        name: torch.stack([torch.zeros_like(params[name]) if r[i] is None else r[i] for r in rows])
        for i, name in enumerate(names)
    }


def mean_gradient_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    return {name: grads.mean(dim=0) for name, grads in autograd_rows(model, batch, names).items()}


def optimizer_of(model: nn.Module, steps: int = 3, **settings: Any) -> torch.optim.Optimizer:
    """AdamW after a few ordinary steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        row_loss(model, random_batch((6, 7), seed=100 + step), 0).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def split(batch: Batch, most: int) -> list[Batch]:
    return [
        Batch(**{name: part[first : first + most] for name, part in vars(batch).items()})
        for first in range(0, len(batch.rows), most)
    ]


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[int]]:
    """Rows of every forward pass."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield calls
    handle.remove()
