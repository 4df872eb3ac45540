"""Figures stay small, complete and readable in both themes."""

from __future__ import annotations

import json

import pytest

from planted_reports import edge, hostile, huge, realistic
from tamis.report.content import build_content
from tamis.report.figures import PALETTE, draw

CARD = ("#ffffff", "#1b2025")  # page.css: --card


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("role", "least"), [("ink", 7), ("quiet", 4.5), ("selected", 3), ("target", 3)])
def test_palette_has_the_contrast_of_wcag_aa_on_either_card(role: str, least: float) -> None:
    for colour, card in zip(PALETTE[role], CARD, strict=True):
        light, dark = sorted((luminance(colour), luminance(card)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least


def test_every_section_has_its_figures() -> None:
    figures = draw(build_content(realistic(600)))
    assert [figure.key for figure in figures] == [
        *("scores-0", "scores-1", "sources", "lengths", "overlap", "spearman", "tokens", "cost")
    ]
    assert all(figure.alt.endswith(".") and figure.title for figure in figures)


def test_an_almost_empty_report_draws_what_it_has() -> None:
    assert [figure.key for figure in draw(build_content(edge()))] == ["scores-0", "sources", "lengths", "tokens"]


def test_figures_hold_binned_numbers_only() -> None:
    figures = draw(build_content(huge(20_000)))
    assert max(len(trace.get("x", ())) for figure in figures for trace in figure.spec["data"]) <= 60


def test_labels_hold_no_tag_that_plotly_would_parse() -> None:
    for figure in draw(build_content(hostile())):
        written = json.dumps(
            [[trace.get("hovertext"), trace.get("text")] for trace in figure.spec["data"]], default=list
        )
        written += json.dumps(figure.spec["layout"], default=list)
        assert "<" not in written.replace("<extra></extra>", "")
        for trace in figure.spec["data"]:
            template = trace["hovertemplate"]
            assert template.count("<") == template.count("<extra></extra>") * 2
