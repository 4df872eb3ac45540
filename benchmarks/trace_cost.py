"""What recording costs a training step, and what each part of an attribution costs per replayed step.

    python benchmarks/trace_cost.py                              # a Llama of 3 million parameters, LoRA, made here
    python benchmarks/trace_cost.py --model SmolLM2-135M --weights lora --steps 12

Recording: two Trainers, with and without the recorder, take turns; processor time of a whole ``train()`` on a CPU,
where other work disturbs it least, and the clock elsewhere. Sweeps: the same recorded run, per step and relative to
one replayed training step (a forward and backward pass through plain attention). All goes to a CSV file.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from tamis import TrajectoryRecorder
from tamis.gradients.functional import weighted_gradient
from tamis.training.lora import add_lora
from tamis.trajectory.causal import RecordedRun
from tamis.trajectory.open_run import open_run
from tamis.trajectory.replay import play
from tamis.trajectory.sweep import SweepSettings, run_sweep

RESULTS = Path(__file__).parent / "results" / "trace-cost.csv"
COLUMNS = ("model", "weights", "trained", "rows", "tokens", "device", "what", "seconds_per_step", "relative_to")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or hub id; a small random Llama when left out")
    parser.add_argument("--weights", choices=["lora", "full"], default="lora")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=None, help="updates between two recorded states")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    clock: Callable[[], float] = time.perf_counter if torch.cuda.is_available() else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        times, model = recording(args, Path(folder), clock)
        run = open_run(Path(folder) / "record-0", model)
        times |= sweeps(run, clock)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    new = not args.out.is_file()
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        name = Path(args.model).name if args.model else "llama-3m"
        for what, (seconds, relative) in times.items():
            line = (
                name,
                args.weights,
                trained,
                args.rows,
                args.tokens,
                device,
                what,
                f"{seconds:.4f}",
                f"{relative:.3f}",
            )
            writer.writerow(line)
            print(f"{what:34} {seconds:8.4f} s  {relative:6.3f}")


def build(args: Any) -> Any:
    torch.manual_seed(0)
    if args.model:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    return add_lora(model, rank=8, alpha=16, seed=0) if args.weights == "lora" else model


def recording(args: Any, folder: Path, clock: Callable[[], float]) -> tuple[dict[str, tuple[float, float]], Any]:
    """Seconds per update, with and without; one pair of a warm-up each before."""
    rows = Dataset.from_list(
        [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 4000, (4 * args.rows, args.tokens)).tolist()]
    )
    plain, recorded, model = list[float](), list[float](), None
    for repeat in range(args.repeats):
        for record in (False, True) if repeat % 2 else (True, False):
            model = build(args)
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=str(folder / "trainer"), max_steps=args.steps, per_device_train_batch_size=args.rows,
                    report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=10_000, learning_rate=1e-4,
                    use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
                ),
                train_dataset=rows,
                callbacks=[TrajectoryRecorder(folder / f"record-{repeat}", every=args.every)] if record else [],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            started = clock()
            trainer.train()
            (recorded if record else plain).append((clock() - started) / args.steps)
    base = statistics.median(plain)
    ratios = [b / a for a, b in zip(plain, recorded, strict=True)]
    return {"train": (base, 1.0), "train, recorded": (statistics.median(recorded), statistics.median(ratios))}, model


def sweeps(run: RecordedRun, clock: Callable[[], float]) -> dict[str, tuple[float, float]]:
    steps = run.num_steps
    target = run.micros_of(run.rows[:8], most=8)
    state = run.state(0)
    weighted_gradient(run.problem, state.theta, run.step(0).micros, run.step(0).weights)  # what is slow the first time
    started = clock()
    for index in range(steps):
        state = play(run.problem, run.rule, state, run.step(index)).after
    replay = (clock() - started) / steps
    found = {"replayed step": (replay, 1.0)}
    for curvature in ("none", "fisher", "ggn", "exact"):
        started = clock()
        run_sweep(run, target, SweepSettings(curvature=curvature))
        seconds = (clock() - started) / steps - replay
        found[f"sweep, {curvature}"] = (seconds, seconds / replay)
    started = clock()
    run_sweep(run, target, SweepSettings(curvature="fisher", error=True))
    seconds = (clock() - started) / steps - replay
    found["sweep, fisher, error proxy"] = (seconds, seconds / replay)
    return found


if __name__ == "__main__":
    main()
