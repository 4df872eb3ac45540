"""Small training runs for the trainer's tests: rows, a collator, arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from tiny_models import random_batch

IGNORED = -100


def rows_of(count: int, *, seed: int, sources: bool = False) -> datasets.Dataset:
    """Rows of 4 to 9 random tokens, some of them labels."""
    batch = random_batch([4 + (7 * i + seed) % 6 for i in range(count)], seed=seed)
    found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for ids, mask, supervised in zip(batch.input_ids, batch.attention_mask, batch.supervised, strict=True):
        length = int(mask.sum())
        found["input_ids"].append(ids[:length].tolist())
        supervised[0] = False  # never predicted; the plain trainer counts it all the same for some models
        found["labels"].append(torch.where(supervised, ids, IGNORED)[:length].tolist())
    if sources:
        found["source"] = ["even" if i % 2 == 0 else "odd" for i in range(count)]
    return datasets.Dataset.from_dict(found)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows])

    ids = padded("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", IGNORED)}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Six short updates on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})
