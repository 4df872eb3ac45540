"""Where the assistant's turns lie in a rendered chat, found from the template's own output.

Works on characters; ``render.py`` turns them into tokens. The text itself always comes from the tokenizer's
``apply_chat_template``; the marked template of ``template.py`` only says where things are in it, and is believed only
if it wrote the same text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from tamis.data.template import MarkedTemplate, MarkedText, Span
from tamis.errors import InvalidInput

__all__ = ["TEMPLATE_ERRORS", "TurnError", "TurnFinder", "check_answer", "common_prefix", "drops_text"]

Message = Mapping[str, Any]

# Whatever a template's expressions raise on data that they do not expect.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)

# Templates for which TRL has a training variant that starts the labels of a turn earlier than just after the
# generation prompt. SHA-256 of the template -> the opening of a turn that carries no label there.
_OPENING_IN_TRL = {
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": "<|im_start|>assistant",  # Qwen2.5
    "563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64": "",  # DeepSeek-V3
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": "",  # DeepSeek-R1-Distill
    "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146": "",  # GPT-OSS
    "cfc67e5f349f37690dfd31ed1f18bc4442a9dd32fe39a648f993cb4eb3cae678": "",  # Muse Glimmer
}

# Names under which a message's reasoning comes; Transformers fills in the first from the others.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_REASONING_TAG = re.compile(r"<[^<>]*think[^<>]*>")
_TAG = re.compile(r"</?[^<>\s]+>")

# Probes: texts that no template writes by itself, and whose first characters differ from any opening.
_QUESTION, _ANSWER = "\u00a7q1", "\u00a7a1"


class TurnError(Exception):
    """The template cannot be followed on this chat: at which message, and what to do."""

    def __init__(self, message: int | None, problem: str) -> None:
        super().__init__(problem)
        self.message, self.problem = message, problem


class TurnFinder:
    """One chat template of one tokenizer, and what two probe chats say of its turns."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        try:
            self.template = MarkedTemplate(source)
        except jinja2.TemplateError as error:
            raise InvalidInput(f"the chat template does not compile ({_one_line(error)}); repair it") from error
        self._variables = {
            **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
            "documents": None,
            "add_generation_prompt": False,
        }
        chats = [_probe(turns) for turns in (1, 2)]
        self._probes = [(text, marked) for text, marked in map(self._try, chats) if marked is not None]
        prompt = self._generation_prompt()
        self.has_generation_prompt = bool(prompt)
        self.opening = self._opening(prompt)
        self.takes_parts = self._takes_parts()
        self.closed_by_next = self._closed_by_next()

    def apply(self, messages: Sequence[Message], *, generation_prompt: bool = False, **variables: Any) -> str:
        """The text of ``messages`` as Transformers renders it (``variables``: ``tools`` and template variables).

        Raises:
            One of ``TEMPLATE_ERRORS``.
        """
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            chat_template=self._source,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **variables,
        )
        return text

    def mark(self, messages: Sequence[Message], text: str, **variables: Any) -> MarkedText | None:
        """Which message wrote which part of ``text``; None if following the template changes what it writes."""
        try:
            marked = self.template.render(
                [_with_reasoning(message) for message in messages], {"tools": None, **self._variables, **variables}
            )
        except TEMPLATE_ERRORS:
            return None
        return marked if marked.text == text else None

    def written(self, k: int, text: str, marked: MarkedText | None) -> str:
        """What message ``k`` wrote, without the opening of its turn; empty if that cannot be told."""
        regions = marked.turns.get(k, []) if marked is not None else []
        return text[slice(*regions[0])].removeprefix(self.opening or "") if len(regions) == 1 else ""

    def answers(
        self, messages: Sequence[Message], text: str, marked: MarkedText | None, **variables: Any
    ) -> list[Span]:
        """The part of ``text`` that each assistant turn adds to its prompt: answer, end of turn, what follows it.

        Raises:
            TurnError: the template drops or rewrites an answer, or does not show where one lies.
        """
        spans: list[Span] = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            regions = marked.turns.get(k, []) if marked is not None else []
            if len(regions) == 1 and self.opening is not None:
                ((start, end),) = regions
                closing = next((len(t) for t in self.closed_by_next if text.startswith(t, end)), 0)
                span = (self._start(messages, text, k, start, end, variables), end + closing)
            elif not regions and marked is not None and marked.turns:
                raise TurnError(k, "the chat template leaves this answer out; use another template or remove the row")
            else:
                span = self._by_prefix(messages, text, k, variables)
            spans.append(span)
            check_answer(k, message, text[slice(*span)])
        if messages[-1]["role"] == "assistant" and spans:
            # What closes the whole text (Phi-3 ends it with the end-of-sequence token) ends the last answer.
            spans[-1] = (spans[-1][0], len(text))
        return spans

    def _start(
        self, messages: Sequence[Message], text: str, k: int, start: int, end: int, variables: Mapping[str, Any]
    ) -> int:
        """Where the answer begins in the part that message ``k`` wrote: after the opening of an assistant turn."""
        assert self.opening is not None
        if text.startswith(self.opening, start, end):
            return start + len(self.opening)
        # This turn opens in its own way (a tool call may): it begins where it leaves its own prompt.
        prompt = self._prompt(messages, k, variables)
        common = common_prefix(prompt, text[:end]) if prompt is not None else -1
        if common < start:
            raise TurnError(
                k,
                "cannot tell where this answer begins, since the chat template opens it in another way than the "
                "generation prompt; use a template with {% generation %} marks",
            )
        return common

    def _by_prefix(self, messages: Sequence[Message], text: str, k: int, variables: Mapping[str, Any]) -> Span:
        """The answer as the difference between the chat up to it and its prompt, if later turns leave both alone."""
        prompt = self._prompt(messages, k, variables)
        try:
            through = self.apply(messages[: k + 1], **variables)
        except TEMPLATE_ERRORS:
            through = None
        if prompt is None or through is None or not through.startswith(prompt) or not text.startswith(through):
            raise TurnError(
                k,
                "cannot tell which part of the text this answer is, since the chat template writes a turn differently "
                "once others follow; use a template with {% generation %} marks",
            )
        return len(prompt), len(through)

    def _prompt(self, messages: Sequence[Message], k: int, variables: Mapping[str, Any]) -> str | None:
        if k == 0:
            return None  # templates are not made for an empty chat
        try:
            return self.apply(messages[:k], generation_prompt=True, **variables)
        except TEMPLATE_ERRORS:
            return None

    def _try(self, messages: list[dict[str, Any]]) -> tuple[str, MarkedText | None]:
        try:
            text = self.apply(messages)
        except TEMPLATE_ERRORS:
            return "", None
        return text, self.mark(messages, text)

    def _generation_prompt(self) -> str | None:
        """What ``add_generation_prompt`` adds to a question."""
        question = _probe(1)[:1]
        try:
            plain, prompted = self.apply(question), self.apply(question, generation_prompt=True)
        except TEMPLATE_ERRORS:
            return None
        # Phi-3 closes a plain text with a token that the prompted text does not have.
        end = self._tokenizer.eos_token
        if end and not prompted.startswith(plain):
            plain = plain.removesuffix(end)
        return prompted[len(plain) :] if prompted.startswith(plain) else None

    def _opening(self, prompt: str | None) -> str | None:
        """What belongs to the prompt of a turn: the start that probe answers share with the generation prompt.

        Shared by a first and by a last answer: thinking models add to the prompt what only a last answer has. A tag
        that opens the reasoning belongs to the answer even so, as in TRL. None if the probes could not be followed.
        """
        known = _OPENING_IN_TRL.get(hashlib.sha256(self._source.encode()).hexdigest())
        if known is not None:
            return known
        if prompt is None:
            return None
        written = [
            text[slice(*spans[0])]
            for text, marked in self._probes
            if marked is not None
            for k, spans in marked.turns.items()
            if k % 2 == 1
        ]
        if not written:
            return None
        return _REASONING_TAG.split(prompt[: min(common_prefix(prompt, answer) for answer in written)])[0]

    def _takes_parts(self) -> bool:
        """Whether the template takes content as a list of parts, rather than printing the list or failing."""
        question, answer = _probe(1)
        text, _ = self._try([question, {**answer, "content": [{"type": "text", "text": _ANSWER}]}])
        return _ANSWER in text and not re.search(r"['\"]text['\"]", text)

    def _closed_by_next(self) -> tuple[str, ...]:
        """Added tokens, longest first, if the template leaves it to the next turn's opening token to end an answer."""
        tokens = sorted(
            (str(t) for t in self._tokenizer.get_added_vocab() if t != self._tokenizer.bos_token), key=len, reverse=True
        )
        for text, marked in self._probes:
            if marked is not None and {1, 3} <= set(marked.turns):
                start, end = marked.turns[1][0]
                if not text[start:end].rstrip().endswith(tuple(tokens)) and text.startswith(tuple(tokens), end):
                    return tuple(tokens)
        return ()


