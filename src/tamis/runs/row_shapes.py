"""Whether a trainer takes the selected rows as they are, and the same rows as chats for one that does not.

TRL's ``SFTTrainer`` reads one format per file, told from the first row: ``messages`` (or ``conversations``),
``prompt``/``completion``, or ``text``. It knows no instruction rows, and a column that only some rows fill is null in
the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tamis.report.wording import joined
from tamis.types import Example

__all__ = ["as_messages", "count_shapes", "training_warnings"]

_INSTRUCTION, _BESIDE_PROMPT, _TEXT = "instruction", "messages beside a prompt", "text"

# What TRL's trainer cannot read even if all rows are alike.
_UNREAD = {
    _INSTRUCTION: "its rows have 'instruction' and 'output', which it does not read",
    _BESIDE_PROMPT: "its rows have a 'prompt' beside their messages, for which it expects a 'completion'",
}


def count_shapes(rows: Iterable[int], read: Callable[[int], Example]) -> Counter[str]:
    """How many of ``rows`` come in each shape that a trainer would have to tell apart."""
    return Counter(_shape(read(row)) for row in rows)


def training_warnings(shapes: Counter[str], *, as_chats: bool) -> list[str]:
    """Why TRL's trainer does not take rows of these shapes as they are, and which have no form as a chat.

    Args:
        shapes: of the selected rows.
        as_chats: whether the rows are also written as messages.
    """
    problem = ""
    if len(shapes) > 1:
        held = joined([f"{number} {shape}" for shape, number in shapes.most_common()], 8)
        problem = f"TRL's SFTTrainer expects rows of one format, and selected.jsonl holds several: {held}"
    elif shapes:
        only = next(iter(shapes))
        why = next((why for shape, why in _UNREAD.items() if only.startswith(shape)), None)
        problem = f"TRL's SFTTrainer does not take selected.jsonl as it is: {why}" if why else ""
    texts, others = shapes[_TEXT], shapes.total() - shapes[_TEXT]
    left_out = f"{texts} of {shapes.total()} selected rows are plain text, which has no turns"
    found = []
    if problem and as_chats:
        found.append(f"{problem}; selected-messages.jsonl has the rows as chats.")
    elif problem:
        apart = f", but {left_out}; select from text apart" if texts else ""
        found.append(f"{problem}; --write-messages also writes them as chats{apart}.")
    if as_chats and texts:
        where = "they are missing in selected-messages.jsonl" if others else "no selected-messages.jsonl was written"
        found.append(f"{left_out}: {where}.")
    return found


def as_messages(example: Example) -> dict[str, Any] | None:
    """The row as ``messages`` alone, with its ``tools`` as JSON text and its ``chat_template_kwargs`` where it has any.

    A plain prompt becomes the user's turn and its completion the assistant's; content in text parts becomes one
    string, so that the rows of several files fit into one column. None for a row of plain text, which has no turns.
    """
    if example.text is not None:
        return None
    messages: Sequence[Any] = example.messages
    if example.completion is not None:
        asked = [{"role": "user", "content": example.prompt}] if example.prompt else []
        messages = [*asked, {"role": "assistant", "content": example.completion}]
    row: dict[str, Any] = {"messages": [_plain_message(message) for message in messages]}
    if example.tools:
        row["tools"] = json.dumps(example.tools, ensure_ascii=False)  # schemas of many shapes fit no common column
    if example.template_kwargs:
        row["chat_template_kwargs"] = dict(example.template_kwargs)
    return row


def _plain_message(message: Any) -> dict[str, Any]:
    filled = {key: value for key, value in message.items() if value is not None}
    if not isinstance(filled.get("content", ""), str):
        filled["content"] = "".join(part["text"] for part in filled["content"])
    return filled


def _shape(example: Example) -> str:
    if example.format == "messages":
        shape = "messages" if example.raw.get("messages") is not None else "conversations"
        if example.raw.get("prompt") is not None:
            shape = _BESIDE_PROMPT
    elif example.format == "prompt-completion":
        shape = "prompt and completion" + (" as messages" if example.messages else "")
    else:
        shape = example.format
    if example.template_kwargs:
        shape += " with chat_template_kwargs"
    if any(not isinstance(message.get("content") or "", str) for message in example.messages):
        shape += " with content in parts"
    return shape
