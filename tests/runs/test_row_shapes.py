"""What TRL's trainer takes as it is, what it does not, and the chats that it takes instead."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import LlamaConfig, LlamaForCausalLM

import tamis
from tamis.data.examples import read_examples
from tamis.runs.row_shapes import as_messages, count_shapes, training_warnings
from tiny_run import byte_tokenizer, chat, save_model, write_rows

Rows = Sequence[dict[str, Any]]

TURNS = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
CHATS = [chat(f"What is {i} plus 1?", f"It is {i + 1}.") for i in range(4)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": f"{i}"}]} for i in range(4)
]
INSTRUCTIONS = [{"instruction": f"Add 1 to {i}.", "input": "", "output": f"{i + 1}"} for i in range(4)]
COMPLETIONS = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(4)]
CHAT_COMPLETIONS = [{"prompt": TURNS[:1], "completion": [{"role": "assistant", "content": f"{i}"}]} for i in range(4)]
TEXTS = [{"text": f"The number after {i} is {i + 1}."} for i in range(4)]
BESIDE_PROMPT = [{**row, "prompt": "What?"} for row in CHATS]
WITH_KWARGS = [{**CHATS[0], "chat_template_kwargs": {"enable_thinking": False}}]
IN_PARTS = [chat("Say 9.", [{"type": "text", "text": "9"}])]  # type: ignore[arg-type]


def read(folder: Path, files: Sequence[Rows]) -> tuple[list[str], Any]:
    paths = [str(write_rows(folder / f"part-{index}.jsonl", rows)) for index, rows in enumerate(files)]
    return paths, read_examples(paths)


def train_rows(file: Path, cache: Path) -> int:
    """Rows that TRL's trainer has made ready for training from ``file``."""
    trl = pytest.importorskip("trl", reason="trl, one of the dev dependencies, is not installed")
    tokenizer = byte_tokenizer()
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
        loaded = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        trainer = trl.SFTTrainer(
            LlamaForCausalLM(config),
            args=trl.SFTConfig(output_dir=str(cache / "out"), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=loaded,
            processing_class=tokenizer,
        )
    assert all(len(row["input_ids"]) > 1 for row in trainer.train_dataset)
    return len(trainer.train_dataset)


@pytest.mark.parametrize(
    ("files", "is_taken"),
    [
        ([CHATS], True),
        ([SHAREGPT], True),
        ([COMPLETIONS], True),
        ([CHAT_COMPLETIONS], True),
        ([TEXTS], True),
        ([INSTRUCTIONS], False),
        ([BESIDE_PROMPT], False),
        ([TEXTS, CHATS], False),
        ([CHATS, COMPLETIONS], False),
        ([CHATS, WITH_KWARGS], False),
        ([CHATS, IN_PARTS], False),
    ],
)
def test_a_warning_is_given_exactly_where_trl_refuses_the_rows(
    tmp_path: Path, files: Sequence[Rows], is_taken: bool
) -> None:
    _, examples = read(tmp_path, files)
    warned = training_warnings(count_shapes(range(len(examples)), examples.__getitem__), as_chats=False)
    assert bool(warned) is not is_taken
    # As selected.jsonl has them: the rows' own text.
    together = tmp_path / "selected.jsonl"
    together.write_text("".join(examples.raw_json(row).rstrip() + "\n" for row in range(len(examples))))
    if is_taken:
        assert train_rows(together, tmp_path / "cache") == len(examples)
    else:
        with pytest.raises(Exception):  # noqa: B017  # KeyError, ValueError, TypeError, as it happens
            train_rows(together, tmp_path / "cache")


def test_rows_of_every_format_but_text_become_chats_that_trl_takes(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with_tools = [{**CHATS[1], "tools": [tool]}]
    files = [CHATS, SHAREGPT, INSTRUCTIONS, COMPLETIONS, CHAT_COMPLETIONS, WITH_KWARGS, IN_PARTS, with_tools]
    paths, _ = read(tmp_path, files)
    selection = tamis.select(
        model=save_model(tmp_path / "model"),
        pool=paths,
        target=str(write_rows(tmp_path / "target.jsonl", [chat("What is 5 plus 1?", "It is 6.")])),
        method="length",
        budget="100%",
        duplicates="keep",
        out=tmp_path / "out",
        write_messages=True,
    )
    written = [json.loads(line) for line in (tmp_path / "out" / "selected-messages.jsonl").read_text().splitlines()]
    own = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert [row["_tamis"] for row in written] == [row["_tamis"] for row in own]
    assert train_rows(tmp_path / "out" / "selected-messages.jsonl", tmp_path / "cache") == len(selection) == 23
    assert any("selected-messages.jsonl has the rows as chats" in warning for warning in selection.warnings)
    assert "selected-messages.jsonl" in selection.manifest["files"]
    assert selection.summary()["selected_messages"] == str(tmp_path / "out" / "selected-messages.jsonl")


def test_each_format_as_a_chat_by_hand(tmp_path: Path) -> None:
    _, examples = read(tmp_path, [INSTRUCTIONS[:1], COMPLETIONS[:1], SHAREGPT[:1], IN_PARTS, TEXTS[:1]])
    assert [as_messages(example) for example in examples] == [
        {"messages": [{"role": "user", "content": "Add 1 to 0."}, {"role": "assistant", "content": "1"}]},
        {"messages": [{"role": "user", "content": "0 + 1 = "}, {"role": "assistant", "content": "1"}]},
        {"messages": [{"role": "user", "content": "Say 0."}, {"role": "assistant", "content": "0"}]},
        {"messages": [{"role": "user", "content": "Say 9."}, {"role": "assistant", "content": "9"}]},
        None,
    ]


def test_rows_of_plain_text_are_said_to_have_no_chat(tmp_path: Path) -> None:
    _, examples = read(tmp_path, [CHATS, TEXTS[:1]])
    mixed = count_shapes(range(5), examples.__getitem__)
    (without,) = training_warnings(mixed, as_chats=False)
    assert "holds several: 4 messages and 1 text;" in without and "--write-messages" in without
    assert "1 of 5 selected rows are plain text" in without
    _, missing = training_warnings(mixed, as_chats=True)
    assert missing == (
        "1 of 5 selected rows are plain text, which has no turns: they are missing in selected-messages.jsonl."
    )
    (none,) = training_warnings(count_shapes([4], examples.__getitem__), as_chats=True)
    assert none.endswith("no selected-messages.jsonl was written.")
