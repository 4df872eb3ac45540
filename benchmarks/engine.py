"""Time and memory of the gradient engine against a plain forward+backward of the same batch, all weights trainable.

    python benchmarks/engine.py                 # 8M, 35M and 135M on this machine's best device
    python benchmarks/engine.py --models 8m --repeats 3

Variants are interleaved within each repeat and only ratios to the plain pass of the same repeat are reported (median,
with the smallest and largest). Peak memory is measured in a process of its own per variant. All of it goes to a CSV
file. Every variant, the plain pass too, has its CPU tensors on huge pages, as a process of the command line has;
``--small-pages`` measures without.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

if "--small-pages" not in sys.argv:
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # read by PyTorch when it first allocates

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tamis.gradients.per_sample import Alignments, FactorizedFeatures, mean_gradient, run_batch
from tamis.model.targets import gradient_layers
from tamis.projection.factorized import FactorizedProjector
from tamis.types import Batch

SHAPES = {
    "8m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "vocab_size": 8192},
    "35m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 16384},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
}
HEADS = {"8m": (8, 4), "35m": (8, 4), "135m": (9, 3)}
LIMITS = {"plain": 1.0, "factorized": 0.75, "exact dot": 1.05, "exact cosine": 1.05, "lora cosine": 1.02}
ROWS, TOKENS = 8, 256


def build_model(name: str, device: torch.device, *, lora: bool) -> nn.Module:
    torch.manual_seed(0)
    heads, kv_heads = HEADS[name]
    config = LlamaConfig(
        **SHAPES[name], num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True
    )
    model: nn.Module = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for param_name, param in model.named_parameters():
                if "lora_B" in param_name:
                    param.normal_(std=0.02)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device=device, dtype=dtype).eval()


def build_batch(name: str, device: torch.device, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPES[name]["vocab_size"], (ROWS, TOKENS), generator=generator)
    ones = torch.ones_like(ids)
    return Batch(rows=torch.arange(ROWS), input_ids=ids, attention_mask=ones, supervised=ones.bool()).to(device)


def build_variant(variant: str, name: str, device: torch.device) -> Callable[[Batch], object]:
    """A function of a batch. Everything that is done once per run (directions, projections) is done here."""
    model = build_model(name, device, lora=variant.startswith("lora"))
    if variant == "plain":

        def plain(batch: Batch) -> object:
            model.zero_grad(set_to_none=True)
            output = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.input_ids,
                use_cache=False,
            )
            output.loss.backward()
            return output.loss.detach()

        return plain
    layers = gradient_layers(model)
    if variant == "factorized":
        projector = FactorizedProjector(dim=16, seed=0)

        def factorized(batch: Batch) -> object:
            consumer = FactorizedFeatures(projector, layers)
            run_batch(model, batch, layers, consumer)
            return consumer.features

        return factorized
    directions = mean_gradient(model, [build_batch(name, device, seed=1)], layers, unit=False)
    norms = variant.endswith("cosine")

    def exact(batch: Batch) -> object:
        consumer = Alignments(directions, norms=norms)
        run_batch(model, batch, layers, consumer)
        return (consumer.dot, consumer.norm) if norms else consumer.dot

    return exact


def timed(run: Callable[[Batch], object], batch: Batch) -> float:
    gc.collect()
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(batch)
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_time(name: str, device: torch.device, variants: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds per variant and repeat; within a repeat every variant runs once, in turn."""
    batch = build_batch(name, device, seed=0)
    runs = {variant: build_variant(variant, name, device) for variant in variants}
    for run in runs.values():
        timed(run, batch)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(repeats):
        order = variants if repeat % 2 == 0 else variants[::-1]
        for variant in order:
            seconds[variant].append(timed(runs[variant], batch))
    return seconds


def measure_memory(name: str, variant: str, device: torch.device) -> float:
    """Peak MB of this process (of the GPU where there is one) over two passes."""
    batch = build_batch(name, device, seed=0)
    run = build_variant(variant, name, device)
    for _ in range(2):
        run(batch)
    return peak_mib(device)


def peak_mib(device: torch.device) -> float:
    """Of this process, or of the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if platform.system() == "Linux":  # ru_maxrss would include what the parent process held when it started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.csv")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    parser.add_argument("--small-pages", action="store_true", help="no huge pages for CPU tensors")
    parser.add_argument("--peak-of", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak_of:
        print(json.dumps(measure_memory(options.peak_of[0], options.peak_of[1], device)))
        return
    variants = ["plain", *(v for v in options.variants if v != "plain")]
    rows = []
    for name in options.models:
        seconds = measure_time(name, device, variants, options.repeats)
        pages = ["--small-pages"] if options.small_pages else []
        peaks = {} if options.no_memory else {v: peak_in_a_process(name, v, options.device, pages) for v in variants}
        for variant in variants:
            ratios = [own / plain for own, plain in zip(seconds[variant], seconds["plain"], strict=True)]
            row = {
                "model": name,
                "variant": variant,
                "ratio_median": f"{statistics.median(ratios):.3f}",
                "ratio_min": f"{min(ratios):.3f}",
                "ratio_max": f"{max(ratios):.3f}",
                "limit": LIMITS[variant],
                "seconds_median": f"{statistics.median(seconds[variant]):.4f}",
                "peak_mb": f"{peaks[variant]:.0f}" if peaks else "",
                "peak_over_plain_mb": f"{peaks[variant] - peaks['plain']:.0f}" if peaks else "",
                "repeats": options.repeats,
                "rows": ROWS,
                "tokens": TOKENS,
                "dtype": "bfloat16" if device.type == "cuda" else "float32",
                "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                "threads": torch.get_num_threads(),
                "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            rows.append(row)
            print(
                f"{name:>5} {variant:<13} ratio {row['ratio_median']} ({row['ratio_min']}-{row['ratio_max']}), limit "
                f"{row['limit']}; {row['seconds_median']} s; peak over plain {row['peak_over_plain_mb'] or '-'} MB",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {options.out}")


def peak_in_a_process(name: str, variant: str, device: str, flags: list[str]) -> float:
    command = [sys.executable, __file__, "--device", device, *flags, "--peak-of", name, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
