"""Time and memory of one online step against plain training on all of its candidates, AdamW stepping in both.

    python benchmarks/online_step.py                                  # every method, 8M and 35M, LoRA and full
    python benchmarks/online_step.py --models 8m --weights lora --methods full tilt --repeats 3
    python benchmarks/online_step.py --methods tracin tracin@reuse:4 tracin@jvp tracin@proxy tracin:target_rank=8

Plain training runs the candidates in micro-batches and adds their gradients up. Variants take turns within a repeat,
in changing order; ratios are to the plain step of the same repeat (median, smallest, largest), by processor time on a
CPU, where other work disturbs it least, and by the clock elsewhere. A step looks at target rows, too, which a plain one
does not: once as many as half of the candidates (the default), and once only two of them. A method may have changes to
its settings or to those of a step, as in ``online_quality.py``; ``NAME@CANDIDATES`` scores candidates in a cheaper way,
``@reuse:K`` timed over K steps, ``@proxy`` by a model of two blocks. Peak memory is measured in a process of its own
per variant. All goes to a CSV file, line by line; lines that it has for the same model, weights, target rows, variant
and device are kept and not measured again.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch when it first allocates

import torch
import transformers
from torch import nn

from engine import HEADS, SHAPES, build_model, peak_mib
from online_quality import online
from tamis.online import METHODS
from tamis.online.step import OnlineStep
from tamis.types import Batch

RESULTS = Path(__file__).parent / "results" / "online-step.csv"
KEEP, OVERSAMPLE, TOKENS, ROWS = 8, 4, 128, 8
CANDIDATES = KEEP * OVERSAMPLE
KEY = ("model", "weights", "target_rows", "device", "variant")
LIMITS = {"filter-then-weight": 0.90, "anchored": 0.90, "tracin": 0.80, "top-k": 0.80, "tilt": 0.80}


def build_proxy(name: str, device: torch.device) -> nn.Module:
    """Two blocks of the model's shape, all trainable, as random as the model."""
    heads, kv_heads = HEADS[name]
    shape = {**SHAPES[name], "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=kv_heads)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device=device, dtype=dtype).eval()


def batches(model: str, rows: int, device: torch.device, seed: int) -> list[Batch]:
    """``rows`` rows of random tokens, at most eight in a forward pass."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for first in range(0, rows, ROWS):
        size = min(ROWS, rows - first)
        ids = torch.randint(3, SHAPES[model]["vocab_size"], (size, TOKENS), generator=generator)
        ones = torch.ones_like(ids)
        at = torch.arange(first, first + size)
        found.append(Batch(rows=at, input_ids=ids, attention_mask=ones, supervised=ones.bool()).to(device))
    return found


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, candidates: list[Batch]) -> None:
    """What a Trainer does with the same rows."""
    optimizer.zero_grad(set_to_none=True)
    for batch in candidates:
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids, use_cache=False
        ).loss
        (loss * (len(batch.rows) / CANDIDATES)).backward()
    optimizer.step()


def build(variant: str, model_name: str, weights: str, target_rows: int, device: torch.device) -> Callable[[], object]:
    """One update of a model of its own, whose optimizer has stepped before."""
    model = build_model(model_name, device, lora=weights == "lora")
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    candidates = batches(model_name, CANDIDATES, device, seed=0)
    target = batches(model_name, target_rows, device, seed=1)
    plain_step(model, optimizer, candidates[:1])
    if variant == "plain":
        return lambda: plain_step(model, optimizer, candidates)
    asked = online(variant, KEEP, OVERSAMPLE)
    proxy = build_proxy(model_name, device) if asked.settings.candidates_kind == "proxy" else None
    step = OnlineStep(model, asked.selection, asked.settings, proxy=proxy)

    def update() -> None:
        look = step.looks(candidates, cold=False)
        proposal = step.propose(candidates, target if look else [], optimizer, fresh_target=look)
        for name, param in step.params.items():
            param.grad = proposal.gradient[name] / proposal.divisor
        optimizer.step()

    return update


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def together(variant: str) -> int:
    """Steps that are timed as one: those of a window."""
    return 1 if variant == "plain" else online(variant, KEEP, OVERSAMPLE).settings.reuse


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds: of the processor on a CPU, of the clock elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_mb(variant: str, model_name: str, weights: str, target_rows: int, device: torch.device) -> float:
    """In a process of its own."""
    words = [sys.executable, __file__, "--memory-of", variant, "--models", model_name, "--weights", weights]
    words += ["--target-rows", str(target_rows), "--device", str(device)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def print_peak(variant: str, model_name: str, weights: str, target_rows: int, device: torch.device) -> None:
    run = build(variant, model_name, weights, target_rows, device)
    run()
    run()
    print(peak_mib(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8m", "35m"])
    parser.add_argument("--weights", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "top-k"], metavar="NAME[@CANDIDATES]")
    parser.add_argument("--target-rows", type=int, nargs="+", default=[CANDIDATES // 2, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for variant in arguments.methods:
        online(variant, KEEP, OVERSAMPLE)  # refuses what does not go together
    device = torch.device(arguments.device)
    if arguments.memory_of:
        (model, weights, rows) = (arguments.models[0], arguments.weights[0], arguments.target_rows[0])
        print_peak(arguments.memory_of, model, weights, rows, device)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    fields = ["model", "weights", "target_rows", "variant", "ratio_median", "ratio_min", "ratio_max", "limit"]
    fields += ["seconds_median", "peak_mb", "peak_ratio", "repeats", "device", "threads", "torch", "transformers"]
    done: set[tuple[str, ...]] = set()
    if arguments.out.is_file():
        with arguments.out.open(newline="") as file:
            done = {tuple(line[name] for name in KEY) for line in csv.DictReader(file)}
    is_new = not arguments.out.is_file()
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if is_new:
            writer.writeheader()
        for model in arguments.models:
            for weights in arguments.weights:
                for target_rows in arguments.target_rows:
                    case = (model, weights, str(target_rows), device_name(device))
                    left = [variant for variant in arguments.methods if (*case, variant) not in done]
                    for line in measure(left, model, weights, target_rows, arguments, device) if left else ():
                        if (*case, str(line["variant"])) in done:  # the plain step is measured with every lot
                            continue
                        writer.writerow(line)
                        file.flush()
                        shown = {name: line[name] for name in fields[:10]}
                        print(" ".join(f"{value}" for value in shown.values()), flush=True)


def measure(
    methods: list[str], model: str, weights: str, target_rows: int, arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, object]]:
    """One line per variant, the plain step first."""
    variants = ["plain", *methods]
    runs = {variant: build(variant, model, weights, target_rows, device) for variant in variants}
    for variant, run in runs.items():
        for _ in range(together(variant)):  # a whole window, so that timing begins with one
            run()
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(arguments.repeats):
        for variant in variants if repeat % 2 == 0 else variants[::-1]:
            times = together(variant)
            seconds[variant].append(sum(timed(runs[variant], device) for _ in range(times)) / times)
    del runs
    lines, plain_peak = [], 0.0
    for variant in variants:
        ratios = [own / plain for own, plain in zip(seconds[variant], seconds["plain"], strict=True)]
        peak = 0.0 if arguments.no_memory else peak_mb(variant, model, weights, target_rows, device)
        plain_peak = peak if variant == "plain" else plain_peak
        lines.append(
            {
                "model": model,
                "weights": weights,
                "target_rows": target_rows,
                "variant": variant,
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "limit": LIMITS.get(variant.partition(":")[0].partition("@")[0], ""),
                "seconds_median": round(statistics.median(seconds[variant]), 3),
                "peak_mb": round(peak),
                "peak_ratio": round(peak / plain_peak, 3) if plain_peak else "",
                "repeats": arguments.repeats,
                "device": device_name(device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    return lines


if __name__ == "__main__":
    main()
