"""How fast this machine runs this model: a few real batches, forward alone and forward with gradient features."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tamis.data.batches import collate, plan_batches
from tamis.evaluate.devices import Rate
from tamis.evaluate.inputs import SampledCorpus
from tamis.gradients.per_sample import per_sample_features
from tamis.model.flops import FACTORIZED_SIDE, ModelShape, feature_flops, stage_flops
from tamis.model.load import ModelSettings, load_model
from tamis.model.loss import per_sample_losses
from tamis.model.memory import default_batch_tokens
from tamis.model.targets import gradient_layers
from tamis.projection import make_projector
from tamis.protocols import Progress
from tamis.types import Batch

__all__ = ["Calibration", "measured_rate"]

_SECONDS = 10.0  # of timed batches for each kind of pass, at least one
_MOST_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A measured rate and the dtype it holds for."""

    rate: Rate
    dtype: str


def measured_rate(
    settings: ModelSettings,
    shape: ModelShape,
    pool: SampledCorpus,
    *,
    batch_tokens: int | None,
    batch_invariant: bool = False,
    progress: Progress,
) -> Calibration:
    """Load the model and time up to eight batches of sampled pool rows, after one that warms up.

    The rate counts real tokens, so padding and everything that is not a matrix product make it lower, as they will in
    the run.

    Raises:
        InvalidInput: no sampled row is usable, or the model cannot be loaded.
    """
    pool.size()  # refuses a sample without a usable row
    with progress.stage("load the model", 1, "models") as advance:
        loaded = load_model(settings)
        advance(1)
    model, device = loaded.model, loaded.device
    layers = gradient_layers(model)
    projector = make_projector("factorized", dim=FACTORIZED_SIDE, seed=0)
    tokens = batch_tokens or default_batch_tokens(device)
    batches = _batches(pool, tokens, max_rows=1 if batch_invariant else None)

    def forward(batch: Batch) -> None:
        with torch.no_grad():
            per_sample_losses(model, batch)

    def gradient(batch: Batch) -> None:
        per_sample_features(model, batch, layers, projector)

    with progress.stage("measure", 2 * len(batches), "batches") as advance:
        forward_rate = _rate(forward, "forward", shape, batches, device, advance)
        gradient_rate = _rate(gradient, "gradient", shape, batches, device, advance)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_threads(device)}"
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    dtype = str(loaded.description["dtype"])
    of_rows = "one row" if batch_invariant else f"at most {tokens:,} tokens"
    return Calibration(
        rate=Rate(
            device=name,
            forward=forward_rate,
            gradient=gradient_rate,
            origin=f"measured on {len(batches)} batches of {of_rows} in {dtype}",
            memory_bytes=memory,
            is_cpu=device.type == "cpu",
        ),
        dtype=dtype,
    )


def _batches(pool: SampledCorpus, batch_tokens: int, *, max_rows: int | None) -> list[Batch]:
    """Up to eight batches, of short, middling and long rows alike."""
    rows = [(i, t) for i, t in enumerate(pool.tokenized) if t is not None and t.num_supervised > 0]
    lengths = torch.tensor([len(t.input_ids) for _, t in rows]).numpy()
    groups = plan_batches(lengths, batch_tokens=batch_tokens, max_rows=max_rows)
    step = max(1, -(-len(groups) // _MOST_BATCHES))
    return [collate(pool.rows[[rows[i][0] for i in g]], [rows[i][1] for i in g], 0) for g in groups[::step]]


def _rate(
    run: Callable[[Batch], None],
    work: str,
    shape: ModelShape,
    batches: list[Batch],
    device: torch.device,
    advance: Callable[[int], None],
) -> float:
    """Operations per second over the batches, the first one run once more before the clock starts."""
    run(batches[0].to(device))
    flops = elapsed = 0.0
    for batch in batches:
        if elapsed < _SECONDS:
            _wait(device)
            started = time.perf_counter()
            run(batch.to(device))
            _wait(device)
            elapsed += time.perf_counter() - started
            flops += _operations(shape, work, batch)
        advance(1)
    return flops / elapsed


def _operations(shape: ModelShape, work: str, batch: Batch) -> float:
    lengths = batch.attention_mask.sum(dim=1).double()
    tokens = float(lengths.sum())
    total = stage_flops(shape, work, tokens, float(batch.supervised[:, 1:].sum()), float((lengths**2).sum()))
    if work == "gradient":
        total += feature_flops(shape, "factorized", FACTORIZED_SIDE, rows=len(lengths), tokens=tokens)
    return total


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _threads(device: torch.device) -> str:
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else "one device"
