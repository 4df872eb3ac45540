"""Answers begin where the last prompt ends and end where the rows' do; losses that are no numbers are refused.

Most answers come from a model in which every token has one successor, so that what it writes is known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fake_task import random_tokens
from tamis.comparison.measure import answer_of, held_out_losses, last_answer, written_answers
from tamis.errors import NonFinite
from tamis.types import TokenizedExample
from tiny_models import tiny_model
from tiny_run import byte_tokenizer

END, OPEN = "<|im_end|>", "<|im_start|>"


def base_tokenizer() -> PreTrainedTokenizerFast:
    """As base models have it: texts end by another token than turns do."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def chain_model(tokenizer: PreTrainedTokenizerFast, successors: Mapping[str, str]) -> LlamaForCausalLM:
    """A Llama that writes ``successors[x]`` after ``x``, whatever stood before; after all others, "~"."""
    size = len(tokenizer) + len(tokenizer) % 2
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    following = torch.full((size,), one_id(tokenizer, "~"))
    for text, after in successors.items():
        following[one_id(tokenizer, text)] = one_id(tokenizer, after)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[following, torch.arange(size)] = 1.0
    return model


def one_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return int(token)


def row(tokenizer: PreTrainedTokenizerFast, *parts: tuple[str, bool]) -> TokenizedExample:
    """Texts, each with whether the loss covers it."""
    tokens = [(token, covered) for text, covered in parts for token in tokenizer.encode(text, add_special_tokens=False)]
    return TokenizedExample(
        input_ids=np.array([token for token, _ in tokens], dtype=np.int32),
        supervised=np.array([covered for _, covered in tokens], dtype=bool),
        truncated=0,
    )


def corpus_of(rows: Sequence[TokenizedExample]) -> Any:
    return SimpleNamespace(
        take=lambda places: [rows[int(place)] for place in places],
        lengths=np.array([len(one.input_ids) for one in rows]),
        examples=SimpleNamespace(ids=[f"row {place}" for place in range(len(rows))]),
    )


def written(model: Any, tokenizer: Any, rows: Sequence[TokenizedExample], **more: Any) -> list[str]:
    values: dict[str, Any] = {"max_tokens": 6, **more}
    return written_answers(model, tokenizer, corpus_of(rows), np.arange(len(rows)), **values)


ENDLESS = {"?": "4", "4": "2", "2": END, END: "x", "x": "y", "y": "x"}


@pytest.mark.parametrize("closing", [(END, True), (END, False), (f"{END}\n", False)])
def test_an_answer_ends_where_the_rows_own_does_though_the_tokenizer_ends_texts_otherwise(
    closing: tuple[str, bool],
) -> None:
    tokenizer = base_tokenizer()
    model = chain_model(tokenizer, ENDLESS)
    assert written(model, tokenizer, [row(tokenizer, ("1+1?", False), ("7", True), closing)]) == ["42"]
    unclosed = row(tokenizer, ("1+1?", False), ("7", True))
    assert written(model, tokenizer, [unclosed]) == ["42xyx"], "nothing says where this answer ends"


def test_special_tokens_behind_the_one_that_closes_an_answer_end_nothing() -> None:
    tokenizer = base_tokenizer()
    model = chain_model(tokenizer, {"?": "4", "4": OPEN, OPEN: "2", "2": END, END: "x"})
    for is_covered in (True, False):
        asked = row(tokenizer, ("1+1?", False), ("7", True), (END, is_covered), (OPEN, False))
        assert written(model, tokenizer, [asked]) == ["42"]
    asked = row(tokenizer, (f"{OPEN}1+1?", False), ("7", True), ("a", False), (OPEN, False))
    assert written(model, tokenizer, [asked]) == ["42x~"], "a special token elsewhere in the row closes nothing"


