"""Blocks left out: the right ones, and a model that is like its target where nothing was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, SmolLM3Config

import proxy_case
from tamis.errors import Unsupported
from tamis.proxies.layer_extraction import block_importance, blocks_to_keep, extract_blocks
from tamis.proxies.rows import batches_of
from tiny_models import FAMILIES, random_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_turn_of_the_states_over_real_tokens(family: str) -> None:
    model: Any = proxy_case.model(family, blocks=3)
    rows = proxy_case.rows(6, seed=0)
    found = block_importance(model, batches_of(rows, batch_tokens=40, pad_id=0))
    totals, tokens = [0.0, 0.0], 0
    for row in rows:
        with torch.no_grad():
            ids = torch.from_numpy(row.tokens.input_ids.astype("int64"))[None]
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        for block in range(2):  # the last entry is behind the final norm
            cosines = torch.nn.functional.cosine_similarity(states[block][0], states[block + 1][0], dim=-1)
            totals[block] += float((1 - cosines).sum())
        tokens += ids.shape[1]
    assert found[:2] == pytest.approx([total / tokens for total in totals], rel=1e-4)
    assert len(found) == 3 and found[2] > 0


def test_the_last_block_and_the_most_important_others_are_kept() -> None:
    assert blocks_to_keep([0.1, 0.5, 0.3, 0.9, 0.0], 0.4) == [1, 3, 4]
    assert blocks_to_keep([0.1, 0.5, 0.3], 0.99) == [2]
    assert blocks_to_keep([0.2, 0.2, 0.2, 0.2], 0.5) == [0, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_some_blocks_computes_what_the_others_skipped_would(family: str) -> None:
    """Against a pass of the whole model in which the left-out block gives its input back."""
    model: Any = proxy_case.model(family, blocks=4, dtype=torch.float64)
    shorter: Any = extract_blocks(model, [0, 1, 3] if family != "gemma3" else [0, 1, 2, 3])
    batch = random_batch([9, 6])
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    assert len(blocks) == 4

    def skip(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return args[0] if not isinstance(output, tuple) else (args[0], *output[1:])

    handle = blocks[2].register_forward_hook(skip, with_kwargs=True) if family != "gemma3" else None
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        found = shorter(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert {id(p) for p in shorter.parameters()} <= {id(p) for p in model.parameters()}
    assert model.config.num_hidden_layers == 4 and shorter.config.num_hidden_layers == (3 if family != "gemma3" else 4)


def test_kinds_of_attention_follow_their_blocks() -> None:
    model: Any = proxy_case.model("gemma3", blocks=4)
    shorter: Any = extract_blocks(model, [1, 2, 3])
    kinds = model.config.layer_types
    assert shorter.config.layer_types == [kinds[1], kinds[2], kinds[3]]
    assert [block.self_attn.layer_idx for block in shorter.model.layers] == [0, 1, 2]
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2, 3]


_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    "config",
    [
        SmolLM3Config(**_SMALL, no_rope_layers=[1, 0, 1, 0]),
        Qwen3MoeConfig(**_SMALL, **_EXPERTS, mlp_only_layers=[0, 3]),
    ],
)
def test_what_a_config_says_of_single_blocks_follows_them_to_disk(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shorter: Any = extract_blocks(AutoModelForCausalLM.from_config(config).eval(), [1, 3])
    shorter.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, shorter(input_ids=ids, use_cache=False).logits)


def test_blocks_that_a_config_can_only_count_out_are_refused() -> None:
    config = Qwen3MoeConfig(**_SMALL, **_EXPERTS, decoder_sparse_step=2)  # every second block has experts
    with pytest.raises(Unsupported, match=r"cannot describe these blocks alone \(block '0\.mlp.*another preset"):
        extract_blocks(AutoModelForCausalLM.from_config(config), [1, 3])
