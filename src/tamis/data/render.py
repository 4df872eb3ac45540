"""Chat template -> token ids and label mask: which tokens of a row carry loss.

Ids are those of ``tokenizer.apply_chat_template``. Labels are those that TRL's ``SFTTrainer`` trains on: the
assistant's tokens of a chat (``assistant_only_loss``), everything after the prompt of a prompt/completion row, all of
a text row. Where a template has no ``{% generation %}`` marks they come from what the template itself wrote for each
message (``turns.py``), never from looking for the content in the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tamis.data.template import MarkedText, Span
from tamis.data.turns import TEMPLATE_ERRORS, TurnError, TurnFinder, check_answer, common_prefix, drops_text
from tamis.errors import BadRow, InvalidSettings, Unsupported, first_line
from tamis.identity import text_sha256
from tamis.types import Example, TokenizedExample

__all__ = ["ALGORITHM", "Renderer"]

ALGORITHM = "render-v2"

# For a tokenizer without a template. {END} is <|im_end|> where the vocabulary has it, else the end-of-sequence token,
# so that the end of a turn is one token, which the model can learn to emit.
_DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n<tool_call>\\n' + (call | tojson) + '\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '{END}\\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '{END}\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class _Encoded:
    """A rendered row before truncation."""

    text: str
    ids: list[int]  # (T,)
    offsets: npt.NDArray[np.int64]  # (T, 2) characters of ``text``
    supervised: npt.NDArray[np.bool_]  # (T,)
    dropped: bool = False  # a part of an assistant turn is not in ``text``


class Renderer:
    """Renders rows with one tokenizer and one chat template, which it holds compiled.

    ``notes`` are sentences for the user: what had to be assumed of the template.
    """

    def __init__(self, tokenizer: Any, *, max_length: int) -> None:
        """The chat template is the tokenizer's own; one that has none gets a plain default, and a note says so.

        Raises:
            InvalidInput: the chat template does not compile.
            InvalidSettings: ``max_length`` is below 2, which leaves nothing to predict.
            Unsupported: the tokenizer cannot say which characters a token stands for.
        """
        if max_length < 2:
            raise InvalidSettings(f"max_length={max_length}: expected 2 or more; the first token is never a label")
        if not getattr(tokenizer, "is_fast", False):
            raise Unsupported(
                f"tokenizer {type(tokenizer).__name__} is not a fast one (of the tokenizers library), so it cannot say "
                "which characters a token stands for; use a model folder with a tokenizer.json"
            )
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._finders: dict[str, TurnFinder] = {}
        self._default: str | None = None
        notes = []
        if not tokenizer.chat_template:
            end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else (tokenizer.eos_token or "<|im_end|>")
            self._default = _DEFAULT_TEMPLATE.replace("{END}", end)
            notes.append(
                "The tokenizer has no chat template: chats are written in the ChatML form <|im_start|>role, line "
                f"break, content, {end}. Pass chat_template to use another."
            )
        self.notes: tuple[str, ...] = (*notes, *_notes(self._finder(None)))

    @property
    def writes_tools(self) -> bool:
        """Whether the chat template for rows with tools looks at them."""
        return "tools" in self._finder([{}]).template.names

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the ids and labels of a row."""
        named = self._tokenizer.chat_template
        sources = [self._default] if self._default else list(named.values()) if isinstance(named, dict) else [named]
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        # Left behind by whoever called the tokenizer last, and set anew by each call.
        state.pop("truncation", None)
        state.pop("padding", None)
        identity: dict[str, Any] = {
            "algorithm": ALGORITHM,
            "chat_template": text_sha256(json.dumps(sources)),
            "tokenizer": text_sha256(json.dumps(state, sort_keys=True)),
            "special_tokens": {k: str(v) for k, v in sorted(self._tokenizer.special_tokens_map.items())},
            "max_length": self.max_length,
        }
        if "strftime_now" in self._finder(None).template.names:
            identity["date"] = date.today().isoformat()
        return identity

    def render(self, example: Example) -> TokenizedExample:
        """Ids and labels of one row, cut to ``max_length`` from the end.

        A row without a supervised token left is returned as such (``num_supervised == 0``), not refused.

        Raises:
            BadRow: the template refuses the chat, drops or rewrites an answer, or hides where an answer lies.
        """
        encoded = self._encode(example)
        return TokenizedExample(
            input_ids=np.array(encoded.ids[: self.max_length], dtype=np.int32),
            supervised=encoded.supervised[: self.max_length],
            truncated=max(0, len(encoded.ids) - self.max_length),
            dropped=encoded.dropped,
        )

    def preview(self, example: Example) -> list[tuple[str, bool]]:
        """The rendered text up to ``max_length`` in pieces, each with whether it carries loss.

        Raises:
            BadRow: as for ``render``.
        """
        encoded = self._encode(example)
        pieces: list[tuple[str, bool]] = []
        shown = 0  # characters
        for i, token in enumerate(encoded.ids[: self.max_length]):
            start, end = (int(n) for n in encoded.offsets[i])
            piece = encoded.text[shown:end]
            if start == end == 0 and token in self._tokenizer.all_special_ids:
                piece = str(self._tokenizer.convert_ids_to_tokens(token))  # added by the tokenizer, not in the text
            shown = max(shown, end)
            label = bool(encoded.supervised[i])
            if pieces and pieces[-1][1] == label:
                pieces[-1] = (pieces[-1][0] + piece, label)
            elif piece:
                pieces.append((piece, label))
        return pieces

    def _encode(self, example: Example) -> _Encoded:
        if not example.messages:
            return self._encode_plain(example)
        try:
            return self._encode_messages(example)
        except TEMPLATE_ERRORS as error:
            problem = f"the chat template refuses this chat: {first_line(error)}; change it or use another template"
            field = self._refused_field(example)
            raise BadRow(problem, file=example.file, row=example.row, field=field) from error
        except TurnError as error:
            field = _field(example, error.message)
            raise BadRow(error.problem, file=example.file, row=example.row, field=field) from error

    def _refused_field(self, example: Example) -> str | None:
        """The field to blame for a chat that the template refuses: the system turn if it takes the chat without it."""
        if example.messages[0]["role"] in ("system", "developer"):
            finder = self._finder(example.tools)
            rest = [_prepared(message, finder.takes_parts) for message in example.messages[1:]]
            tools = list(example.tools) if example.tools else None
            try:
                finder.apply(rest, tools=tools, **example.template_kwargs)
            except TEMPLATE_ERRORS:
                pass
            else:
                return _field(example, 0)
        # An instruction row is one question and one answer; a template that refuses those blames neither.
        return None if example.format == "instruction" else _field(example, None)

    def _encode_plain(self, example: Example) -> _Encoded:
        """Plain strings: the end-of-sequence token is appended unless it is there, the prompt carries no label."""
        prompt, rest = example.prompt or "", example.text or example.completion or ""
        end = self._tokenizer.eos_token
        text = prompt + rest + (end if end and not rest.endswith(end) else "")
        ids, offsets = self._tokenize(text, add_special_tokens=True)
        first = 0
        if example.prompt is not None:
            # By ids, as TRL does: a prompt's last token may merge with the completion's first.
            first = common_prefix(self._tokenize(prompt, add_special_tokens=True)[0], ids)
        return _Encoded(text, ids, offsets, np.arange(len(ids)) >= first)

    def _encode_messages(self, example: Example) -> _Encoded:
        finder = self._finder(example.tools)
        messages = [_prepared(message, finder.takes_parts) for message in example.messages]
        variables = {"tools": list(example.tools) if example.tools else None, **example.template_kwargs}
        text = finder.apply(messages, **variables)
        marked = finder.mark(messages, text, **variables)
        ids, offsets = self._tokenize(text, add_special_tokens=False)
        dropped = any(
            message["role"] == "assistant" and drops_text(message, finder.written(k, text, marked) or text)
            for k, message in enumerate(messages)
        )
        if example.prompt_messages:
            prompt = finder.apply(messages[: example.prompt_messages], generation_prompt=True, **variables)
            for k, message in enumerate(messages):
                if k >= example.prompt_messages and message["role"] == "assistant":
                    check_answer(k, message, finder.written(k, text, marked) or text)
            first = common_prefix(self._tokenize(prompt, add_special_tokens=False)[0], ids)
            return _Encoded(text, ids, offsets, np.arange(len(ids)) >= first, dropped)
        if finder.template.has_generation_marks:
            supervised = self._generated(messages, text, marked, ids, offsets, finder, variables)
        else:
            supervised = np.zeros(len(ids), dtype=np.bool_)
            for span in finder.answers(messages, text, marked, **variables):
                supervised[slice(*_tokens_of(span, offsets))] = True
        return _Encoded(text, ids, offsets, supervised, dropped)

    def _generated(
        self,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        marked: MarkedText | None,
        ids: list[int],
        offsets: npt.NDArray[np.int64],
        finder: TurnFinder,
        variables: Mapping[str, Any],
    ) -> npt.NDArray[np.bool_]:
        """The insides of the template's ``{% generation %}`` blocks."""
        supervised = np.zeros(len(ids), dtype=np.bool_)
        if marked is not None:
            for span in marked.generated:
                supervised[slice(*_tokens_of(span, offsets))] = True
            for k, message in enumerate(messages):
                if message["role"] == "assistant" and finder.written(k, text, marked):
                    check_answer(k, message, finder.written(k, text, marked))
        else:
            mask = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=finder.template.source,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **variables,
            )["assistant_masks"]
            supervised |= np.array(mask, dtype=np.bool_)
        if not supervised.any():
            raise TurnError(None, "the chat template marks nothing of this chat as generated; repair its marks")
        return supervised

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], npt.NDArray[np.int64]]:
        encoding = self._tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[int] = encoding["input_ids"]
        return ids, np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)

    def _finder(self, tools: Sequence[Any] | None) -> TurnFinder:
        """The template for a chat with or without tools: a tokenizer may hold one of each."""
        source = self._default or self._tokenizer.get_chat_template(tools=tools or None)
        if source not in self._finders:
            self._finders[source] = TurnFinder(self._tokenizer, source)
        return self._finders[source]


