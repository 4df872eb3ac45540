"""Training runs of one or two processes, one for each method; started by test_two_ranks with a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from online_runs import arguments, collate, rows_of
from tamis.online import FilterThenWeight, Full, Less, StepSettings, Tilt, TracIn
from tamis.online.trainer import OnlineTrainer
from tiny_models import tiny_model

METHODS = {
    "full": Full(keep=4, oversample=2),
    "filter-then-weight": FilterThenWeight(keep=3, oversample=2, cold_start=1),
    "sketched": Tilt(keep=4, oversample=2, cold_start=1),
    "reused": FilterThenWeight(keep=2, oversample=4, cold_start=1),
    "forward-only": FilterThenWeight(keep=4, oversample=2, cold_start=1, filter="top", weights="none"),
    "by-source": TracIn(keep=2, oversample=4),
    "by-source-cosine": Less(keep=2, oversample=4),
}
CANDIDATES = {"reused": "reuse:2", "forward-only": "jvp", "by-source": "sources:2", "by-source-cosine": "sources:2"}


def main(folder: Path, name: str, micro: int) -> None:
    """Train and save what came out."""
    model = tiny_model("gpt2", tied=True)
    settings = StepSettings(
        reduction="tokens",
        gram="sketch" if name == "sketched" else "exact",
        sketch_dim=8,
        target_rank=2 if name == "sketched" else None,
        candidates=CANDIDATES.get(name, "exact"),
        source_rows=1,  # of two sources: both may be of one process's candidates
    )
    trainer = OnlineTrainer(
        model=model,
        args=arguments(folder, max_steps=3, per_device_train_batch_size=micro, gradient_accumulation_steps=2),
        train_dataset=rows_of(41, seed=1, sources=True),  # the last choice has one row: none for one of two processes
        target_dataset=rows_of(7, seed=2),
        data_collator=collate,
        selection=METHODS[name],
        step_settings=settings,
        target_rows=1 if name == "sketched" else 3,  # one row for two processes, or two and one
        forecast_every=2,
    )
    trainer.train()
    rank = trainer.args.process_index
    saved = {key: param.detach().clone() for key, param in model.named_parameters()}
    torch.save({"params": saved, "log": trainer.state.log_history}, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    for method in METHODS:
        main(Path(sys.argv[1]) / method, method, 4)
