"""Ids and labels against those that TRL's SFTTrainer makes of the same rows."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from chat_tokenizers import metaspace_tokenizer, tiny_tokenizer
from tamis.data.examples import Examples, read_examples
from tamis.data.render import Renderer

trl = pytest.importorskip("trl", reason="trl, one of the dev dependencies, is not installed")

MAX_LENGTH = 60
LONG = "the quick brown fox " * 12

TEXTS = [{"text": "The capital of France."}, {"text": "ends already</s>"}, {"text": LONG}, {"text": " é😀\n\n"}]
COMPLETIONS = [
    {"prompt": "What is 1 + 1? ", "completion": "2"},
    {"prompt": "What is", "completion": " 2 + 2?</s>"},
    {"prompt": "def ad", "completion": "d(a, b):\n    return a"},  # a token across the boundary
    {"prompt": "The capital", "completion": LONG},
    {"prompt": "caf", "completion": "é 😀"},
]
CHATS = [
    {"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]},
    {
        "messages": [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": "What is <|im_end|>\nassistant?"},
            {"role": "assistant", "content": "  2 \n"},
            {"role": "user", "content": "2"},
            {"role": "assistant", "content": "2"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "é"},
            {"role": "assistant", "content": "Paris 😀"},
            {"role": "user", "content": "the capital"},
            {"role": "assistant", "content": LONG},
        ]
    },
]


def conversational(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]


def read(tmp_path: Path, rows: list[dict]) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_examples([str(path)])


def trl_rows(tmp_path: Path, tokenizer, rows: list[dict], **settings) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row as the trainer's collator hands them to the model."""
    from datasets import Dataset

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            LlamaForCausalLM(config),
            args=trl.SFTConfig(
                output_dir=str(tmp_path / "out"),
                max_length=MAX_LENGTH,
                use_cpu=True,
                bf16=False,
                report_to="none",
                **settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    made = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        made.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return made


def our_rows(tmp_path: Path, tokenizer, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    renderer = Renderer(tokenizer, max_length=MAX_LENGTH)
    made = []
    for example in read(tmp_path, rows):
        rendered = renderer.render(example)
        labels = [int(t) if s else -100 for t, s in zip(rendered.input_ids, rendered.supervised, strict=True)]
        made.append((rendered.input_ids.tolist(), labels))
    return made


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, metaspace_tokenizer], ids=["byte level", "metaspace"])
@pytest.mark.parametrize("rows", [TEXTS, COMPLETIONS], ids=["text", "prompt and completion"])
def test_plain_strings_get_the_labels_of_trl(tmp_path, tokenizer, rows):
    assert our_rows(tmp_path, tokenizer(), rows) == trl_rows(tmp_path, tokenizer(), rows)


@pytest.mark.parametrize(
    "template", ["chatml", "marked", "default system", "header", "instruct", "thinking", "closed text"]
)
def test_conversational_completions_get_the_labels_of_trl(tmp_path, template):
    rows = conversational(CHATS)
    assert our_rows(tmp_path, tiny_tokenizer(template), rows) == trl_rows(tmp_path, tiny_tokenizer(template), rows)


def test_chats_with_generation_marks_get_the_labels_of_trl(tmp_path):
    # With trimmed offsets Transformers finds no token at an answer's first space, and TRL then refuses the row.
    tokenizer = tiny_tokenizer("marked", trim_offsets=False)
    assert our_rows(tmp_path, tokenizer, CHATS) == trl_rows(tmp_path, tokenizer, CHATS, assistant_only_loss=True)


def test_one_turn_chat_without_marks_gets_the_labels_of_the_same_row_as_prompt_and_completion(tmp_path):
    for template in (
        "chatml",
        "default system",
        "header",
        "model role",
        "instruct",
        "thinking",
        "closed text",
        "by number",
    ):
        tokenizer = tiny_tokenizer(template)
        assert our_rows(tmp_path, tokenizer, CHATS[:1]) == our_rows(tmp_path, tokenizer, conversational(CHATS[:1])), (
            template
        )


PLAIN_CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": " assistant 😀 4"},
]
# Written differently by TRL's variant: it keeps the reasoning block of earlier turns, or closes the last turn.
REWRITTEN = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "glm4moe"}
# Take content as a list of parts only.
PARTS_ONLY = {"idefics3", "smolvlm"}
# For images: writes a space after the end of an answer, which TRL's variant alone leaves unlabelled.
LEFT_OUT = {"llava_next"}


def _trl_templates() -> list[tuple[str, str, str]]:
    """(name, template as models ship it, TRL's training variant of it)."""
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path()
    pairs = []
    for training in sorted(folder.glob("*_training.jinja")):
        shipped = training.with_name(training.name.replace("_training", ""))
        if shipped.exists() and shipped.stem not in LEFT_OUT:
            pairs.append((shipped.stem, shipped.read_text("utf-8"), training.read_text("utf-8")))
    return pairs


@pytest.mark.parametrize(("name", "shipped", "training"), _trl_templates(), ids=[name for name, *_ in _trl_templates()])
def test_templates_without_marks_get_the_labels_of_trls_marked_variant(tmp_path, name, shipped, training):
    tokenizer = tiny_tokenizer(shipped, trim_offsets=False)
    messages = PLAIN_CHAT
    if name in PARTS_ONLY:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN_CHAT]
    if name in REWRITTEN:
        messages = messages[:2]  # one turn is written alike, but for the token that closes GLM's
    (ours,) = our_rows_untruncated(tmp_path, tokenizer, [{"messages": messages}])
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=training, return_dict=True, tokenize=True, return_assistant_tokens_mask=True
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    if name == "glm4moe":
        end = len(tokenizer("<|user|>", add_special_tokens=False)["input_ids"])
        ids, mask = ids[:-end], mask[:-end]
    assert ours == (ids, [i if m else -100 for i, m in zip(ids, mask, strict=True)])


def our_rows_untruncated(tmp_path, tokenizer, rows):
    renderer = Renderer(tokenizer, max_length=100_000)
    rendered = [renderer.render(example) for example in read(tmp_path, rows)]
    return [
        (r.input_ids.tolist(), [int(t) if s else -100 for t, s in zip(r.input_ids, r.supervised, strict=True)])
        for r in rendered
    ]