def _notes(finder: TurnFinder) -> list[str]:
    notes = []
    if "strftime_now" in finder.template.names:
        notes.append(
            "The chat template writes today's date, so ids change from day to day; pass a template with a fixed date "
            "to resume a run on another day."
        )
    if finder.template.has_generation_marks:
        return notes
    if not finder.has_generation_prompt:
        notes.append(
            "The chat template has no generation prompt of its own; labels start where the assistant's turn starts."
        )
    if finder.closed_by_next:
        notes.append(
            "The chat template writes no end-of-turn token; the token that opens the next turn is the label that ends "
            "an answer, and a last answer has no such label."
        )
    return notes


def _prepared(message: Mapping[str, Any], takes_parts: bool) -> dict[str, Any]:
    """The message without null fields, as Transformers passes it on; parts joined where the template wants a string."""
    kept = {name: value for name, value in message.items() if value is not None}
    content = kept.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str) and not takes_parts:
        kept["content"] = "".join(part["text"] for part in content)
    return kept


def _tokens_of(span: Span, offsets: npt.NDArray[np.int64]) -> tuple[int, int]:
    """First token that reaches into ``span`` and the one after the last: a token across an edge belongs to it.

    Tokens of no width count where they stand: a space that the tokenizer trims away leaves one at its end.
    """
    start, end = span
    inside = (offsets[:, 0] < end) & (offsets[:, 1] > start)
    inside |= (offsets[:, 0] == offsets[:, 1]) & (offsets[:, 0] > start) & (offsets[:, 0] <= end)
    found = np.flatnonzero(inside)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def _field(example: Example, message: int | None) -> str:
    """The field of the user's row that holds ``message``."""
    if example.format == "instruction":
        names = ("instruction", "output") if len(example.messages) == 2 else ("system", "instruction", "output")
        return names[-1 if message is None else message]
    if example.format == "prompt-completion":
        before = example.prompt_messages
        if message is None:
            return "prompt"
        return f"prompt[{message}]" if message < before else f"completion[{message - before}]"
    name = "messages" if example.raw.get("messages") is not None else "conversations"
    return name if message is None else f"{name}[{message}]"
