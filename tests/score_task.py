"""Real tasks for the tests of gradient scorers: a tiny model folder, rows of text, a store in a temporary folder."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from oracles import loop_gradients
from tamis.collect import Collecting, Task
from tamis.corpus import Corpus, tokenize
from tamis.data.batches import collate
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.model.load import LoadedModel, ModelSettings, load_model
from tamis.progress import NoProgress
from tamis.types import Batch, LayerSpec
from tiny_run import byte_tokenizer


def save_tiny(folder: Path, family: str = "llama", *, hidden: int = 16, seed: int = 0) -> Path:
    """A random two-block model of ``family`` with a byte-level tokenizer, its vectors not at their neutral start."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    model: nn.Module
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shared))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=hidden,
                n_layer=2,
                n_head=4,
                n_positions=256,
                eos_token_id=2,
                bos_token_id=1,
            )
        )
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


POOL = (
    ("one plus two?", "three"),
    ("say something", "the sea is wide and the wind is cold"),
    ("two plus two?", "four"),
    ("a word", "stone"),
    ("tell me more", "no"),
    ("three plus six?", "nine, of course"),
    ("and now", "rain on the roof all night long"),
)
TARGET = (("one plus five?", "six"), ("two plus six?", "eight, of course"), ("sing", "la la la"))


def make_task(
    folder: Path,
    model: Path | str,
    *,
    pool: Sequence[tuple[str, str]] = POOL,
    target: Sequence[tuple[str, str]] = TARGET,
    groups: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    dtype: str = "float32",
    collecting: Collecting | None = None,
    **more: Any,
) -> Task:
    """Prompt/answer pairs as pool and target; ``groups`` says to which target each target row belongs."""
    store = folder / "store"
    renderer = Renderer(byte_tokenizer(), max_length=200)
    corpora = {
        name: _corpus(folder, name, pairs, renderer, store) for name, pairs in (("pool", pool), ("target", target))
    }
    group = np.zeros(len(target), np.int64) if groups is None else np.array(groups, np.int64)
    return Task(
        pool=corpora["pool"],
        target=corpora["target"],
        target_names=tuple(f"target-{g}" for g in range(int(group.max()) + 1)),
        target_rows=np.arange(len(target)),
        target_group=group,
        rows=np.arange(len(pool)) if rows is None else np.array(rows, np.int64),
        model_settings=ModelSettings(name=str(model), dtype=dtype, device="cpu"),
        collecting=collecting or Collecting(batch_tokens=150, shard_rows=3),
        store=store,
        **more,
    )


def _corpus(folder: Path, name: str, pairs: Sequence[tuple[str, str]], renderer: Renderer, store: Path) -> Corpus:
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": f"{name}-{i}", "prompt": prompt, "completion": completion})
        for i, (prompt, completion) in enumerate(pairs)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    examples = read_examples([str(path)])
    return tokenize(name, examples, renderer, root=store, on_bad_row="fail", progress=NoProgress())


def batch_of(corpus: Corpus, rows: Sequence[int]) -> Batch:
    """Rows as one padded batch."""
    chosen = np.array(rows, np.int64)
    return collate(chosen, corpus.take(chosen), 0)


def loop_gradients_of(task: Task, model: nn.Module, layers: Sequence[LayerSpec]) -> tuple[Tensor, Tensor, Tensor]:
    """Pool losses, and pool and target gradients one row at a time with plain autograd, in float64 from there on."""
    losses, pool = loop_gradients(model, batch_of(task.pool, task.rows.tolist()), layers)
    _, target = loop_gradients(model, batch_of(task.target, task.target_rows.tolist()), layers)
    return losses.double(), pool.double(), target.double()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def models_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, how many of the models loaded by tasks are still in memory when the next one is loaded."""
    loaded: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def counting(settings: ModelSettings) -> LoadedModel:
        alive.append(sum(model() is not None for model in loaded))
        found = load_model(settings)
        loaded.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr("tamis.collect.load_model", counting)
    return alive


def file_bytes(folder: Path, *, ending: str = "") -> Mapping[str, bytes]:
    """Every file under ``folder`` by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob(f"*{ending}"))
        if path.is_file() and not path.name.startswith("cost-")
    }
