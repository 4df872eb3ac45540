"""A page of any verb as plain dataclasses: a headline, then sections of findings, figures and tables. No HTML here.

``comparison``, ``planted``, ``retention`` and ``training`` each make one from their result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tamis.report.drawing import Figure
from tamis.report.examples import ExampleCard
from tamis.report.finding import Finding
from tamis.report.page import render_template, write_text

__all__ = ["Cards", "Document", "KeyNumber", "Section", "Table", "render_document", "write_document"]


@dataclass(frozen=True, kw_only=True)
class KeyNumber:
    """One number of the headline with what it counts."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts; the first cell of each names the row. Not shown without rows."""

    label: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()  # heads of columns that hold words; all but these and the first hold numbers
    folded: bool = False  # shown on request only


@dataclass(frozen=True, kw_only=True)
class Cards:
    """Rows of data to read, each opened on a click. Not shown without rows."""

    title: str
    rows: tuple[ExampleCard, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page, shown in the order of these fields: pictures first, tables beneath."""

    key: str
    title: str
    short_title: str = ""  # in the list of parts; the title when left out
    paragraphs: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    next_steps: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    cards: tuple[Cards, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """All that the page shows, in the order of these fields."""

    eyebrow: str
    title: str
    lede: str
    numbers: tuple[KeyNumber, ...]
    sections: tuple[Section, ...]
    repeat: str  # what the command keeps of what there is
    command: str
    provenance: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # (group, ((key, value), ...))
    footer: str


def render_document(document: Document) -> str:
    """The page as text."""
    drawn = [figure for section in document.sections for figure in section.figures]
    return render_template("document.html.j2", document, drawn, title=document.title)


def write_document(document: Document, path: str | Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_text(render_document(document), path)
