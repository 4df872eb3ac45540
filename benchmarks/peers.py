"""End to end on real chats: rows per second and scores of tamis beside bergson, dattri-llm and kronfluence.

    python benchmarks/peers.py --model DIR --pool pool.jsonl --target target.jsonl \
        --python bergson=/venvs/bergson/bin/python --python dattri=... --python kronfluence=...

A random sample of the pool is rendered once; every tool gets the same token ids, the same labels (response loss: the
mean cross-entropy over a row's assistant tokens), float32 and as many threads. Each runs in a process of its own, in
the environment given for it (``peers-requirements.txt`` says what to install), in the best configuration we found for
it: the head of each ``peers/run_*.py`` says which. A tool without ``--python`` is left out.

Three tasks, all over the gradients of every linear layer in the model's blocks:

* ``exact-cosine``: the mean over target rows of the cosine of pool and target gradient, unprojected.
* ``exact-dot``: inner product of a pool row's gradient and the mean target gradient, unprojected.
* ``projected-cosine``: the same of gradients projected to 16 x 16 a layer, every tool with its own projection; what
  ``tamis select`` does by default.

Timed is what comes after imports and model loading, the pass over the pool apart from the pass over the target. In a
repeat tamis and another tool run in turn, in changing order, and ratios are within a repeat. Processor seconds stand
beside wall seconds: on a machine that others use, they are the steadier ones. In the CSV file, ``speedup`` is how many
times as many pool rows tamis scores a second, ``speedup_cpu`` the same by processor time, ``..._with_target`` counts
the target side, too; differences are between scores, relative to the largest (``largest``) or row by row; of projected
scores they say how far two random projections are apart, and ``spearman_exact`` how well each ranks. Last comes
``tamis.select`` from the files to the report, model loading included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from scipy.stats import spearmanr

from tamis.corpora import Corpora, read_corpora, read_sources
from tamis.corpus import Corpus
from tamis.progress import NoProgress
from tamis.settings import SelectSettings

RUNNERS = Path(__file__).parent / "peers"
TASKS: dict[str, tuple[tuple[str, str], ...]] = {  # task -> (tool, variant), tamis first
    "exact-cosine": (("tamis", "exact-cosine"), ("bergson", "exact-cosine"), ("dattri", "exact-cosine")),
    "exact-dot": (
        ("tamis", "exact-dot"),
        ("bergson", "exact-dot"),
        ("bergson", "exact-dot-jvp"),
        ("dattri", "exact-dot"),
        ("kronfluence", "exact-dot"),
    ),
    "projected-cosine": (
        ("tamis", "projected-cosine"),
        ("bergson", "projected-cosine"),
        ("dattri", "projected-cosine"),
    ),
}
MEASURED = ("rows_per_s", "cpu_s_per_row", "speedup", "speedup_cpu", "speedup_cpu_with_target")  # each with its spread
FIELDS = (
    *("task", "tool", "variant"),
    *(name + end for name in MEASURED for end in ("", "_min", "_max")),
    *("peak_mb", "spearman", "spearman_exact", "largest_difference", "rowwise_difference", "error"),
    *("rows", "tokens", "supervised_tokens", "target_rows", "max_length", "batch_tokens", "batch_rows"),
    *("repeats", "threads", "versions"),
)


@dataclass
class Tool:
    """A running tool, and what it answered in each repeat."""

    name: str
    variant: str
    process: subprocess.Popen[str]
    replies: TextIO  # a pipe of its own: libraries print to stdout
    answers: list[dict[str, Any]] = field(default_factory=list)
    beside: list[dict[str, Any]] = field(default_factory=list)  # what tamis answered in the same repeats
    versions: dict[str, str] = field(default_factory=dict)
    error: str = ""

    def ask(self, request: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a request (None: only wait for what it says after loading) and return the answer."""
        assert self.process.stdin
        if request is not None:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.replies.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended without an answer"}
        self.error = answer.get("error", "")
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.replies.close()


def start(name: str, variant: str, python: str, given: Path, *, threads: int, log: Path) -> Tool:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    here, there = os.pipe()
    command = [python, str(RUNNERS / f"run_{name}.py"), variant, str(given), str(there)]
    with log.open("a", encoding="utf-8") as printed:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            text=True,
            env=environment,
            pass_fds=[there],
        )
    os.close(there)
    tool = Tool(name=name, variant=variant, process=process, replies=os.fdopen(here, encoding="utf-8"))
    tool.versions = tool.ask(None).get("versions", {})
    return tool


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, int]]:
    """Sample the files, render the sample, and write down what every runner gets; also how much it is."""
    pool = _sampled(arguments, arguments.pool, arguments.rows, folder / "pool.jsonl")
    target = _sampled(arguments, arguments.target, arguments.target_rows, folder / "target.jsonl")
    corpora = _read(arguments, pool, target, folder / "tokens")
    given = folder / "given.json"
    described = {
        "model": arguments.model,
        "pool_file": str(pool),
        "target_file": str(target),
        "max_length": arguments.max_length,
        "batch_tokens": arguments.batch_tokens,
        "batch_rows": arguments.batch_rows,
        "folder": str(folder),
        "pool": _labelled(corpora.pool),
        "target": _labelled(corpora.target),
    }
    given.write_text(json.dumps(described), encoding="utf-8")
    counts = {
        "rows": len(corpora.pool),
        "tokens": int(corpora.pool.lengths.sum()),
        "supervised_tokens": int(corpora.pool.supervised.sum()),
        "target_rows": len(corpora.target),
    }
    return given, counts


