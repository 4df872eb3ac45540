"""One online step of tamis (``tracin``) beside the same step of dattri-llm (``DataSelectionCallback``).

    python benchmarks/peer_step.py --python PEERS/bin/python                        # 8M: LoRA, own head, tied head
    python benchmarks/peer_step.py --python PEERS/bin/python --models tiny --repeats 1    # to see it run

dattri-llm runs in an environment of its own (see ``peers-requirements.txt``). Both load the same random Llama-shaped
model, take the same 32 candidates and target rows, keep the 8 candidates with the largest inner product of their
gradient and that of the mean target loss, and step AdamW by the mean gradient of those. A row's loss is its mean token
loss; all rows have 128 tokens. ``peers/run_*_step.py`` say how each is set up, and what dattri-llm has that does not
fit this step.

Weights: ``lora`` (rank 8 on every linear layer, the rest frozen), ``full`` (all weights, a head of its own) and
``tied`` (all weights, the head is the table of embeddings). dattri-llm scores a tied table as two tables and leaves out
the products between them, so that its choice by ``tied`` is made by another rule; what it leaves for the optimizer is
exact all the same.

Checked on the first step, before any update, against autograd, row by row, in float64: the scores, the kept rows, and
the gradient left for the optimizer, which should be that of the mean loss of the rows that this very tool kept. Timed:
processor seconds of whole steps, every tool and variant in turn, in changing order; in each tool's first process a
step is followed by plain training on all candidates. Ratios are within a repeat: median, smallest, largest. Peak memory
is that of a process which has made updates of one kind only.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Both get it: PyTorch reads it when it first allocates, and tamis's command line sets it.
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import engine
from peers import Tool, start
from tamis.maths.ranks import rank_correlation

RESULTS = Path(__file__).parent / "results" / "peer-step.csv"
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256},
    **engine.SHAPES,
}
HEADS = {"tiny": (4, 2), **engine.HEADS}
KEEP, CANDIDATES, TOKENS, ROWS_A_PASS = 8, 32, 128, 8
FIRST = {"tamis": "micro-batches", "dattri": "ghost"}  # variant in whose process plain training is timed
VARIANTS = (*FIRST.items(), ("tamis", "one-pass"), ("dattri", "materialized"), ("dattri", "mean-target"))
SPREADS = ("over_tamis", "over_plain")  # each with its smallest and largest
FIELDS = (
    *("model", "weights", "target_rows", "tool", "variant"),
    *(name + end for name in SPREADS for end in ("", "_min", "_max")),
    *("cpu_s", "plain_cpu_s", "peak_mb", "plain_peak_mb"),
    *("score_error", "spearman", "kept_as_exact", "score_difference", "kept_as_tamis", "gradient_error", "error"),
    *("candidates", "keep", "tokens", "plain_rows_a_pass", "repeats", "threads", "versions"),
)


def build_model(shape: str, weights: str) -> nn.Module:
    """Random weights of the engine benchmark's shapes; the adapter's second factors are random, too."""
    torch.manual_seed(0)
    heads, kv_heads = HEADS[shape]
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=weights != "full",
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    if weights == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "lora_B" in name:
                    param.normal_(std=0.02)
    return model


def random_rows(shape: str, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPES[shape]["vocab_size"], (rows, TOKENS), generator=generator)


def prepare(shape: str, weights: str, target_rows: int, folder: Path) -> tuple[Path, nn.Module]:
    """Write what every process gets; also the model, in float64, to check them by."""
    model: Any = build_model(shape, weights)
    given: dict[str, Any] = {"model": str(folder / "model"), "adapter": "", "keep": KEEP}
    if weights == "lora":
        given["adapter"] = str(folder / "adapter")
        model.save_pretrained(given["adapter"])
        base: Any = LlamaForCausalLM(model.config).eval()
        base.load_state_dict({_base_name(name): value for name, value in model.state_dict().items() if _is_base(name)})
        base.save_pretrained(given["model"])
    else:
        model.save_pretrained(given["model"])
    candidates, target = random_rows(shape, CANDIDATES, seed=0), random_rows(shape, target_rows, seed=1)
    given |= {"candidates": candidates.tolist(), "target": target.tolist(), "rows_a_pass": ROWS_A_PASS}
    path = folder / "given.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    return path, model.double()


def _is_base(name: str) -> bool:
    return "lora_" not in name


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def exact_scores(model: nn.Module, candidates: Tensor, target: Tensor) -> list[float]:
    """``<grad l_i, grad of the mean target loss>`` over the trainable weights, by one backward pass per row."""
    goal = mean_gradient(model, target)
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        sum(
            float((grad * along).sum())
            for grad, along in zip(_gradient(model, row, params), goal.values(), strict=True)
        )
        for row in candidates
    ]


def mean_gradient(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """The gradient of the rows' mean loss, by the names of the trainable weights."""
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    total = {name: torch.zeros_like(param) for name, param in named.items()}
    for row in rows:
        for name, grad in zip(named, _gradient(model, row, list(named.values())), strict=True):
            total[name] += grad / len(rows)
    return total


