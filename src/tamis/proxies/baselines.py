"""Proxies that put nothing in factors: blocks left out, a smaller model as it is, and a head that learns scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from tamis.disk import replace_atomically
from tamis.model.load import LoadedModel
from tamis.model.proxy_folder import ProxyLayout
from tamis.protocols import Progress
from tamis.proxies.assemble import write_folder
from tamis.proxies.bench import Bench
from tamis.proxies.build import require_own_class
from tamis.proxies.influence import Measured, model_agreement
from tamis.proxies.influence_scorer import fit_head, row_states, states_of, write_head
from tamis.proxies.layer_extraction import block_importance, blocks_to_keep, extract_blocks
from tamis.proxies.retention import Cost, Kept, Retention, advise, block_tflops
from tamis.proxies.rows import Roles, Row, batches_of
from tamis.settings import ProxySettings
from tamis.types import FloatArray

__all__ = ["build_extraction", "build_scorer", "build_sibling"]


def build_extraction(loaded: LoadedModel, settings: ProxySettings, bench: Bench, *, out: Path) -> Retention:
    """Keep the blocks that change their input most, write the folder ``out``, and measure.

    Raises:
        Unsupported: the model's blocks cannot be found, or it is not of Transformers' own classes.
    """
    model = loaded.model
    require_own_class(model)
    batches = batches_of(bench.roles.probe, batch_tokens=bench.batch_tokens, pad_id=bench.pad_id)
    importance = block_importance(model, batches)
    kept = blocks_to_keep(importance, settings.sparsity)
    proxy = extract_blocks(model, kept)
    made_by = {
        "preset": settings.preset,
        "base_fingerprint": loaded.fingerprint,
        "sparsity": settings.sparsity,
        "blocks": kept,
        "seed": settings.seed,
    }
    full, ours = bench.held_out(model), bench.held_out(proxy)
    note = (
        f"Blocks kept: {', '.join(map(str, kept))} of {len(importance)} (from 0); change of the states by block: "
        + ", ".join(f"{value:.3f}" for value in importance)
    )
    achieved = 1 - len(kept) / len(importance)
    cost = bench.cost(model, proxy, build=0.0, align=0.0)
    write_folder(proxy, loaded.tokenizer, ProxyLayout(ranks={}, made_by=made_by), out)
    return _retention(settings, bench, model, proxy, full, ours, cost=cost, achieved=achieved, notes=(note,))


def build_sibling(
    loaded: LoadedModel, sibling: LoadedModel, roles: Roles, settings: ProxySettings, bench: Bench, *, out: Path
) -> Retention:
    """Write another model to the folder ``out`` and measure it on the same rows, ``roles``, in its own tokens.

    Raises:
        Unsupported: the sibling is not of Transformers' own classes.
    """
    require_own_class(sibling.model)
    made_by = {
        "preset": settings.preset,
        "base_fingerprint": loaded.fingerprint,
        "sibling_fingerprint": sibling.fingerprint,
    }
    full, theirs = bench.held_out(loaded.model), replace(bench, roles=roles, pad_id=sibling.pad_id)
    ours = theirs.held_out(sibling.model)
    cost = bench.cost(loaded.model, sibling.model, build=0.0, align=0.0, theirs=theirs)
    achieved = _size_ratio(loaded.model, sibling.model)
    write_folder(sibling.model, sibling.tokenizer, ProxyLayout(ranks={}, made_by=made_by), out)
    return _retention(settings, bench, loaded.model, sibling.model, full, ours, cost=cost, achieved=achieved)


def build_scorer(
    loaded: LoadedModel,
    sibling: LoadedModel,
    roles: Roles,
    settings: ProxySettings,
    bench: Bench,
    *,
    pool: Sequence[tuple[int, Row]],
    out: Path,
    progress: Progress,
) -> Retention:
    """Fit a head on ``sibling`` to scores of the alignment rows, and write it and its scores of ``pool``.

    The folder holds no model: a head has no gradients for a method to run on. ``scores.parquet`` is what it gives.

    Args:
        loaded: the target, which scores the rows that the head is fitted to.
        sibling: the smaller model.
        roles: the rows in the sibling's tokens.
        settings: of the build.
        bench: with the rows in the target's tokens.
        pool: position in the pool and row, in the sibling's tokens.
        out: where to write.
        progress: told of rows.
    """
    how: dict[str, Any] = {"batch_tokens": bench.batch_tokens, "pad_id": sibling.pad_id}
    names, model = bench.roles.target.names, loaded.model
    started = time.perf_counter()
    taught = bench.annotate(model)
    head = fit_head(row_states(sibling.model, roles.align, **how), torch.from_numpy(taught.scores))
    fit_seconds = time.perf_counter() - started
    full = bench.held_out(model)
    scores = head.predict(row_states(sibling.model, roles.held_out, **how))
    final = Kept(name="this head", loss=None, agreement=model_agreement(scores, full.scores, names, seed=bench.seed))
    with progress.stage("scores (pool)", len(pool), "rows") as advance:
        predicted = head.predict(row_states(sibling.model, [row for _, row in pool], **how, advance=advance))
    theirs = replace(bench, roles=roles, pad_id=sibling.pad_id)
    # The head needs a forward pass alone, and no logits.
    cost = replace(
        bench.cost(model, sibling.model, build=0.0, align=fit_seconds, theirs=theirs),
        seconds_proxy=min(theirs.timed(lambda batch: states_of(sibling.model, batch)) for _ in range(3)),
        tflops_proxy=block_tflops(sibling.model, roles.held_out, work="forward"),
        block_tflops_proxy=block_tflops(sibling.model, roles.held_out, work="forward"),
    )
    note = (
        f"The head was fitted to {len(roles.align)} rows that the full model scored (ridge penalty {head.penalty:g} a "
        "row). It knows these targets alone, and the folder is no model: scores.parquet has its scores of the pool."
    )
    made = _retention(settings, bench, model, sibling.model, full, full, cost=cost, achieved=0.0, notes=(note,))
    achieved = _size_ratio(model, sibling.model)
    write_head(head, names, out / "scorer.safetensors")
    _write_scores(pool, predicted, names, out / "scores.parquet")
    return replace(made, final=final, achieved=achieved, advice=made.advised(settings.keep, final))


def _write_scores(rows: Sequence[tuple[int, Row]], scores: FloatArray, names: Sequence[str], path: Path) -> None:
    columns = {
        "row": pa.array([index for index, _ in rows], type=pa.int64()),
        "id": pa.array([row.example.id for _, row in rows], type=pa.string()),
        **{f"score:{name}": pa.array(scores[:, j], type=pa.float32()) for j, name in enumerate(names)},
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    replace_atomically(path, (sink.getvalue().to_pybytes(),))


def _size_ratio(model: nn.Module, other: nn.Module) -> float:
    sizes = [sum(param.numel() for param in each.parameters()) for each in (model, other)]
    return 1 - sizes[1] / sizes[0]


def _retention(
    settings: ProxySettings,
    bench: Bench,
    model: nn.Module,
    proxy: nn.Module,
    full: Measured,
    ours: Measured,
    *,
    cost: Cost,
    achieved: float,
    notes: tuple[str, ...] = (),
) -> Retention:
    final = bench.kept("this proxy", ours, full)
    # Another model has the size that it has, whatever --sparsity says.
    sparsity = settings.sparsity if settings.preset == "layer-extraction" else None
    return Retention(
        model=settings.model,
        preset=settings.preset,
        objective="none",
        space="product",
        sparsity=sparsity,
        achieved=achieved,
        achieved_whole=_size_ratio(model, proxy),
        compressed_layers=0,
        ranks=None,
        left_out=(),
        rows=bench.roles.counts(),
        targets=bench.roles.target.counts(),
        loss_full=float(full.losses.mean()),
        final=final,
        others=(),
        sweep=(),
        aligned=None,
        control=None,
        cost=cost,
        advice=advise(
            keep=settings.keep,
            sparsity=sparsity,
            before=None,
            final=final,
            sweep=(),
            control=None,
            seconds_ratio=cost.seconds_ratio,
            is_low_rank=False,
        ),
        notes=(*bench.roles.notes(), *notes),
    )
