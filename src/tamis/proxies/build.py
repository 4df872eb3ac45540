"""From a model and rows to an aligned proxy and its retention, for the presets that put layers in factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from tamis.errors import Unsupported
from tamis.model.load import LoadedModel
from tamis.model.low_rank_linear import low_rank_layers, set_space
from tamis.model.proxy_folder import ProxyLayout, has_own_class
from tamis.model.targets import embedding_matrix
from tamis.protocols import Progress
from tamis.proxies.align import Aligned, AlignSettings, align
from tamis.proxies.assemble import proxy_of, write_folder
from tamis.proxies.bench import Bench
from tamis.proxies.compressible import Compressible, find_compressible
from tamis.proxies.decompose import Decomposed, decompose
from tamis.proxies.influence import Measured, mean_correlation, mixed_scores, model_agreement
from tamis.proxies.objectives import factor_params
from tamis.proxies.retention import BEFORE, CONTROL, Kept, Retention, SweepPoint, advise
from tamis.proxies.rows import batches_of
from tamis.settings.proxy import SWEEP, ProxySettings, Recipe, recipe_of

__all__ = [
    "achieved_sparsity",
    "align_settings",
    "build_low_rank",
    "require_own_class",
    "validation_retention",
]

_TINY_HIDDEN = 256  # models up to here bear, and need, the larger learning rate


def require_own_class(model: nn.Module) -> None:
    """Refuse a model whose proxy could not be loaded again.

    Raises:
        Unsupported: its class is not one of Transformers' own.
    """
    if not has_own_class(model):
        raise Unsupported(
            f"{type(model).__name__} is not a causal language model of Transformers' own, so a folder of its proxy "
            "would need code to load; give a model of a family that Transformers has"
        )


def achieved_sparsity(model: nn.Module, proxy: nn.Module, layers: Compressible) -> tuple[float, float]:
    """Share of numbers removed from the layers that could be compressed, and from the whole model."""
    whole = sum(param.numel() for param in model.parameters())
    removed = whole - sum(param.numel() for param in proxy.parameters())
    return removed / layers.numel, removed / whole


def build_low_rank(
    loaded: LoadedModel, settings: ProxySettings, bench: Bench, *, work: Path, out: Path, progress: Progress
) -> Retention:
    """Decompose, align, write the folder ``out``, and measure.

    Raises:
        Unsupported: no layer of the model can be put in factors, or its proxy could not be loaded.
        InvalidSettings: the core form has too few probes.
        NonFinite: alignment diverged.
    """
    model, recipe, roles = loaded.model, recipe_of(settings), bench.roles
    require_own_class(model)
    probe_batches = batches_of(roles.probe, batch_tokens=bench.batch_tokens, pad_id=bench.pad_id)
    layers = find_compressible(model, probe_batches[-1])  # the shortest rows
    # The core form has as many directions as probes at most: less sparse points may be out of its reach.
    reachable = [rho for rho in SWEEP if recipe.form != "core" or rho >= settings.sparsity] if settings.sweep else []
    with progress.stage("factors", len(layers.layers), "layers") as advance:
        done = decompose(
            model,
            layers.layers,
            probe_batches,
            recipe=recipe,
            lowest_sparsity=min([settings.sparsity, *reachable]),
            tokens_per_row=settings.probe_tokens,
            probe_gb=settings.probe_gb,
            seed=settings.seed,
            folder=work / "layers",
            advance=advance,
        )
    full = bench.held_out(model)
    sweep = _sweep(model, done, layers, reachable, full, bench, progress)
    ranks = done.ranks(settings.sparsity)
    proxy = proxy_of(model, done.factors(ranks), space=recipe.space)
    before = bench.kept(BEFORE, bench.held_out(proxy), full)
    aligned, control = None, None
    others = []
    if settings.aligns and ranks:
        others.append(before)
        retention = validation_retention(model, bench)
        options = align_settings(settings, recipe, model)
        if settings.control and recipe.objective != "kl":
            copy = proxy_of(model, done.factors(ranks), space=recipe.space)
            control, measured = _control(copy, model, options, retention, bench, work / "control", full, progress)
            others.append(measured)
        aligned = _aligned(proxy, model, options, retention, bench, work / "alignment", progress)
    for param in factor_params(proxy).values():  # trained in float32; scored and saved in the model's own type
        param.data = param.data.to(embedding_matrix(model).dtype)
    ours = bench.held_out(proxy)
    final = bench.kept(f"this proxy, {recipe.space}", ours, full)
    others += _other_spaces(proxy, recipe, ours, full, bench)
    achieved, whole = achieved_sparsity(model, proxy, layers)
    cost = bench.cost(model, proxy, build=done.seconds, align=aligned.seconds if aligned else 0.0)
    write_folder(proxy, loaded.tokenizer, _layout(settings, recipe, ranks, done, loaded), out)  # nothing fails after
    return Retention(
        model=settings.model,
        preset=settings.preset,
        objective=recipe.objective,
        space=recipe.space,
        sparsity=settings.sparsity,
        achieved=achieved,
        achieved_whole=whole,
        compressed_layers=len(ranks),
        ranks=(min(ranks.values()), max(ranks.values())) if ranks else None,
        left_out=layers.left_out,
        rows=roles.counts(),
        targets=roles.target.counts(),
        loss_full=float(full.losses.mean()),
        final=final,
        others=tuple(others),
        sweep=tuple(sweep),
        aligned=aligned,
        control=control,
        cost=cost,
        advice=advise(
            keep=settings.keep,
            sparsity=settings.sparsity,
            before=before if aligned else None,
            final=final,
            sweep=sweep,
            control=next((entry for entry in others if entry.name == CONTROL), None),
            seconds_ratio=cost.seconds_ratio,
        ),
        notes=(*roles.notes(), *layers.notes, *done.notes, *_kept_whole(layers, ranks)),
    )


def _kept_whole(layers: Compressible, ranks: Mapping[str, int]) -> list[str]:
    return [
        f"'{layer.name}' stays whole: at this sparsity its factors would hold no fewer numbers"
        for layer in layers.layers
        if layer.name not in ranks
    ]


def _sweep(
    model: nn.Module,
    done: Decomposed,
    layers: Compressible,
    sparsities: list[float],
    full: Measured,
    bench: Bench,
    progress: Progress,
) -> list[SweepPoint]:
    points = []
    with progress.stage("retention by sparsity", len(sparsities), "proxies") as advance:
        for sparsity in sparsities:
            proxy = proxy_of(model, done.factors(done.ranks(sparsity)), space=done.recipe.space)
            measured = bench.kept(f"sparsity {sparsity:g}", bench.held_out(proxy), full)
            achieved, _ = achieved_sparsity(model, proxy, layers)
            points.append(SweepPoint(sparsity=sparsity, achieved=achieved, kept=measured))
            advance(1)
    return points


def validation_retention(model: nn.Module, bench: Bench) -> Callable[[nn.Module], float]:
    """How well a proxy ranks the validation rows: the mean rank correlation with ``model``, which is measured once."""
    full = bench.validation(model)

    def retention(proxy: nn.Module) -> float:
        return mean_correlation(bench.validation(proxy).scores, full.scores)

    return retention


def align_settings(settings: ProxySettings, recipe: Recipe, model: nn.Module) -> AlignSettings:
    """How to align, with the learning rate that the size of ``model`` asks for unless one is given."""
    assert recipe.objective != "none"
    hidden = embedding_matrix(model).shape[1]
    return AlignSettings(
        objective=recipe.objective,
        steps=settings.steps,
        update_rows=settings.update_rows,
        learning_rate=settings.learning_rate or (1e-3 if hidden <= _TINY_HIDDEN else 1e-4),
        kl_weight=recipe.kl_weight,
        temperature=settings.temperature,
        measure_steps=settings.measure_steps,
        patience=settings.patience,
        seed=settings.seed,
    )


def _aligned(
    proxy: nn.Module,
    model: nn.Module,
    options: AlignSettings,
    retention: Callable[[nn.Module], float],
    bench: Bench,
    folder: Path,
    progress: Progress,
) -> Aligned:
    with progress.stage(f"align ({options.objective})", options.steps, "steps") as advance:
        return align(
            proxy,
            model,
            bench.roles.align,
            settings=options,
            retention=retention,
            batch_tokens=bench.batch_tokens,
            pad_id=bench.pad_id,
            folder=folder,
            advance=advance,
        )


def _control(
    proxy: nn.Module,
    model: nn.Module,
    options: AlignSettings,
    retention: Callable[[nn.Module], float],
    bench: Bench,
    folder: Path,
    full: Measured,
    progress: Progress,
) -> tuple[Aligned, Kept]:
    """Outputs alone from the same start, as many steps as cost about the same: a step with gradients costs three."""
    options = replace(options, objective="kl", steps=3 * options.steps, measure_steps=3 * options.measure_steps)
    done = _aligned(proxy, model, options, retention, bench, folder, progress)
    return done, bench.kept(CONTROL, bench.held_out(proxy), full)


def _other_spaces(proxy: nn.Module, recipe: Recipe, ours: Measured, full: Measured, bench: Bench) -> list[Kept]:
    """The space that is not the proxy's own, and its row features against the full model's target features."""
    found = []
    names, product = bench.roles.target.names, ours
    other = "factors" if recipe.space == "product" else "product"
    if low_rank_layers(proxy):
        set_space(proxy, "factors" if other == "factors" else "product")
        measured = bench.held_out(proxy)
        found.append(bench.kept(f"this proxy, {other}", measured, full))
        set_space(proxy, recipe.space)
        product = ours if recipe.space == "product" else measured
    mixed = mixed_scores(product, full, bench.roles.target)
    if mixed is not None:
        found.append(
            Kept(
                name="rows by the proxy, targets by the full model",
                loss=float(ours.losses.mean()),
                agreement=model_agreement(mixed, full.scores, names, seed=bench.seed),
            )
        )
    return found


def _layout(
    settings: ProxySettings, recipe: Recipe, ranks: Mapping[str, int], done: Decomposed, loaded: LoadedModel
) -> ProxyLayout:
    """Nothing in it depends on time, machine or the place of a file: it is part of the proxy's identity."""
    made_by = {
        "preset": settings.preset,
        "base_fingerprint": loaded.fingerprint,
        "sparsity": settings.sparsity,
        "recipe": vars(recipe),
        "probes": done.probes,
        "seed": settings.seed,
        "steps": settings.steps if recipe.objective != "none" else 0,
    }
    return ProxyLayout(ranks=dict(ranks), space=recipe.space, made_by=made_by)