def test_answers_end_at_the_tokens_of_the_tokenizer_and_of_the_generation_settings() -> None:
    tokenizer = byte_tokenizer()  # ends texts by END
    open_row = row(tokenizer, ("1+1?", False), ("7", True))
    assert written(chain_model(tokenizer, ENDLESS), tokenizer, [open_row]) == ["42"]
    for named in ("!", ["#", "!"]):
        model = chain_model(tokenizer, {"?": "4", "4": "2", "2": "!", "!": "x"})
        ids = [one_id(tokenizer, text) for text in named]
        model.generation_config.eos_token_id = ids[0] if isinstance(named, str) else ids
        assert written(model, tokenizer, [open_row]) == ["42!"]


def test_the_model_answers_the_last_prompt_of_a_chat() -> None:
    tokenizer = byte_tokenizer()
    model = chain_model(tokenizer, {**ENDLESS, ":": "9", "9": END})
    chat = row(tokenizer, ("1+1?", False), (f"5{END}", True), ("And:", False), (f"8{END}", True))
    assert written(model, tokenizer, [chat]) == ["9"]
    assert last_answer(tokenizer, chat) == "8"


@pytest.mark.parametrize("most", [1, 4, 5])
def test_no_more_tokens_are_written_than_allowed(most: int) -> None:
    tokenizer = byte_tokenizer()
    model = chain_model(tokenizer, {"?": "x", "x": "y", "y": "x"})
    asked = row(tokenizer, ("1+1?", False), ("7", True))
    assert written(model, tokenizer, [asked], max_tokens=most) == ["xyxyx"[:most]]


def test_rows_of_unequal_prompts_are_answered_together_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    model: Any = tiny_model("llama")
    model.generation_config.eos_token_id = None
    rows = [
        TokenizedExample(input_ids=one.input_ids, supervised=np.arange(len(one.input_ids)) > 1 + place, truncated=0)
        for place, one in enumerate(random_tokens([14] * 9, seed=2))
    ]
    together = written(model, tokenizer, rows, max_tokens=10)
    for size in (1, 2):
        monkeypatch.setattr("tamis.comparison.measure._BATCH_ROWS", size)
        assert written(model, tokenizer, rows, max_tokens=10) == together
    assert len(set(together)) > 4, "answers that hardly differ would show nothing"


def test_the_last_match_counts_and_case_and_white_space_do_not() -> None:
    assert answer_of("#### 4, no: #### 5", r"#### (\d+)") == "5"
    assert answer_of("4 and 5", r"\d") == "5"
    assert answer_of("It is  PARIS\n", None) == answer_of("it is paris", None) == "it is paris"
    assert answer_of("STRASSE", None) == answer_of("straße", None)
    assert answer_of("none here", r"\d") == ""
    assert answer_of("x", r"x(\d)?") == "", "a group that took no part"


def test_held_out_losses_are_cross_entropies_of_each_row_alone() -> None:
    model, rows = tiny_model("llama"), random_tokens([9, 4, 12, 7], seed=3)
    found = held_out_losses(model, corpus_of(rows), np.array([2, 0, 3]), batch_tokens=24)
    for value, place in zip(found, (2, 0, 3), strict=True):
        ids = torch.from_numpy(rows[place].input_ids.astype(np.int64))
        marks = torch.from_numpy(rows[place].supervised)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        assert value == pytest.approx(float(torch.nn.functional.cross_entropy(logits[marks], ids[1:][marks])), rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_no_number_is_refused_with_the_rows_id(bad: float) -> None:
    model: Any = tiny_model("llama")
    rows = random_tokens([9, 4, 12, 7], seed=3)
    rows = [
        TokenizedExample(input_ids=np.minimum(one.input_ids, 50), supervised=one.supervised, truncated=0)
        for one in rows
    ]
    rows[2].input_ids[0] = 60
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = bad
    with pytest.raises(NonFinite, match=r"held-out row 'row 2' \(1 in all\)") as caught:
        held_out_losses(model, corpus_of(rows), np.array([3, 2, 0]), batch_tokens=None)
    assert caught.value.rows == (2,)