def gradient_error(left: Path, exact: dict[str, Tensor]) -> float:
    """Norm of what the gradient in the file ``left`` is off, over the norm of the exact one."""
    found = np.load(left)
    if set(found.files) != set(exact):
        raise SystemExit(f"gradients of other weights than are trained: {sorted(set(found.files) ^ set(exact))[:5]}")
    apart = sum(float(((torch.from_numpy(found[name]) - grad) ** 2).sum()) for name, grad in exact.items())
    return math.sqrt(apart / sum(float((grad**2).sum()) for grad in exact.values()))


def _gradient(model: nn.Module, row: Tensor, params: list[nn.Parameter]) -> tuple[Tensor, ...]:
    logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    return torch.autograd.grad(nn.functional.cross_entropy(logits, row[1:]), params)


def measure(
    shape: str, weights: str, target_rows: int, arguments: argparse.Namespace, log: Path
) -> list[dict[str, Any]]:
    """One line per tool and variant."""
    pythons = {"tamis": sys.executable, "dattri": arguments.python}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given, model = prepare(shape, weights, target_rows, folder)
        candidates, target = random_rows(shape, CANDIDATES, seed=0), random_rows(shape, target_rows, seed=1)
        exact = exact_scores(model, candidates, target)

        def begin(tool: str, variant: str) -> Tool:
            return start(f"{tool}_step", variant, pythons[tool], given, threads=arguments.threads, log=log)

        plain_peak = {}
        for tool, variant in FIRST.items():
            running = begin(tool, variant)
            plain_peak[tool] = [running.ask({"do": "plain"}) for _ in range(2)][-1].get("peak_mb", 0.0)
            running.close()
        tools, found = [], []
        for at, (tool, variant) in enumerate(VARIANTS):
            running = begin(tool, variant)
            checked = running.ask({"do": "check", "gradients": str(folder / f"{at}.npz")})
            if not running.error:
                # A second step before the memory is read, and plain training only after that.
                checked["peak_mb"] = running.ask({"do": "step"}).get("peak_mb", 0.0)
                if (tool, variant) in FIRST.items():
                    running.ask({"do": "plain"})
            tools.append(running)
            found.append(checked)
        if tools[0].error:
            raise SystemExit(f"tamis failed: {tools[0].error}")
        steps, plains = _timed(tools, arguments.repeats)
        for running in tools:
            running.close()
        lines = []
        own, left = found[0], dict[tuple[int, ...], dict[str, Tensor]]()
        for at, ((tool, variant), running) in enumerate(zip(VARIANTS, tools, strict=True)):
            line: dict[str, Any] = {"model": shape, "weights": weights, "target_rows": target_rows}
            line |= {"tool": tool, "variant": variant, "error": running.error}
            line |= {"candidates": CANDIDATES, "keep": KEEP, "tokens": TOKENS, "plain_rows_a_pass": ROWS_A_PASS}
            line |= {"repeats": arguments.repeats, "threads": arguments.threads}
            line["versions"] = " ".join(f"{package}=={version}" for package, version in running.versions.items())
            if not running.error:
                line |= _spread("over_tamis", steps[at], steps[0]) | _spread("over_plain", steps[at], plains[tool])
                if arguments.repeats:
                    line["cpu_s"] = f"{statistics.median(steps[at]):.4g}"
                    line["plain_cpu_s"] = f"{statistics.median(plains[tool]):.4g}"
                line |= {"peak_mb": f"{found[at]['peak_mb']:.0f}", "plain_peak_mb": f"{plain_peak[tool]:.0f}"}
                line |= _agreement(found[at], own, exact)
                kept = tuple(found[at]["kept"])
                if kept not in left:
                    left[kept] = mean_gradient(model, candidates[list(kept)])
                line["gradient_error"] = f"{gradient_error(folder / f'{at}.npz', left[kept]):.1e}"
            lines.append(line)
        return lines


