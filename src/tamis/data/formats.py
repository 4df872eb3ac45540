"""What a row means: the format is told from its fields, and its content checked and brought to one form.

Knows one row at a time, no file and no tokenizer. Problems are raised as ``RowError``; the reader, which knows file
and row number, turns them into ``BadRow``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tamis.types import RowFormat

__all__ = ["ROLES", "Content", "RowError", "digest", "parse_row", "prompt_text", "row_format_of", "trained_text"]

ROLES = ("system", "developer", "user", "assistant", "tool")

# What chats in ShareGPT form call the roles.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

# What each format needs, first choice first.
_FIELDS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
_EXPECTED = (
    "expected 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output', or 'text'; "
    "rename the fields"
)


class RowError(Exception):
    """A row cannot be used: which field, and what to do."""

    def __init__(self, field: str | None, problem: str) -> None:
        super().__init__(problem)
        self.field, self.problem = field, problem


@dataclass(frozen=True, kw_only=True)
class Content:
    """The part of a row that is trained on, checked; the fields mean what they mean in ``Example``."""

    format: RowFormat
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt_messages: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: tuple[Any, ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def row_format_of(row: Mapping[str, Any]) -> RowFormat:
    """The format that the fields of ``row`` speak for; null fields (Parquet fills them in) count as absent.

    Several may fit: UltraChat rows carry a ``prompt`` beside ``messages``, Alpaca rows a ``text`` beside
    ``instruction``. The first of messages, prompt-completion, instruction, text wins.

    Raises:
        RowError: none fits.
    """
    present = {key for key, value in row.items() if value is not None}
    if present & {"messages", "conversations"}:
        return "messages"
    if present >= {"prompt", "completion"}:
        return "prompt-completion"
    if present >= {"instruction", "output"}:
        return "instruction"
    if "text" in present:
        return "text"
    for needed in _FIELDS:
        null = [name for name in needed if name in row and row[name] is None]
        if null and row.keys() >= set(needed):
            raise RowError(null[0], "the field is null; fill it or remove the row")
    names = ", ".join(f"'{key}'" for key in list(row)[:12]) or "no field at all"
    raise RowError(None, f"unknown row format with {names}; {_EXPECTED}")


def parse_row(row: Mapping[str, Any], row_format: RowFormat) -> Content:
    """The content of ``row`` read as ``row_format``.

    Raises:
        RowError: a field is missing, of the wrong type, or leaves nothing to train on.
    """
    if row_format == "messages":
        return _parse_chat(row)
    if row_format == "prompt-completion":
        return _parse_prompt_completion(row)
    if row_format == "instruction":
        return _parse_instruction(row)
    return Content(format="text", text=_filled_string(row, "text"))


def _parse_chat(row: Mapping[str, Any]) -> Content:
    if row.get("messages") is None and row.get("conversations") is not None:
        messages = _from_sharegpt(row["conversations"])
    else:
        messages = _messages(row, "messages")
    _check_answers(messages, "messages" if row.get("messages") is not None else "conversations", first=0)
    return Content(format="messages", messages=messages, tools=_tools(row), template_kwargs=_template_kwargs(row))


def _parse_prompt_completion(row: Mapping[str, Any]) -> Content:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) or isinstance(completion, str):
        return Content(
            format="prompt-completion", prompt=_string(row, "prompt"), completion=_filled_string(row, "completion")
        )
    before, after = _messages(row, "prompt"), _messages(row, "completion")
    _check_answers(after, "completion", first=0)
    return Content(
        format="prompt-completion",
        messages=before + after,
        prompt_messages=len(before),
        tools=_tools(row),
        template_kwargs=_template_kwargs(row),
    )


def _parse_instruction(row: Mapping[str, Any]) -> Content:
    """Alpaca rows become a chat of one turn; a non-empty ``input`` follows the instruction after a blank line."""
    instruction, output = _filled_string(row, "instruction"), _filled_string(row, "output")
    given = "" if row.get("input") is None else _string(row, "input")
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    if row.get("system") is not None and _string(row, "system").strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Content(format="instruction", messages=tuple(messages), template_kwargs=_template_kwargs(row))


def _messages(row: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    value = row.get(name)
    if isinstance(value, str):
        raise RowError(name, "expected a list of messages, got a string; write the list itself, not its JSON text")
    if not isinstance(value, Sequence):
        problem = f"expected a list of messages, got {_kind(value)}" if name in row else "the field is missing; add it"
        raise RowError(name, problem)
    if not value:
        raise RowError(name, "the list of messages is empty; give at least a user and an assistant message")
    for position, message in enumerate(value):
        _check_message(message, f"{name}[{position}]")
    return tuple(value)


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, Mapping):
        raise RowError(name, f"expected an object with 'role' and 'content', got {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError(f"{name}.role", f"unknown role {_shown(role)}; expected one of {', '.join(ROLES)}")
    if role == "assistant" and message.get("tool_calls"):
        _check_tool_calls(message["tool_calls"], f"{name}.tool_calls")
        if content is None:
            return
    if content is None:
        if role == "assistant":
            raise RowError(
                f"{name}.content", "the assistant turn is null and has no tool_calls; fill it or remove the row"
            )
        raise RowError(f"{name}.content", f"expected a string, got null; fill the {role} message or remove it")
    if isinstance(content, str):
        return
    if not isinstance(content, Sequence):
        raise RowError(f"{name}.content", f"expected a string or a list of text parts, got {_kind(content)}")
    for position, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            shown = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise RowError(
                f"{name}.content[{position}]",
                f"expected a part of type 'text' with a string, got {_shown(shown)}; only text can be rendered",
            )


def _check_tool_calls(calls: Any, name: str) -> None:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RowError(name, f"expected a list of calls, got {_kind(calls)}")
    for position, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{name}[{position}]", "expected an object with function.name; write the call in full")


def _check_answers(messages: Sequence[Mapping[str, Any]], name: str, *, first: int) -> None:
    """At least one assistant turn, and none without content."""
    answers = 0
    for position, message in enumerate(messages[first:], first):
        if message["role"] != "assistant":
            continue
        answers += 1
        if not message.get("tool_calls") and not _content_text(message).strip():
            raise RowError(
                f"{name}[{position}].content",
                "the assistant turn is empty and has no tool_calls; fill it or remove the row",
            )
    if not answers:
        raise RowError(name, "no assistant turn, so there is nothing to train on; add one or remove the row")


def _from_sharegpt(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError("conversations", f"expected a filled list of turns, got {_kind(value)}")
    messages = []
    for position, turn in enumerate(value):
        name = f"conversations[{position}]"
        if not isinstance(turn, Mapping):
            raise RowError(name, f"expected an object with 'from' and 'value', got {_kind(turn)}")
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise RowError(
                f"{name}.from", f"unknown role {_shown(turn.get('from'))}; expected one of {', '.join(_SHAREGPT_ROLES)}"
            )
        if not isinstance(turn.get("value"), str):
            raise RowError(f"{name}.value", f"expected a string, got {_kind(turn.get('value'))}")
        messages.append({"role": role, "content": turn["value"]})
    return tuple(messages)


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """``tools`` as a list of schemas; a string is read as JSON, since many files keep them so."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("tools", f"expected a list of tool schemas or its JSON text ({error})") from error
    if value is None or (isinstance(value, str | Sequence) and not value):
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("tools", f"expected a list of tool schemas (objects), got {_kind(value)}")
    return tuple(value)


