"""The page of a selection, drawn by a template of its own.

It is no ``Document``: its rows to read are grouped by target and by rank within it, and copies stand side by side,
which no other page needs and which plain sections could only flatten.
"""

from __future__ import annotations

from pathlib import Path

from tamis.report import figures
from tamis.report.content import ReportContent
from tamis.report.page import render_template, write_text

__all__ = ["render_page", "write_page"]


def render_page(content: ReportContent) -> str:
    """The page as text."""
    return render_template("report.html.j2", content, figures.draw(content), title=content.headline.title)


def write_page(content: ReportContent, path: str | Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_text(render_page(content), path)
