"""What a proxy keeps of its target's ranking and loss, over sparsities, presets and seeds, before and after alignment.

    python benchmarks/iprox_retention.py --model DIR --pool pool.jsonl --target a.jsonl b.jsonl \\
        --presets default ipsvd activation svd --sparsities 0.1 0.3 0.5 0.7 0.9 --seeds 0 1 2 \\
        --objectives kl align align+kl --align-sparsities 0.5 0.7

Figure 3 and tables 7, 9 and 12 of *IProX* (2026). Every preset is decomposed once a seed and measured at every
sparsity. Objectives have equal time: a step that matches gradients costs about three that match outputs, so ``kl``
takes three times ``--steps``; the seconds stand beside. One line of the CSV file per measurement and space; lines that
are there are not computed again, so an interrupted run goes on (with ``--work``, in the middle of a preset, too).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tamis.model.load import LoadedModel
from tamis.model.low_rank_linear import set_space
from tamis.model.targets import embedding_matrix
from tamis.proxies.align import align
from tamis.proxies.assemble import proxy_of
from tamis.proxies.bench import Bench
from tamis.proxies.build import achieved_sparsity, align_settings, validation_retention
from tamis.proxies.compressible import Compressible, find_compressible
from tamis.proxies.decompose import Decomposed, decompose
from tamis.proxies.influence import Measured, mixed_scores, model_agreement
from tamis.proxies.layer_extraction import block_importance, blocks_to_keep, extract_blocks
from tamis.proxies.objectives import factor_params
from tamis.proxies.rows import batches_of
from tamis.runs.proxy import prepare, read_rows
from tamis.settings.proxy import ProxySettings, Recipe, recipe_of

KEY = ("seed", "preset", "probe_rows", "sparsity", "objective")
FIELDS = (
    *KEY,
    *("space", "achieved", "steps", "align_seconds"),
    *("spearman", "spearman_low", "spearman_high", "top_5", "top_5_low", "top_5_high"),
    *("loss_full", "loss", "loss_kept", "seconds", "held_out_rows", "targets"),
)


class Table:
    """Lines of the CSV file, and which measurements it has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: set[tuple[str, ...]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open(newline="") as file:
                self.done = {tuple(line[name] for name in KEY) for line in csv.DictReader(file)}
        else:
            with path.open("w", newline="") as file:
                csv.DictWriter(file, FIELDS).writeheader()

    def has(self, **key: Any) -> bool:
        return tuple(str(key[name]) for name in KEY) in self.done

    def add(self, lines: list[dict[str, Any]]) -> None:
        """All spaces of one measurement at once, so that a measurement is whole or absent."""
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerows(lines)
        print({k: lines[0][k] for k in (*KEY, "spearman", "loss_kept", "align_seconds")}, flush=True)


@dataclass
class Case:
    """One seed's model, rows and measurement of the full model."""

    settings: ProxySettings
    preset: str
    loaded: LoadedModel
    bench: Bench
    full: Measured
    measures_factors: bool

    @property
    def recipe(self) -> Recipe:
        """Of a preset that puts layers in factors."""
        return recipe_of(ProxySettings(model=self.settings.model, pool=self.settings.pool, preset=self.preset))

    def lines(self, key: Mapping[str, Any], proxy: nn.Module, **more: Any) -> list[dict[str, Any]]:
        """A line per space; ``mixed`` has the rows of the proxy's product against the full model's target rows."""
        for param in factor_params(proxy).values():  # aligned in float32; a user's proxy is saved in the model's type
            param.data = param.data.to(embedding_matrix(self.loaded.model).dtype)
        names, seed = self.bench.roles.target.names, self.bench.seed
        started = time.perf_counter()
        set_space(proxy, "product")
        product = self.bench.held_out(proxy)
        seconds = time.perf_counter() - started
        scores = {"product": product.scores}
        mixed = mixed_scores(product, self.full, self.bench.roles.target)
        if mixed is not None:
            scores["mixed"] = mixed
        if self.measures_factors:  # a second pass
            set_space(proxy, "factors")
            scores["factors"] = self.bench.held_out(proxy).scores
        loss, loss_full = float(product.losses.mean()), float(self.full.losses.mean())
        lines = []
        for space, found in scores.items():
            both = model_agreement(found, self.full.scores, names, seed=seed)
            lines.append(
                {
                    **key, "space": space, **more,
                    "spearman": round(both.spearman.value, 4), "spearman_low": rounded(both.spearman.low),
                    "spearman_high": rounded(both.spearman.high), "top_5": round(both.top_overlap.value, 4),
                    "top_5_low": rounded(both.top_overlap.low), "top_5_high": rounded(both.top_overlap.high),
                    "loss_full": round(loss_full, 4), "loss": round(loss, 4), "loss_kept": round(loss_full / loss, 4),
                    "seconds": round(seconds, 2), "held_out_rows": len(self.full.losses), "targets": " ".join(names),
                }
            )  # fmt: skip
        return lines


def measure_preset(case: Case, table: Table, arguments: argparse.Namespace, folder: Path) -> None:
    """One preset of one seed: every sparsity before alignment, then the objectives."""
    settings, bench, model = case.settings, case.bench, case.loaded.model
    key = {"seed": settings.seed, "preset": case.preset, "probe_rows": settings.probe_rows}
    wanted = [("none", rho) for rho in arguments.sparsities]
    wanted += [(objective, rho) for rho in arguments.align_sparsities for objective in arguments.objectives]
    missing = [(o, rho) for o, rho in wanted if not table.has(**key, sparsity=rho, objective=o)]
    if not missing:
        return
    batches = batches_of(bench.roles.probe, batch_tokens=bench.batch_tokens, pad_id=bench.pad_id)
    if case.preset == "layer-extraction":
        importance = block_importance(model, batches)
        for objective, rho in missing:
            if objective == "none":
                kept = blocks_to_keep(importance, rho)
                proxy = extract_blocks(model, kept)
                achieved = round(1 - len(kept) / len(importance), 4)
                line = {**key, "sparsity": rho, "objective": "none"}
                table.add(case.lines(line, proxy, achieved=achieved, steps=0, align_seconds=0))
        return
    layers = find_compressible(model, batches[-1])
    recipe = case.recipe
    lowest = min(rho for _, rho in wanted)
    size = f"{settings.probe_rows}x{settings.probe_tokens}"
    folder /= f"{case.preset}-seed{settings.seed}-{size}-from{lowest:g}"
    done = decompose(
        model,
        layers.layers,
        batches,
        recipe=recipe,
        lowest_sparsity=lowest,
        tokens_per_row=settings.probe_tokens,
        probe_gb=settings.probe_gb,
        seed=settings.seed,
        folder=folder / "layers",
        advance=lambda layers: None,
    )
    print(f"{case.preset}, seed {settings.seed}: factors in {done.seconds:.1f} s", flush=True)
    aligns = any(objective != "none" for objective, _ in missing)
    retention = validation_retention(model, bench) if aligns else lambda proxy: 0.0
    for objective, rho in missing:
        measure_one(case, table, done, layers, objective, rho, retention, folder / f"align-{objective}-{rho}")


def measure_one(
    case: Case,
    table: Table,
    done: Decomposed,
    layers: Compressible,
    objective: str,
    rho: float,
    retention: Callable[[nn.Module], float],
    folder: Path,
) -> None:
    settings, bench, model = case.settings, case.bench, case.loaded.model
    proxy = proxy_of(model, done.factors(done.ranks(rho)), space="product")
    achieved, _ = achieved_sparsity(model, proxy, layers)
    steps, seconds = 0, 0.0
    if objective != "none":
        options = align_settings(settings, replace(case.recipe, objective=objective), model)  # type: ignore[arg-type]
        if objective == "kl":
            options = replace(options, steps=3 * options.steps, measure_steps=3 * options.measure_steps)
        aligned = align(
            proxy,
            model,
            bench.roles.align,
            settings=options,
            retention=retention,
            batch_tokens=bench.batch_tokens,
            pad_id=bench.pad_id,
            folder=folder,
            advance=lambda steps: None,
        )
        print(
            f"{objective}: " + ", ".join(f"{point.retention:.3f} at {point.step}" for point in aligned.curve),
            flush=True,
        )
        steps, seconds = aligned.best_step, aligned.seconds
    key = {"seed": settings.seed, "preset": case.preset, "probe_rows": settings.probe_rows, "sparsity": rho}
    more = {"achieved": round(achieved, 4), "steps": steps, "align_seconds": round(seconds, 2)}
    table.add(case.lines({**key, "objective": objective}, proxy, **more))


def rounded(bound: float | None) -> float | None:
    """A bound of an interval, which too few rows have not."""
    return None if bound is None else round(bound, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", nargs="+", required=True)
    parser.add_argument("--target", nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", default=["default", "ipsvd", "activation", "svd", "layer-extraction"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="*", default=["kl", "align", "align+kl"])
    parser.add_argument("--align-sparsities", nargs="*", type=float, default=[0.5])
    parser.add_argument("--steps", type=int, default=100, help="of objectives with gradients; kl: three times as many")
    parser.add_argument("--measure-steps", type=int, default=50, help="of objectives with gradients, as --steps")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--probe-rows", nargs="+", type=int, default=[128], help="several: table 7")
    parser.add_argument("--probe-tokens", type=int, default=64)
    parser.add_argument("--held-out-rows", type=int, default=200)
    parser.add_argument("--validation-rows", type=int, default=64)
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--probe-gb", type=float, default=4.0)
    parser.add_argument("--product-only", action="store_true", help="not the space of the factors: half the passes")
    parser.add_argument("--work", type=Path, help="keeps factors and alignments of this model and these rows")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/iprox_retention.csv"))
    arguments = parser.parse_args()
    table = Table(arguments.csv)
    base = ProxySettings(
        model=arguments.model,
        pool=tuple(arguments.pool),
        target=tuple(arguments.target),
        steps=arguments.steps,
        update_rows=arguments.batch_rows,
        measure_steps=arguments.measure_steps,
        learning_rate=arguments.learning_rate,
        probe_tokens=arguments.probe_tokens,
        held_out_rows=arguments.held_out_rows,
        validation_rows=arguments.validation_rows,
        projection_dim=arguments.projection_dim,
        max_length=arguments.max_length,
        dtype=arguments.dtype,
        device=arguments.device,
        attention=arguments.attention,
        batch_tokens=arguments.batch_tokens,
        probe_gb=arguments.probe_gb,
        on_bad_row="skip",
    )
    pool, target = read_rows(base)
    for seed in arguments.seeds:
        for probe_rows in arguments.probe_rows:
            settings = replace(base, seed=seed, probe_rows=probe_rows)
            loaded, bench, _ = prepare(settings, pool, target)
            full = bench.held_out(loaded.model)
            for preset in arguments.presets:
                case = Case(
                    settings=settings,
                    preset=preset,
                    loaded=loaded,
                    bench=bench,
                    full=full,
                    measures_factors=not arguments.product_only,
                )
                with tempfile.TemporaryDirectory() as folder:
                    measure_preset(case, table, arguments, arguments.work or Path(folder))


if __name__ == "__main__":
    main()