def check_answer(k: int, message: Message, written: str) -> None:
    """That the template wrote the answer, or at least its last part between tags: reasoning before it may go.

    Raises:
        TurnError: it did not.
    """
    answer = _answer(message)
    if answer and answer not in written:
        parts = [part.strip() for part in _TAG.split(answer) if part.strip()]
        if not parts or parts[-1] not in written:
            raise TurnError(
                k, "the chat template rewrites or drops this answer; use another template or remove the row"
            )
    for call in message.get("tool_calls") or []:
        name = call.get("function", call)["name"]
        if name not in written:
            raise TurnError(
                k, f"the chat template does not write the call of '{name}'; use a template with tools or remove the row"
            )


def drops_text(message: Message, written: str) -> bool:
    """Whether the template left out a part of an assistant turn: its reasoning field, or a text between tags."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    if isinstance(reasoning, str) and reasoning.strip() not in written:
        return True
    answer = _answer(message)
    return answer not in written and any(part.strip() not in written for part in _TAG.split(answer))


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading items that ``a`` and ``b`` share."""
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return min(len(a), len(b))


def _answer(message: Message) -> str:
    content = message.get("content") or ""
    return (content if isinstance(content, str) else "".join(part["text"] for part in content)).strip()


def _probe(turns: int) -> list[dict[str, Any]]:
    pair = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    return [dict(message) for _ in range(turns) for message in pair]


def _with_reasoning(message: Message) -> dict[str, Any]:
    """The message as Transformers hands it to a template: reasoning under all of its names."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
