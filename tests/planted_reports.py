"""Inputs of the report with known numbers: a plain pool, a realistic one, an edge case, a hostile one, a huge one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from tamis.report.content import ReportInputs
from tamis.types import Example

INTEGERS = ("row", "tokens", "supervised_tokens", "truncated", "duplicate_of", "near_duplicate_of")


def chat(index: int, user: str, assistant: str, *, id: str | None = None, source: str = "a") -> Example:
    return Example(
        index=index,
        id=id if id is not None else f"{source}-{index}",
        file=f"pool/{source}.jsonl",
        row=index,
        source=source,
        format="messages",
        messages=({"role": "user", "content": user}, {"role": "assistant", "content": assistant}),
    )


def table(rows: int, **columns: Any) -> pa.Table:
    """A result table of ``rows`` rows; every column has a harmless default."""
    default: dict[str, Any] = {
        "id": [f"row-{index}" for index in range(rows)],
        "file": ["pool.jsonl"] * rows,
        "row": np.arange(rows),
        "source": ["a"] * rows,
        "tokens": np.full(rows, 100),
        "supervised_tokens": np.full(rows, 40),
        "truncated": np.zeros(rows, dtype=np.int64),
        "score": np.linspace(1, 0.1, rows),
        "rank": [None] * rows,
        "selected": np.zeros(rows, dtype=bool),
        "weight": np.ones(rows),
        "loss": np.full(rows, 1.5),
        "duplicate_of": np.full(rows, -1),
        "near_duplicate_of": np.full(rows, -1),
        "flagged": np.zeros(rows, dtype=bool),
        "leaked": np.zeros(rows, dtype=bool),
        "picked_for": [None] * rows,
    }
    assert not set(columns) - set(default) or all(name.startswith("score:") for name in set(columns) - set(default))
    default.update(columns)
    types = {"rank": pa.int64(), "picked_for": pa.string(), "score": pa.float64(), "loss": pa.float64()}
    return pa.table({name: pa.array(values, type=types.get(name)) for name, values in default.items()})


def inputs(rows: pa.Table, **changes: Any) -> ReportInputs:
    """Report inputs around a table: one target of four rows with 40 supervised tokens each, method tracin."""
    given: dict[str, Any] = {
        "table": rows,
        "baselines": {},
        "baseline_scores": {},
        "manifest": {"settings": {"method": "tracin", "budget": "5%", "model": "tiny", "seed": 0}},
        "read_example": lambda index: chat(index, f"question {index}", f"answer {index}"),
        "read_target": lambda index: chat(index, f"target question {index}", f"target answer {index}", source="target"),
        "target_names": ("maths",),
        "target_group": np.zeros(4, dtype=np.int64),
        "target_supervised_tokens": np.full(4, 40),
    }
    given.update(changes)
    return ReportInputs(**given)


def plain(**columns: Any) -> ReportInputs:
    """Twenty rows in two sources, the first four selected, two of each source: nothing to warn of."""
    selected = np.arange(20) < 4
    given: dict[str, Any] = {
        "source": ["a", "b"] * 10,
        "selected": selected,
        "rank": [index + 1 if index < 4 else None for index in range(20)],
        "picked_for": ["maths" if index < 4 else None for index in range(20)],
    }
    given.update(columns)
    return inputs(table(20, **given))


# --- realistic -------------------------------------------------------------------------------------------------------

_SUBJECTS = {
    "gsm8k": (
        "A baker sells {a} loaves in the morning and {b} in the afternoon. How many loaves is that in all?",
        "{a} + {b} = {c}\n#### {c}",
    ),
    "squad": (
        "Passage: The tower was finished in {a} and rebuilt after the fire of {b}.\n\nQuestion: When did it burn?",
        "{b}",
    ),
    "dolly": (
        "Why do cats purr? Give {a} reasons in your own words.",
        "Cats purr when they are content, when they want food, and to calm themselves. " * 3,
    ),
    "code": (
        "Write a function that adds {a} to every number of a list.",
        "def add_all(numbers):\n    return [number + {a} for number in numbers]\n",
    ),
    "alpaca": (
        "Name {a} things to pack for a week in the mountains.",
        "A warm coat, good boots, a map, a lamp and enough water. " * 2,
    ),
    "oasst1": (
        "Can you explain the tides to a child of {a}?",
        "The moon pulls at the sea, a little like a magnet. " * 5,
    ),
    "strategy": (
        "Would a pear sink in water? Think first.",
        "A pear is less dense than water, so it floats. The answer is no.",
    ),
    "multilingual": ("ما هي عاصمة فرنسا؟ ({a})", "عاصمة فرنسا هي باريس."),
}


def realistic(rows: int = 4000, seed: int = 7) -> ReportInputs:
    """Eight sources, two targets by round robin, copies, suspicious answers, a leak, baselines, cost."""
    draw = np.random.default_rng(seed)
    names = list(_SUBJECTS)
    source = draw.choice(len(names), size=rows, p=[0.16, 0.15, 0.17, 0.12, 0.2, 0.06, 0.09, 0.05])
    base = np.array([55, 6, 90, 60, 70, 120, 40, 25])[source]
    supervised = np.maximum(1, (base * draw.lognormal(0, 0.45, rows))).astype(np.int64)
    tokens = supervised + np.maximum(12, 60 * draw.lognormal(0, 0.5, rows)).astype(np.int64)
    affinity = {
        "gsm8k": np.array([0.22, 0.02, 0.01, 0.06, 0.03, 0.0, 0.08, -0.02]),
        "squad": np.array([0.0, 0.2, 0.02, -0.03, 0.0, 0.01, 0.05, 0.06]),
    }
    scores = {name: (shift[source] + draw.normal(0, 0.06, rows)).astype(np.float64) for name, shift in affinity.items()}
    unscored = draw.random(rows) < 0.02
    for values in scores.values():
        values[unscored] = np.nan
    duplicate_of, near = np.full(rows, -1), np.full(rows, -1)
    pairs = draw.choice(rows, size=80, replace=False)
    duplicate_of[np.maximum(pairs[:40:2], pairs[1:40:2])] = np.minimum(pairs[:40:2], pairs[1:40:2])
    near[np.maximum(pairs[40::2], pairs[41::2])] = np.minimum(pairs[40::2], pairs[41::2])
    budget, selected, picked, rank = rows // 20, np.zeros(rows, dtype=bool), [None] * rows, [None] * rows
    orders = {name: iter(np.argsort(-np.nan_to_num(values, nan=-9))) for name, values in scores.items()}
    place = 0
    while place < budget:
        name = ("gsm8k", "squad")[place % 2]
        row = next(row for row in orders[name] if not selected[row] and duplicate_of[row] < 0)
        place += 1
        selected[row], picked[row], rank[row] = True, name, place
    truncated = np.where(draw.random(rows) < 0.01, draw.integers(1, 400, rows), 0)
    flagged = draw.random(rows) < 0.03
    leaked = np.zeros(rows, dtype=bool)
    leaked[np.flatnonzero(selected)[3]] = True
    bm25 = np.nan_to_num(scores["gsm8k"], nan=0) * 0.6 + draw.normal(0, 0.05, rows)
    best = np.fmax(scores["gsm8k"], scores["squad"])
    result = table(
        rows,
        id=[f"{names[code]}-{index}" for index, code in enumerate(source)],
        file=[f"pool/{names[code]}.jsonl" for code in source],
        source=[names[code] for code in source],
        tokens=tokens,
        supervised_tokens=supervised,
        truncated=truncated,
        score=[None if np.isnan(value) else value for value in best],
        rank=rank,
        selected=selected,
        loss=draw.gamma(4, 0.4, rows),
        duplicate_of=duplicate_of,
        near_duplicate_of=near,
        flagged=flagged,
        leaked=leaked,
        picked_for=picked,
        **{
            f"score:{name}": [None if np.isnan(value) else value for value in values] for name, values in scores.items()
        },
    )

    def read(index: int) -> Example:
        ask, answer = _SUBJECTS[names[source[index]]]
        numbers = {"a": index % 87 + 3, "b": index % 41 + 2}
        numbers["c"] = numbers["a"] + numbers["b"]
        return chat(index, ask.format(**numbers), answer.format(**numbers), source=names[source[index]])

    def read_target(index: int) -> Example:
        ask, answer = _SUBJECTS["gsm8k" if index < 8 else "squad"]
        return chat(index, ask.format(a=index + 2, b=5), answer.format(a=index + 2, b=5, c=index + 7), source="target")

    return inputs(
        result,
        baselines={
            **{f"uniform:{i}": np.sort(draw.choice(rows, budget, replace=False)) for i in range(4)},
            "length": np.argsort(-supervised)[:budget],
            "bm25": np.argsort(-bm25)[:budget],
        },
        baseline_scores={"bm25": bm25.astype(np.float32), "length": supervised.astype(np.float32)},
        manifest={
            "settings": {
                "method": "tracin",
                "form": "cosine",
                "aggregate": "round-robin",
                "budget": "5%",
                "seed": 0,
                "model": "SmolLM2-135M-Instruct",
                "pool": ["pool/*.jsonl"],
                "target": ["targets/gsm8k.jsonl", "targets/squad.jsonl"],
                "max_length": 512,
            },
            "versions": {"tamis": "0.1.0", "torch": "2.7.0", "transformers": "4.56.0"},
            "model": {
                "class": "LlamaForCausalLM",
                "params": 134515008,
                "dtype": "bfloat16",
                "device": "cpu",
                "fingerprint": "9f" * 32,
            },
            "data": {
                "pool": [
                    {"file": "pool/gsm8k.jsonl", "rows": 640, "sha256": "ab" * 32},
                    {"file": "pool/squad.jsonl", "rows": 600, "sha256": "cd" * 32},
                ]
            },
            "command": "tamis select --model SmolLM2-135M-Instruct --pool 'pool/*.jsonl' --target targets/gsm8k.jsonl"
            " targets/squad.jsonl --method tracin --budget 5% --out run",
            "cost": {
                "stages": [
                    {"name": "read and tokenize", "seconds": 2.1, "tokens": int(tokens.sum()), "tflops": None},
                    {"name": "baselines", "seconds": 0.8, "tokens": None, "tflops": None},
                    {"name": "pool gradients", "seconds": 412.0, "tokens": int(tokens.sum()), "tflops": 361.2},
                    {"name": "target gradients", "seconds": 3.7, "tokens": 4100, "tflops": 3.3},
                    {"name": "select", "seconds": 0.2, "tokens": None, "tflops": None},
                ],
                "total_seconds": 418.8,
            },
        },
        read_example=read,
        read_target=read_target,
        target_names=("gsm8k", "squad"),
        target_group=np.repeat([0, 1], [8, 32]),
        target_supervised_tokens=np.concatenate([draw.integers(40, 90, 8), draw.integers(2, 6, 32)]),
        notes=(
            "TracIn ran in its cosine form at one checkpoint, the untouched model.",
            "Gradients of all 210 block linears as 16 × 16 factorized sketches.",
        ),
    )


def edge() -> ReportInputs:
    """Three selected rows of thirty, one source, one target, most rows without a score, no baselines, no cost."""
    score: list[float | None] = [None] * 30
    score[4], score[9], score[11], score[20] = 0.5, 0.4, 0.3, -0.2
    rank: list[int | None] = [None] * 30
    rank[4], rank[9], rank[11] = 1, 2, 3
    selected = np.isin(np.arange(30), [4, 9, 11])
    return inputs(table(30, score=score, rank=rank, selected=selected, loss=[None] * 30), manifest={})


# --- hostile ---------------------------------------------------------------------------------------------------------

ATTACKS = (
    "</script><script>alert('owned')</script>",
    "<img src=x onerror=\"window.owned=1;alert('owned')\">",
    "\"'><svg/onload=alert(1)>",
    "<a href=\"javascript:alert('owned')\">click</a>",
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "%{customdata} %{y}<extra>owned</extra>",
    "nul\x00byte \x1b[31mred \x07",
    "invoice\u202egnp.exe \u2066isolate \u200f",
    "lone \ud800 surrogate",
    "]]><style>body{display:none}</style>",
    "https://example.invalid/track.gif",
)


def hostile() -> ReportInputs:
    """Attacks in every string the page shows: ids, sources, files, texts, target names, stages, settings, notes."""
    rows = len(ATTACKS)
    safe = [attack.encode("utf-8", "replace").decode() for attack in ATTACKS]  # Arrow holds valid UTF-8 only

    def read(index: int) -> Example:
        attack = ATTACKS[index % rows]
        example = chat(index, attack * 3, attack + "A" * 100_000, id=attack, source=attack)
        return replace(
            example, messages=(*example.messages, {"role": attack, "content": None, "tool_calls": [{"name": attack}]})
        )

    names = (ATTACKS[0], ATTACKS[3])
    return inputs(
        table(
            rows,
            id=safe,
            file=safe,
            source=safe,
            selected=np.arange(rows) < 6,
            rank=[index + 1 if index < 6 else None for index in range(rows)],
            picked_for=[names[index % 2] if index < 6 else None for index in range(rows)],
            duplicate_of=[-1, 0, *[-1] * (rows - 2)],
            near_duplicate_of=[-1, -1, -1, 2, *[-1] * (rows - 4)],
            flagged=np.arange(rows) < 2,
            leaked=np.arange(rows) < 2,
            **{f"score:{name}": np.linspace(1, 0.1, rows) for name in names},
        ),
        baselines={attack: np.arange(4) for attack in ATTACKS},
        baseline_scores={attack: np.linspace(0, 1, rows).astype(np.float32) for attack in ATTACKS},
        manifest={
            "settings": {"method": ATTACKS[0], "budget": ATTACKS[1], "model": ATTACKS[2], "shortlist": ATTACKS[3]},
            "command": "tamis select " + ATTACKS[0],
            "cost": {"stages": [{"name": attack, "seconds": 1.0} for attack in ATTACKS]},
            **{attack: {attack: attack} for attack in ATTACKS},
        },
        read_example=read,
        read_target=read,
        target_names=names,
        target_group=np.array([0, 0, 1, 1]),
        notes=ATTACKS,
    )


def huge(rows: int = 1_000_000) -> ReportInputs:
    """A million rows in forty sources for four targets."""
    draw = np.random.default_rng(3)
    names = tuple(f"target {index}" for index in range(4))
    scores = {f"score:{name}": draw.normal(size=rows) for name in names}
    best = np.max(list(scores.values()), axis=0)
    chosen = np.argsort(-best)[: rows // 20]
    selected = np.zeros(rows, dtype=bool)
    selected[chosen] = True
    picked = np.full(rows, None, dtype=object)
    picked[chosen] = np.array(names, dtype=object)[draw.integers(0, 4, len(chosen))]
    sources = np.array([f"source {index}" for index in range(40)], dtype=object)[draw.integers(0, 40, rows)]
    supervised = draw.integers(1, 600, rows)
    return inputs(
        table(
            rows,
            source=sources,
            selected=selected,
            picked_for=picked,
            score=best,
            tokens=supervised + 80,
            supervised_tokens=supervised,
            **scores,
        ),
        baselines={"uniform:0": draw.choice(rows, rows // 20, replace=False), "bm25": np.arange(rows // 20)},
        baseline_scores={"bm25": draw.normal(size=rows).astype(np.float32)},
        target_names=names,
        target_group=np.repeat(np.arange(4), 25),
        target_supervised_tokens=draw.integers(10, 300, 100),
    )
