"""Tiny real causal language models, built from configs with fixed seeds, and batches for them; all made here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tamis.types import Batch

VOCAB = 64
FAMILIES = ("llama", "qwen2", "gemma3", "gpt2")  # what every engine test runs over
DECODERS = (*FAMILIES, "qwen3", "mistral")
_LORA_TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gemma3": ["q_proj", "o_proj", "gate_proj"],
    "qwen3": ["q_proj", "up_proj"],
    "mistral": ["k_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


def tiny_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float64,
    tied: bool = False,
    lora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    blocks: int = 2,
) -> nn.Module:
    """A randomly initialised model of ``family``, in evaluation mode, all weights (or the adapter's) trainable.

    Biases, norms and the adapter's ``B`` get random values too, so that no gradient is zero by construction.
    """
    torch.manual_seed(seed)
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "attention_dropout": dropout,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model: nn.Module
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shared))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared))
    elif family == "gemma3":
        sizes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 5.0}
        layer_types = [("sliding_attention", "full_attention")[block % 2] for block in range(blocks)]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shared, **sizes, layer_types=layer_types))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=8))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**shared, sliding_window=4))
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=16,
                n_layer=blocks,
                n_head=4,
                n_positions=64,
                tie_word_embeddings=tied,
                attn_pdrop=dropout,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shared))
    else:
        raise ValueError(family)
    if lora:
        config = LoraConfig(
            r=3,
            lora_alpha=6,
            lora_dropout=dropout,
            target_modules=_LORA_TARGETS[family],
            fan_in_fan_out=family == "gpt2",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model.to(dtype).eval()


def random_batch(
    lengths: Sequence[int],
    *,
    seed: int = 0,
    pad_to: int | None = None,
    supervised_share: float = 0.6,
    vocab: int = VOCAB,
) -> Batch:
    """Right-padded random rows; each has a random supervised mask with at least one label."""
    generator = torch.Generator().manual_seed(seed)
    width = max(max(lengths), pad_to or 0)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    supervised = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, vocab, (length,), generator=generator)
        mask[row, :length] = 1
        supervised[row, :length] = torch.rand(length, generator=generator) < supervised_share
        supervised[row, length - 1] = True
    return Batch(rows=torch.arange(len(lengths)), input_ids=ids, attention_mask=mask, supervised=supervised)


def one_row(batch: Batch, row: int) -> Batch:
    """A row alone, without its padding."""
    length = int(batch.attention_mask[row].sum())
    return Batch(
        rows=batch.rows[row : row + 1],
        input_ids=batch.input_ids[row : row + 1, :length],
        attention_mask=batch.attention_mask[row : row + 1, :length],
        supervised=batch.supervised[row : row + 1, :length],
    )


def permuted(batch: Batch, order: Sequence[int]) -> Batch:
    """The rows of ``order``, possibly repeated."""
    index = torch.tensor(order)
    return Batch(
        rows=batch.rows[index],
        input_ids=batch.input_ids[index],
        attention_mask=batch.attention_mask[index],
        supervised=batch.supervised[index],
    )


def padded_by(batch: Batch, extra: int) -> Batch:
    """The same rows with ``extra`` more columns of padding."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, (0, extra))

    return Batch(
        rows=batch.rows,
        input_ids=pad(batch.input_ids),
        attention_mask=pad(batch.attention_mask),
        supervised=pad(batch.supervised),
    )
