"""WikiText-2 runs: a small GPT-2-shaped model of bytes goes on pretraining, as in the trajectory attribution paper.

The official training text could not be had. So the model trains on the official ``test`` text and is evaluated on the
``valid`` text: it is pretrained on the first half of ``test`` from scratch, and every recorded run goes on with blocks
of its second half (three epochs, a linear schedule with warm-up). Tokens are bytes, so there is no tokenizer to choose.
The recorded run trains all weights, or LoRA factors of rank 8 on every linear layer of the blocks.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tamis.trajectory.causal import CausalProblem
from tamis.trajectory.replay import train
from tamis.trajectory.run import Group, HeldTrajectory, Rule, Step
from tamis.trajectory.token_rows import TokenMicro
from tamis.types import Batch

NETWORKS = ("gpt2-bytes", "gpt2-bytes-lora")
BLOCK, BATCH, ROWS, EPOCHS, WARMUP = 32, 16, 128, 3, 3
STEPS = ROWS * EPOCHS // BATCH
PRETRAINING = 300  # updates of 64 blocks at 3e-3


@dataclass(frozen=True, kw_only=True)
class Blocks(TokenMicro):
    """Rows of which some can be taken."""

    def at(self, places: Sequence[int]) -> Blocks:
        index = torch.tensor(list(places), dtype=torch.int64)
        own = self.batch
        return Blocks(
            batch=Batch(
                rows=own.rows[index], input_ids=own.input_ids[index],
                attention_mask=own.attention_mask[index], supervised=own.supervised[index],
            )
        )  # fmt: skip

    def first(self, count: int) -> Blocks:
        return self.at(range(min(count, len(self))))


def blocks_of(text: Tensor, numbers: Sequence[int]) -> Blocks:
    """Blocks ``numbers`` of ``text``, every byte but the first of each supervised."""
    index = torch.tensor(list(numbers), dtype=torch.int64)
    ids = text[: len(text) // BLOCK * BLOCK].view(-1, BLOCK)[index]
    ones = torch.ones_like(ids)
    return Blocks(batch=Batch(rows=index, input_ids=ids, attention_mask=ones, supervised=ones.bool()))


def load_bytes(folder: Path, name: str) -> Tensor:
    with gzip.open(folder / f"{name}.txt.gz") as file:
        return torch.from_numpy(np.frombuffer(file.read(), dtype=np.uint8).astype(np.int64))


def new_model() -> GPT2LMHeadModel:
    """Two layers, 64 wide: 118,528 parameters with the tied head, no dropout."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": BLOCK, "n_embd": 64, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off))


@lru_cache(maxsize=1)
def pretrained(folder: Path) -> dict[str, Tensor]:
    """The same for all runs; made anew by every process, in the same way.

    On one thread, always: 300 updates of Adam from scratch make another model of another order of summation (weights
    half as far from each other as they are long), and attribution on it has other numbers.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, text = new_model(), load_bytes(folder, "test")
    first = text[: len(text) // 2]
    order = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=PRETRAINING)
    for _ in range(PRETRAINING):
        ids = blocks_of(first, order.integers(0, len(first) // BLOCK, 64).tolist()).batch.input_ids
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    print("pretrained to a loss of", round(loss.item(), 3), flush=True)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained_model(folder: Path, name: str, *, seed: int) -> nn.Module:
    """The pretrained model, whose trained parameters are those that require gradients."""
    model: nn.Module = new_model()
    model.load_state_dict(pretrained(folder))
    if name == "gpt2-bytes":
        return model
    torch.manual_seed(seed)  # of the factors
    layers = ["c_attn", "c_proj", "c_fc"]
    found: nn.Module = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers, fan_in_fan_out=True))
    return found


def rates_of(peak: float, steps: int) -> list[float]:
    """Up in ``WARMUP`` updates, then down to zero in a line."""
    return [peak * min((t + 1) / WARMUP, (steps - t) / (steps - WARMUP)) for t in range(steps)]


def training_run(
    folder: Path,
    network: str,
    optimizer: str,
    rate: float,
    *,
    seed: int,
    steps: int,
    targets: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[HeldTrajectory, tuple[Blocks, ...]]:
    """The first ``steps`` updates of a run (all of it: ``STEPS``), and ``targets`` blocks of the validation text."""
    model = trained_model(folder, network, seed=seed).to(dtype)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    problem = CausalProblem(model, {name: param.shape for name, param in trained.items()})
    text, valid = load_bytes(folder, "test"), load_bytes(folder, "valid")
    second = text[len(text) // 2 :]
    rng = np.random.default_rng(1000 + seed)
    own = rng.choice(len(second) // BLOCK, size=ROWS, replace=False)
    order = np.concatenate([rng.permutation(own) for _ in range(EPOCHS)])
    found = []
    for t, own_rate in enumerate(rates_of(rate, STEPS)[:steps]):
        index = order[t * BATCH : (t + 1) * BATCH]
        weights = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)
        micro = blocks_of(second, index.tolist())
        found.append(Step(index=t, micros=(micro,), rows=index, weights=weights, rates=(own_rate,)))
    kind = {"adamw": Group(numel=problem.layout.numel, decay=0.01), "sgd": Group(numel=problem.layout.numel, beta1=0.0)}
    rule = Rule(kind=optimizer, groups=(kind[optimizer],))  # type: ignore[arg-type]
    chosen = np.random.default_rng(2000 + seed).choice(len(valid) // BLOCK, size=targets, replace=False)
    target = tuple(blocks_of(valid, chosen[i : i + 64].tolist()) for i in range(0, targets, 64))
    start = problem.layout.flatten(trained)
    return train(problem, rule, start, found, every=1), target
