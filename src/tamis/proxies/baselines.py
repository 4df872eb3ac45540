"""Proxies that put nothing in factors: whole blocks left out, and a smaller model of the family as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from tamis.model.load import LoadedModel
from tamis.model.proxy_folder import ProxyLayout
from tamis.proxies.assemble import write_folder
from tamis.proxies.bench import Bench
from tamis.proxies.build import require_own_class
from tamis.proxies.influence import Measured
from tamis.proxies.layer_extraction import block_importance, blocks_to_keep, extract_blocks
from tamis.proxies.retention import Retention, advise
from tamis.proxies.rows import Roles, batches_of
from tamis.proxy_settings import ProxySettings

__all__ = ["build_extraction", "build_sibling"]


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
        "base": settings.model,
        "base_fingerprint": loaded.fingerprint,
        "sparsity": settings.sparsity,
        "blocks": kept,
        "seed": settings.seed,
    }
    write_folder(proxy, loaded.tokenizer, ProxyLayout(ranks={}, made_by=made_by), out)
    full, ours = bench.held_out(model), bench.held_out(proxy)
    note = (
        f"Blocks kept: {', '.join(map(str, kept))} of {len(importance)} (from 0); change of the states by block: "
        + ", ".join(f"{value:.3f}" for value in importance)
    )
    achieved = 1 - len(kept) / len(importance)
    return _retention(settings, bench, model, proxy, full, ours, achieved=achieved, notes=(note,))


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
        "base": settings.model,
        "base_fingerprint": loaded.fingerprint,
        "sibling": settings.sibling,
        "sibling_fingerprint": sibling.fingerprint,
    }
    write_folder(sibling.model, sibling.tokenizer, ProxyLayout(ranks={}, made_by=made_by), out)
    full = bench.held_out(loaded.model)
    ours = replace(bench, roles=roles, pad_id=sibling.pad_id).held_out(sibling.model)
    return _retention(
        settings, bench, loaded.model, sibling.model, full, ours, achieved=_size_ratio(loaded.model, sibling.model)
    )


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
    achieved: float,
    notes: tuple[str, ...] = (),
) -> Retention:
    final = bench.kept("this proxy", ours, full)
    return Retention(
        model=settings.model,
        preset=settings.preset,
        objective="none",
        space="product",
        sparsity=settings.sparsity,
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
        cost=bench.cost(model, proxy, full, ours, build=0.0, align=0.0),
        advice=advise(keep=settings.keep, sparsity=settings.sparsity, before=None, final=final, sweep=(), control=None),
        notes=(*bench.roles.notes(), *notes),
    )
