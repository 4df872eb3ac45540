"""Numbers as written, and hostile text made visible."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.report import wording


@pytest.mark.parametrize(
    ("share", "written"),
    [
        (0, "0%"),
        (0.0004, "<0.1%"),
        (0.0123, "1.2%"),
        (-0.03, "−3.0%"),
        (-0.0004, ">−0.1%"),
        (0.12, "12%"),
        (1, "100%"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_percent(share: float | None, written: str) -> None:
    assert wording.percent(share) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0"), (0.123456, "0.1235"), (-0.5, "−0.5"), (12345.6, "12,346"), (1e-9, "1e−09"), (None, "–")],
)
def test_number(value: float | None, written: str) -> None:
    assert wording.number(value) == written


@pytest.mark.parametrize(
    ("value", "written"), [(0, "0 s"), (0.5, "0.50 s"), (59, "59.0 s"), (90, "1 min 30 s"), (7260, "2 h 01 min")]
)
def test_seconds(value: float, written: str) -> None:
    assert wording.seconds(value).replace("\u00a0", " ") == written


def test_joined_counts_what_it_leaves_out() -> None:
    assert wording.joined([]) == ""
    assert wording.joined(["a"]) == "a"
    assert wording.joined(["a", "b", "c"]) == "a, b and c"
    assert wording.joined(list("abcdef"), limit=2) == "a, b and 4 more"


@given(st.text(st.characters(codec=None), max_size=200))
def test_visible_text_holds_no_hidden_character(text: str) -> None:
    shown = wording.visible(text)
    shown.encode("utf-8")
    for character in shown:
        assert character in "\t\n" or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(character) not in (
            "RLO",
            "LRO",
            "RLE",
            "LRE",
            "PDF",
            "RLI",
            "LRI",
            "FSI",
            "PDI",
        )
    assert wording.visible(shown) == shown


def test_scripts_and_emoji_that_need_joiners_are_untouched() -> None:
    for text in ("سلام‌ها", "👨‍👩‍👧", "naïve\n\ttext", "日本語"):
        assert wording.visible(text) == text
    assert wording.visible("a\x00b\u202ec") == "a␀b⟦U+202E⟧c"


@given(st.text(max_size=400), st.integers(5, 40))
def test_one_line_is_one_line_of_limited_length(text: str, limit: int) -> None:
    line = wording.one_line(text, limit)
    assert len(line) <= limit
    assert "\n" not in line


def test_figure_labels_hold_no_markup() -> None:
    assert wording.figure_text("<b>&") == "&lt;b&gt;&amp;"


def test_message_content_of_any_shape_becomes_text() -> None:
    assert wording.as_text(None) == ""
    assert wording.as_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "a\nb"
    assert '"image"' in wording.as_text([{"type": "image"}])
