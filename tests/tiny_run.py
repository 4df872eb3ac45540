"""A complete small run: a Llama folder with a byte-level tokenizer, a pool with planted rows, and a target."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class TinyRun:
    """Paths of one small problem, and which pool rows the target asks for."""

    model: Path
    pool: Path
    target: Path
    relevant: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]  # (first, exact copy)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special ones, with a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = CHATML
    return fast


def save_model(folder: Path, *, seed: int = 0, hidden: int = 32) -> Path:
    """A random two-block Llama for the byte tokenizer, as a folder that loads by path."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(user: str, assistant: str, **more: Any) -> dict[str, Any]:
    return {**more, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_run(folder: Path, *, rows: int = 60, seed: int = 0) -> TinyRun:
    """A pool in which every fifth row answers like the target; the last two rows are copies of rows 0 and 1."""
    draw = random.Random(seed)
    words = ["lamp", "river", "stone", "cloud", "bread", "violin", "harbour", "meadow", "copper", "window"]
    pool = []
    for index in range(rows - 2):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        if index % 5 == 0:
            pool.append(
                chat(f"What is {a} plus {b}?", f"{a} + {b} = {a + b}. #### {a + b}", id=f"sum-{index}", source="sums")
            )
        else:
            said = " ".join(draw.choices(words, k=draw.randint(3, 9)))
            pool.append(chat(f"Say something about {draw.choice(words)}.", said, id=f"talk-{index}", source="talk"))
    pool += [{**pool[0], "id": "copy-0"}, {**pool[1], "id": "copy-1"}]
    target = []
    for index in range(4):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        target.append(chat(f"How much is {a} plus {b}?", f"{a} + {b} = {a + b}. #### {a + b}", id=f"target-{index}"))
    folder.mkdir(parents=True, exist_ok=True)
    return TinyRun(
        model=save_model(folder / "model", seed=seed),
        pool=write_rows(folder / "pool.jsonl", pool),
        target=write_rows(folder / "target.jsonl", target),
        relevant=tuple(i for i in range(rows - 2) if i % 5 == 0),
        copies=((0, rows - 2), (1, rows - 1)),
    )