def _template_kwargs(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """``chat_template_kwargs``: variables for the chat template, as TRL reads them from a row."""
    value = row.get("chat_template_kwargs")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError("chat_template_kwargs", f"expected an object, got {_kind(value)}")
    return {key: item for key, item in value.items() if item is not None}


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(
            name, f"expected a string, got {_kind(value)}" if name in row else "the field is missing; add it"
        )
    return value


def _filled_string(row: Mapping[str, Any], name: str) -> str:
    value = _string(row, name)
    if not value.strip():
        raise RowError(name, "the text is empty; fill it or remove the row")
    return value


def _kind(value: Any) -> str:
    """The type of ``value`` in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, Sequence) else type(value).__name__


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."


def digest(content: Content) -> str:
    """SHA-256 (hex) of the canonical JSON of what is trained on: equal digests are exact duplicates.

    Ids, sources and further fields do not enter, nor does the format's name: an instruction row equals the chat it
    becomes. Null fields of a message count as absent.

    Raises:
        RowError: a text holds half of a surrogate pair, which no tokenizer can encode.
    """
    parts = {
        "messages": [{k: v for k, v in message.items() if v is not None} for message in content.messages],
        "prompt_messages": content.prompt_messages,
        "prompt": content.prompt,
        "completion": content.completion,
        "text": content.text,
        "tools": content.tools,
        "template_kwargs": content.template_kwargs,
    }
    filled = {key: value for key, value in parts.items() if value}
    if content.prompt is not None:
        filled["prompt"] = content.prompt  # an empty prompt is still a prompt
    text = json.dumps(filled, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    try:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise RowError(
            None, f"text holds half of a surrogate pair ({text[error.start]!r}), which is no character; repair the text"
        ) from error


def _content_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content) if content else ""


def trained_text(content: Content) -> str:
    """The words of a row, prompt and answer, one turn per line: what near duplicates are told by."""
    if content.text is not None:
        return content.text
    if content.completion is not None:
        return f"{content.prompt}\n{content.completion}"
    calls = [json.dumps(m["tool_calls"], default=str) if m.get("tool_calls") else "" for m in content.messages]
    return "\n".join(_content_text(m) + call for m, call in zip(content.messages, calls, strict=True))


def prompt_text(content: Content) -> str:
    """What the user asked before the last answer, in lower case with single spaces; empty if the row has no prompt.

    System messages do not enter: the same question under another system message is the same question.
    """
    if content.text is not None:
        return ""
    if content.prompt is not None:
        asked = content.prompt
    else:
        last = max(i for i, message in enumerate(content.messages) if message["role"] == "assistant")
        asked = "\n".join(_content_text(m) for m in content.messages[:last] if m["role"] == "user")
    return " ".join(asked.split()).lower()
