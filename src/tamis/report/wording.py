"""How numbers are written in the report, and how text from a data set is made safe to look at.

Escaping for HTML is the template's job (autoescape); this file only removes what would mislead a reader or a figure:
control characters, direction overrides, lone surrogates, endless length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

__all__ = [
    "as_text",
    "count",
    "counted",
    "figure_text",
    "joined",
    "number",
    "one_line",
    "percent",
    "seconds",
    "visible",
]

# Nothing below may reach the page as it is: C0/C1 controls (tab and newline excepted), direction marks, overrides and
# isolates, zero-width space, line separators, byte order mark, annotation and tag characters, lone surrogates.
# Joiners (U+200C, U+200D) stay: Persian words and family emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffc"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """``text`` with every hidden or direction-changing character replaced by a sign that can be seen."""
    return _HIDDEN.sub(_stand_in, text.replace("\r\n", "\n"))


def _stand_in(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)  # the Control Pictures block: U+0000 becomes U+2400, and so on
    return f"⟦U+{code:04X}⟧"


def one_line(text: str, limit: int) -> str:
    """``text`` made visible, white space folded, cut at ``limit`` characters with an ellipsis."""
    folded = " ".join(visible(text[: 8 * limit]).split())
    cut = len(text) > 8 * limit or len(folded) > limit
    return folded[: limit - 1].rstrip() + "…" if cut else folded


def figure_text(text: str, limit: int = 26) -> str:
    """A label for a Plotly figure, which reads a subset of HTML (links too): everything it would parse is escaped."""
    short = one_line(text, limit)
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_text(value: Any) -> str:
    """Message content of any shape as text: strings stay, parts with a text are joined, the rest is shown as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "\n".join(part["text"] for part in value)
    return json.dumps(value, ensure_ascii=False, indent=1, default=str)


def count(value: float) -> str:
    """A whole number with thousands separated by commas."""
    return f"{round(value):,}"


def counted(value: float, noun: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{count(value)} {noun}" if round(value) == 1 else f"{count(value)} {noun}s"


def percent(share: float | None, digits: int | None = None) -> str:
    """A share of 1 as per cent: one decimal below ten per cent, none above, unless ``digits`` says otherwise."""
    if share is None or not math.isfinite(share):
        return "–"
    scaled = 100 * share
    if digits is None:
        digits = 1 if 0 < abs(scaled) < 10 else 0
        if 0 < abs(scaled) < 0.05:
            return "<0.1%" if scaled > 0 else ">−0.1%"
    return f"{scaled:.{digits}f}%".replace("-", "−")


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with ``digits`` significant digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1) and abs(value) < 1e9:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def seconds(value: float | None) -> str:
    """A duration in the unit a person would use."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 1:
        return f"{value:.2f}\u00a0s" if value else "0\u00a0s"
    if value < 60:
        return f"{value:.1f}\u00a0s"
    if value < 3600:
        return f"{int(value // 60)}\u00a0min\u00a0{int(value % 60):02d}\u00a0s"
    return f"{int(value // 3600)}\u00a0h\u00a0{int(value % 3600 // 60):02d}\u00a0min"


def joined(names: Sequence[str], limit: int = 4) -> str:
    """Names in a sentence: ``a, b and c``; beyond ``limit`` the rest is counted."""
    shown = list(names[:limit])
    if len(names) > limit:
        shown.append(f"{len(names) - limit} more")
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part) if shown else ""
