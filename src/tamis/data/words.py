"""What counts as a word wherever texts are compared by their words: no tokenizer, no list of stop words."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["words"]

# Scripts written without spaces: their letters count as words of their own, or every sentence would be one rare word.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"  # Chinese characters
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, digits and underscores, without case, compatibility forms unified."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
