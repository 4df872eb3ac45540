"""A small model with rows for every role, as a build sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tamis.projection.factorized import FactorizedProjector
from tamis.proxies.bench import Bench
from tamis.proxies.rows import Roles, Row, TargetRows
from tamis.types import Example, TokenizedExample
from tiny_models import VOCAB, tiny_model

SETTINGS: dict[str, Any] = {
    "probe_rows": 8, "probe_tokens": 16, "steps": 4, "measure_steps": 2, "update_rows": 2, "held_out_rows": 20,
    "validation_rows": 8, "device": "cpu", "learning_rate": 1e-3, "projection_dim": 8, "sweep": False,
}  # fmt: skip
_OF_TRAINING = ("steps", "measure_steps", "update_rows", "validation_rows", "learning_rate")
UNALIGNED: dict[str, Any] = {**{k: v for k, v in SETTINGS.items() if k not in _OF_TRAINING}, "objective": "none"}


def rows(number: int, *, seed: int, vocab: int = VOCAB) -> tuple[Row, ...]:
    """Random rows of 6 to 12 tokens, half of them supervised."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(number):
        length = int(draw.integers(6, 13))
        supervised = np.arange(length) >= length // 2
        tokens = TokenizedExample(
            input_ids=draw.integers(3, vocab, length).astype(np.int32), supervised=supervised, truncated=0
        )
        example = Example(
            index=index, id=str(index), file="pool.jsonl", row=index, source="made", format="text", text="-"
        )
        made.append(Row(example=example, tokens=tokens))
    return tuple(made)


def roles() -> Roles:
    """Twenty held-out rows, and two targets of three rows."""
    target = TargetRows(
        rows=rows(6, seed=5), group=np.array([0, 0, 0, 1, 1, 1], dtype=np.int64), names=("a", "b"), are_stand_ins=False
    )
    return Roles(
        held_out=rows(20, seed=1),
        validation=rows(8, seed=2),
        probe=rows(12, seed=3),
        align=rows(10, seed=4),
        target=target,
        pool_rows=50,
        mean_tokens=9.0,
    )


def bench() -> Bench:
    return Bench(roles=roles(), projector=FactorizedProjector(dim=8, seed=0), batch_tokens=64, pad_id=0, seed=0)


def model(family: str = "llama", **options: Any) -> nn.Module:
    """In float32 unless said otherwise."""
    return tiny_model(family, **{"dtype": torch.float32, **options})
