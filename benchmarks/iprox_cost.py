"""What scoring costs on a proxy and on its target, and what the proxy costs to make: seconds, side by side.

    python benchmarks/iprox_cost.py --model DIR --pool pool.jsonl --sparsities 0.5 0.7 --repeats 5 --pool-rows 12000

Every repeat runs both models over the same rows, one after the other, and a ratio is formed within a repeat, so that
what else the machine does cancels. ``blocks`` is the same pass with a head of 64 words in both models: the LM head is
the same in both and hides the blocks. ``make`` is building and aligning over the target's pass over ``--pool-rows``
rows. One line of the CSV file per repeat; lines that are there are not measured again. With ``--clock cpu``, seconds
are those of this process alone: on a busy machine and one thread, what the work would take on a free one.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tamis.gradients.per_sample import per_sample_features
from tamis.model.targets import gradient_layers, output_embeddings
from tamis.proxies.align import align
from tamis.proxies.assemble import copy_with, proxy_of
from tamis.proxies.bench import Bench
from tamis.proxies.build import align_settings
from tamis.proxies.compressible import find_compressible
from tamis.proxies.decompose import decompose
from tamis.proxies.retention import block_tflops, total_tflops
from tamis.proxies.rows import Row, batches_of
from tamis.runs.proxy import prepare, read_rows
from tamis.settings.proxy import ProxySettings, recipe_of

KEY = ("sparsity", "what", "repeat")
FIELDS = (*KEY, "target_seconds", "proxy_seconds", "ratio", "operations_ratio", "rows", "tokens", "threads", "clock")
WORDS = 64


def few_words(model: nn.Module) -> nn.Module:
    """The model with a head of a few words."""
    head = output_embeddings(model)
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    small = nn.Linear(weight.shape[1], WORDS, bias=False, device=weight.device, dtype=weight.dtype)
    small.weight.data.copy_(weight[:WORDS])
    return copy_with(model, {id(head): small})


def of_few_words(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, tokens=replace(row.tokens, input_ids=row.tokens.input_ids % np.int32(WORDS))) for row in rows]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_of(model: nn.Module, rows: Sequence[Row], bench: Bench, clock: Callable[[], float]) -> float:
    """One influence pass: forward, backward, and the sketches."""
    layers = gradient_layers(model)
    batches = batches_of(rows, batch_tokens=bench.batch_tokens, pad_id=bench.pad_id)
    started = clock()
    for batch in batches:
        per_sample_features(model, batch, layers, bench.projector)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", nargs="+", required=True)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--rows", type=int, default=32, help="of every timed pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pool-rows", type=int, default=12_000)
    parser.add_argument("--probe-rows", type=int, default=128)
    parser.add_argument("--probe-tokens", type=int, default=64)
    parser.add_argument(
        "--factors", type=Path, help="`layers` of the retention benchmark's --work: times passes, and not the making"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/iprox_cost.csv"))
    arguments = parser.parse_args()
    settings = ProxySettings(
        model=arguments.model,
        pool=tuple(arguments.pool),
        preset=arguments.preset,
        probe_rows=arguments.probe_rows,
        probe_tokens=arguments.probe_tokens,
        steps=arguments.steps,
        update_rows=arguments.batch_rows,
        batch_tokens=arguments.batch_tokens,
        held_out_rows=max(20, arguments.rows),
        max_length=arguments.max_length,
        dtype=arguments.dtype,
        device=arguments.device,
        attention=arguments.attention,
        on_bad_row="skip",
    )
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, str]] = []
    if arguments.csv.exists():
        with arguments.csv.open(newline="") as file:
            lines = list(csv.DictReader(file))
    else:
        with arguments.csv.open("w", newline="") as file:
            csv.DictWriter(file, FIELDS).writeheader()
    have = {tuple(line[name] for name in KEY) for line in lines}

    def add(line: dict[str, Any]) -> None:
        with arguments.csv.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(line)
        lines.append({name: str(value) for name, value in line.items()})

    loaded, bench, _ = prepare(settings, *read_rows(settings))
    model, rows = loaded.model, bench.roles.held_out[: arguments.rows]
    tokens = sum(len(row.tokens.input_ids) for row in rows)
    recipe, clock = recipe_of(settings), CLOCKS[arguments.clock]
    for sparsity in arguments.sparsities:
        keys = [(str(sparsity), what, str(n)) for what in ("whole", "blocks") for n in range(arguments.repeats)]
        if have.issuperset([*keys, (str(sparsity), "make", "0")]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_of(bench.roles.probe, batch_tokens=bench.batch_tokens, pad_id=bench.pad_id)
            where = arguments.factors or Path(folder) / "layers"
            started = clock()
            done = decompose(
                model,
                find_compressible(model, batches[-1]).layers,
                batches,
                recipe=recipe,
                lowest_sparsity=sparsity,
                tokens_per_row=settings.probe_tokens,
                probe_gb=settings.probe_gb,
                seed=0,
                folder=where,
                advance=lambda layers: None,
            )
            finding = clock() - started
            proxy = proxy_of(model, done.factors(done.ranks(sparsity)), space="product")
            pairs = {
                "whole": (model, proxy, list(rows), total_tflops(proxy, rows) / total_tflops(model, rows)),
                "blocks": (
                    few_words(model),
                    few_words(proxy),
                    of_few_words(rows),
                    block_tflops(proxy, rows) / block_tflops(model, rows),
                ),
            }
            shared: dict[str, Any] = {
                "sparsity": sparsity,
                "rows": len(rows),
                "tokens": tokens,
                "threads": torch.get_num_threads(),
            }
            shared["clock"] = arguments.clock
            for what, (target, small, given, operations) in pairs.items():
                for each in (target, small):  # buffers and allocators
                    seconds_of(each, given[:8], bench, clock)
                for repeat in range(arguments.repeats):
                    if (str(sparsity), what, str(repeat)) in have:
                        continue
                    spent = [seconds_of(each, given, bench, clock) for each in (target, small)]
                    add(
                        {
                            **shared, "what": what, "repeat": repeat, "target_seconds": round(spent[0], 4),
                            "proxy_seconds": round(spent[1], 4), "ratio": round(spent[1] / spent[0], 4),
                            "operations_ratio": round(operations, 4),
                        }
                    )  # fmt: skip
            if arguments.factors:  # others have paid for them
                continue
            whole = [
                float(x["target_seconds"]) for x in lines if x["sparsity"] == str(sparsity) and x["what"] == "whole"
            ]
            pool_pass = statistics.median(whole) / tokens * bench.roles.mean_tokens * arguments.pool_rows
            options = replace(align_settings(settings, recipe, model), measure_steps=settings.steps)
            started = clock()
            align(
                proxy,
                model,
                bench.roles.align,
                settings=options,
                retention=lambda proxy: 0.0,  # measurements are counted apart
                batch_tokens=bench.batch_tokens,
                pad_id=bench.pad_id,
                folder=Path(folder) / "align",
                advance=lambda steps: None,
            )
            aligning = clock() - started
            made = finding + aligning
            print(f"factors {finding:.1f} s, alignment {aligning:.1f} s, pool {pool_pass:.1f} s")
            add(
                {
                    **shared, "what": "make", "repeat": 0, "target_seconds": round(pool_pass, 2),
                    "proxy_seconds": round(made, 2), "ratio": round(made / pool_pass, 4), "operations_ratio": "",
                }
            )  # fmt: skip
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        found[line["sparsity"], line["what"]].append(float(line["ratio"]))
    for (sparsity_text, what), ratios in found.items():
        print(f"{sparsity_text} {what}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    main()