def _read(arguments: argparse.Namespace, pool: Path, target: Path, store: Path) -> Corpora:
    settings = SelectSettings(
        model=arguments.model,
        pool=(str(pool),),
        target=(str(target),),
        max_length=arguments.max_length,
        on_bad_row="skip",
    )
    return read_corpora(read_sources(settings), settings, store=store, progress=NoProgress())


def _sampled(arguments: argparse.Namespace, source: Path, rows: int, path: Path) -> Path:
    """``rows`` random rows that keep a supervised token within the length limit."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    drawn = random.Random(arguments.seed).sample(lines, min(2 * rows, len(lines)))  # some will be cut too short
    candidates = path.with_name(f"candidates-{path.name}")
    candidates.write_text("".join(drawn), encoding="utf-8")
    usable = _read(arguments, candidates, candidates, path.with_suffix(".tokens")).pool.usable
    kept = [drawn[i] for i in np.flatnonzero(usable)[:rows]]
    if len(kept) < rows:
        raise SystemExit(f"{source} has only {len(kept)} rows that fit; lower the number or raise --max-length")
    path.write_text("".join(kept), encoding="utf-8")
    return path


def _labelled(corpus: Corpus) -> dict[str, list[list[int]]]:
    """Token ids and labels; the first token has nothing before it, so it never is a label."""
    ids, labels = [], []
    for example in corpus:
        supervised = example.supervised.copy()
        supervised[0] = False
        ids.append(example.input_ids.tolist())
        labels.append(np.where(supervised, example.input_ids, -100).tolist())
    return {"input_ids": ids, "labels": labels}


def run_task(
    task: str, arguments: argparse.Namespace, pythons: Mapping[str, str], given: Path, counts: Mapping[str, int]
) -> list[Tool]:
    """tamis, and every other tool timed in turn with it: two loaded models at a time are what a small machine holds."""
    log = arguments.log or given.parent / "log.txt"
    everything = {"pool": counts["rows"], "target": counts["target_rows"]}
    few = {"pool": min(3, counts["rows"]), "target": min(2, counts["target_rows"])}

    def begin(name: str, variant: str) -> Tool:
        tool = start(name, variant, pythons[name], given, threads=arguments.threads, log=log)
        if not tool.error:
            tool.ask(few)  # warm-up, not timed
        return tool

    own, *others = [(name, variant) for name, variant in TASKS[task] if name in pythons]
    tamis = begin(*own)
    tools = [tamis]
    for name, variant in others:
        tool = begin(name, variant)
        for repeat in range(arguments.repeats):
            if tool.error:
                break
            pair = (tamis, tool) if repeat % 2 == 0 else (tool, tamis)
            answers = {each.name: each.ask(everything) for each in pair}
            seconds = ", ".join(f"{side} {found.get('pool_s', 0):.1f} s" for side, found in answers.items())
            print(f"{task}, repeat {repeat + 1}: {seconds}", file=sys.stderr, flush=True)
            if tamis.error:
                raise SystemExit(f"tamis failed: {tamis.error}")
            if not tool.error:
                tool.answers.append(answers[name])
                tool.beside.append(answers["tamis"])
                tamis.answers.append(answers["tamis"])
        tool.close()
        tools.append(tool)
    if not tamis.answers:
        tamis.answers.append(tamis.ask(everything))
    tamis.close()
    return tools


def table(
    task: str,
    tools: Sequence[Tool],
    counts: Mapping[str, int],
    fixed: Mapping[str, Any],
    exact: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """One line per tool and variant. ``exact`` are the exact cosines, against which projected ones are ranked."""
    rows = counts["rows"]
    lines = []
    for tool in tools:
        line: dict[str, Any] = {"task": task, "tool": tool.name, "variant": tool.variant, "error": tool.error}
        line |= {**counts, **fixed, "versions": " ".join(f"{k}=={v}" for k, v in tool.versions.items())}
        if tool.answers:
            line |= _spread("rows_per_s", [rows / a["pool_s"] for a in tool.answers])
            line |= _spread("cpu_s_per_row", [a["pool_cpu_s"] / rows for a in tool.answers])
            if exact and task == "projected-cosine":
                line["spearman_exact"] = f"{spearmanr(tool.answers[0]['scores'], exact).statistic:.3f}"
            line["peak_mb"] = f"{max(a['peak_mb'] for a in tool.answers):.0f}"
        if tool.beside:
            pairs = list(zip(tool.answers, tool.beside, strict=True))
            line |= _spread("speedup", [a["pool_s"] / b["pool_s"] for a, b in pairs])
            line |= _spread("speedup_cpu", [a["pool_cpu_s"] / b["pool_cpu_s"] for a, b in pairs])
            line |= _spread(
                "speedup_cpu_with_target",
                [(a["pool_cpu_s"] + a["target_cpu_s"]) / (b["pool_cpu_s"] + b["target_cpu_s"]) for a, b in pairs],
            )
            line |= _agreement(tool.answers[0]["scores"], tool.beside[0]["scores"])
        lines.append(line)
    return lines


def _spread(name: str, values: Sequence[float]) -> dict[str, str]:
    middle, low, high = statistics.median(values), min(values), max(values)
    return {name: f"{middle:.4g}", f"{name}_min": f"{low:.4g}", f"{name}_max": f"{high:.4g}"}


def _agreement(scores: Sequence[float], own: Sequence[float]) -> dict[str, str]:
    theirs, ours = np.array(scores), np.array(own)
    difference = np.abs(theirs - ours)
    return {
        "spearman": f"{spearmanr(theirs, ours).statistic:.6f}",
        "largest_difference": f"{difference.max() / np.abs(ours).max():.2e}",
        "rowwise_difference": f"{(difference / np.abs(ours)).max():.2e}",
    }


def whole_run(arguments: argparse.Namespace, python: str, given: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    """``tamis.select`` from the files to the report, once: imports and warm-up aside, everything is in it."""
    log = arguments.log or given.parent / "log.txt"
    tool = start("tamis", "whole", python, given, threads=arguments.threads, log=log)
    answer = tool.ask({"pool": 0, "target": 0})
    tool.close()
    if tool.error:
        raise SystemExit(f"tamis.select failed: {tool.error}")
    return {
        "task": "whole run",
        "tool": "tamis",
        "variant": "select --method tracin",
        "rows_per_s": f"{counts['rows'] / answer['pool_s']:.4g}",
        "cpu_s_per_row": f"{answer['pool_cpu_s'] / counts['rows']:.4g}",
        "peak_mb": f"{answer['peak_mb']:.0f}",
        "versions": " ".join(f"{k}=={v}" for k, v in tool.versions.items()),
        **counts,
        "max_length": arguments.max_length,
        "batch_tokens": arguments.batch_tokens,
        "repeats": 1,
        "threads": arguments.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local folder")
    parser.add_argument("--pool", type=Path, required=True, help="JSONL")
    parser.add_argument("--target", type=Path, required=True, help="JSONL")
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH", help="a tool's environment")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--target-rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, help="padded tokens a batch, where a tool counts them"
    )
    parser.add_argument("--batch-rows", type=int, default=8, help="rows a batch, where it counts rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--no-whole-run", action="store_true", help="skip tamis.select from the files to the report")
    parser.add_argument("--csv", type=Path, default=RUNNERS.parent / "results" / "peers.csv")
    parser.add_argument("--log", type=Path, help="what the tools print")
    arguments = parser.parse_args()
    pythons = {"tamis": sys.executable} | dict(text.split("=", 1) for text in arguments.python)
    known = sorted({name for tools in TASKS.values() for name, _ in tools})
    if unknown := sorted(set(pythons) - set(known)):
        parser.error(f"--python {unknown[0]}=...: expected one of {', '.join(known)}")

    lines: list[dict[str, Any]] = []
    exact: list[float] | None = None
    with tempfile.TemporaryDirectory() as folder:
        given, counts = prepare(arguments, Path(folder))
        print(", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()), flush=True)
        fixed = {
            name: getattr(arguments, name)
            for name in ("max_length", "batch_tokens", "batch_rows", "repeats", "threads")
        }
        for task in arguments.tasks:
            tools = run_task(task, arguments, pythons, given, counts)
            if task == "exact-cosine":
                exact = tools[0].answers[0]["scores"]
            found = table(task, tools, counts, fixed, exact)
            lines += found
            for line in found:
                print(_sentence(line), flush=True)
        if not arguments.no_whole_run:
            lines.append(whole_run(arguments, pythons["tamis"], given, counts))
            print(_sentence(lines[-1]), flush=True)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    print(f"written to {arguments.csv}")


def _sentence(line: Mapping[str, Any]) -> str:
    head = f"{line['task']:>16} {line['tool']:>11} {line['variant']:<16}"
    if line.get("error"):
        return f"{head} {line['error']}"
    text = f"{head} {line['rows_per_s']} rows/s, {line['cpu_s_per_row']} CPU s/row, peak {line['peak_mb']} MB"
    if line["tool"] == "tamis":
        return text
    return (
        f"{text}; tamis is {line['speedup']}x ({line['speedup_min']}-{line['speedup_max']}), in CPU time "
        f"{line['speedup_cpu']}x ({line['speedup_cpu_min']}-{line['speedup_cpu_max']}); Spearman {line['spearman']}, "
        f"differences {line['largest_difference']} largest, {line['rowwise_difference']} row by row"
    )


if __name__ == "__main__":
    main()