def _timed(tools: Sequence[Tool], repeats: int) -> tuple[list[list[float]], dict[str, list[float]]]:
    """Processor seconds of every repeat: of steps, in the order of ``VARIANTS``, and of plain updates by tool."""
    steps: list[list[float]] = [[] for _ in tools]
    plains: dict[str, list[float]] = {tool: [] for tool in FIRST}
    for repeat in range(repeats):
        order = [at for at in range(len(tools)) if not tools[at].error]
        for at in order if repeat % 2 == 0 else order[::-1]:
            tool, variant = VARIANTS[at]
            steps[at].append(tools[at].ask({"do": "step"})["cpu_s"])
            if FIRST[tool] == variant:
                plains[tool].append(tools[at].ask({"do": "plain"})["cpu_s"])
        shown = ", ".join(f"{' '.join(VARIANTS[at])} {steps[at][-1]:.2f} s" for at in order)
        plain = ", ".join(f"{tool} {seconds[-1]:.2f} s" for tool, seconds in plains.items() if seconds)
        print(f"repeat {repeat + 1}: {shown}; plain {plain}", file=sys.stderr, flush=True)
    return steps, plains


def _spread(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, str]:
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    if not ratios:
        return {}
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return {name: f"{middle:.3f}", f"{name}_min": f"{low:.3f}", f"{name}_max": f"{high:.3f}"}


def _agreement(found: dict[str, Any], own: dict[str, Any], exact: Sequence[float]) -> dict[str, str]:
    """Scores and kept rows beside the definition's and beside tamis's; differences relative to the largest score."""
    scores, ours, true = (np.array(each) for each in (found["scores"], own["scores"], exact))
    best = np.argsort(-true)[:KEEP].tolist()
    return {
        "score_error": f"{np.abs(scores - true).max() / np.abs(true).max():.1e}",
        "spearman": f"{rank_correlation(scores, true):.4f}",
        "kept_as_exact": str(len(set(best) & set(found["kept"]))),
        "score_difference": f"{np.abs(scores - ours).max() / np.abs(ours).max():.1e}",
        "kept_as_tamis": str(len(set(own["kept"]) & set(found["kept"]))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has dattri-llm")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8m"])
    parser.add_argument("--weights", nargs="+", choices=("lora", "full", "tied"), default=["lora", "full", "tied"])
    parser.add_argument("--target-rows", type=int, nargs="+", default=[16, 2])
    parser.add_argument("--repeats", type=int, default=5, help="0: see whether they agree, and time nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--append", action="store_true", help="add to the file instead of replacing it")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--log", type=Path, help="what the tools print")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    is_new = not (arguments.append and arguments.csv.exists())
    with arguments.csv.open("w" if is_new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        for shape in arguments.models:
            for weights in arguments.weights:
                for target_rows in arguments.target_rows:
                    log = arguments.log or Path(os.devnull)
                    for line in measure(shape, weights, target_rows, arguments, log):
                        writer.writerow(line)
                        file.flush()
                        print(_sentence(line), flush=True)
    print(f"written to {arguments.csv}")


def _sentence(line: dict[str, Any]) -> str:
    head = f"{line['model']} {line['weights']}, {line['target_rows']} target rows, {line['tool']} {line['variant']}:"
    if line["error"]:
        return f"{head} {line['error']}"
    time = ""
    if "over_tamis" in line:
        time = (
            f"{line['over_tamis']}x tamis ({line['over_tamis_min']}-{line['over_tamis_max']}), {line['over_plain']}x "
            f"plain ({line['over_plain_min']}-{line['over_plain_max']}), {line['cpu_s']} s; "
        )
    return (
        f"{head} {time}peak {line['peak_mb']} MB (plain {line['plain_peak_mb']}); scores off by {line['score_error']}, "
        f"Spearman {line['spearman']}, kept {line['kept_as_exact']} as exact, {line['kept_as_tamis']} as tamis; "
        f"gradient off by {line['gradient_error']}"
    )


if __name__ == "__main__":
    main()
