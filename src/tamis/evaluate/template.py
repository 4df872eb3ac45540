"""What a chat template does to a conversation, found with probe messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TemplateReport", "examine_template"]


@dataclass(frozen=True, kw_only=True)
class TemplateReport:
    """What the chat template does to a conversation, found with probe messages."""

    origin: str  # "tokenizer", "given" or "default"
    has_generation_marks: bool
    added_text: str  # written before the first turn although no message asked for it (a default system turn)
    trims_content: bool
    takes_system: bool
    notes: tuple[str, ...]


def examine_template(tokenizer: Any, *, given: bool, notes: Sequence[str]) -> TemplateReport:
    """What the tokenizer's chat template writes for probe messages; without one, what the default does."""
    source = tokenizer.chat_template
    if not source:
        return TemplateReport(
            origin="default",
            has_generation_marks=True,
            added_text="",
            trims_content=False,
            takes_system=True,
            notes=tuple(notes),
        )
    text = source if isinstance(source, str) else " ".join(map(str, source.values()))
    user = {"role": "user", "content": "  §q  "}
    chat = [user, {"role": "assistant", "content": "  §a  "}]
    one = _applied(tokenizer, chat)
    two = _applied(tokenizer, [*chat, *chat])
    system = _applied(tokenizer, [{"role": "system", "content": "§s"}, *chat])
    return TemplateReport(
        origin="given" if given else "tokenizer",
        has_generation_marks=bool(re.search(r"\{%-?\s*generation\b", text)),
        added_text=_added_text(one, two, tokenizer),
        trims_content=one is not None and not ("  §q  " in one and "  §a  " in one),
        takes_system=system is not None and "§s" in system,
        notes=tuple(notes),
    )


def _added_text(one: str | None, two: str | None, tokenizer: Any) -> str:
    """What stands before the first user turn only: a default system turn, a date, an instruction."""
    if one is None or two is None or "§q" not in one or two.count("§q") != 2:
        return ""
    before_first = one[: one.index("§q")]
    before_second = two[: two.rindex("§q")]
    shared = 0  # length of the turn's opening, which both end with
    while shared < len(before_first) and before_first[-1 - shared] == before_second[-1 - shared]:
        shared += 1
    added = before_first[: len(before_first) - shared]
    return added.removeprefix(tokenizer.bos_token or "")


def _applied(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str | None:
    """The rendered text, or None where the template refuses these roles (many refuse a system turn)."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception:  # templates raise whatever they like
        return None
