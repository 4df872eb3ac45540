"""A page of any verb as plain dataclasses: a headline, findings, sections of figures and tables. No HTML here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tamis.report.content import KeyNumber
from tamis.report.drawing import Figure
from tamis.report.finding import Finding
from tamis.report.page import render_template, write_text

__all__ = ["Document", "Section", "Table", "render_document", "write_document"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts; the first cell of each names the row."""

    label: str
    heads: tuple[tuple[str, bool], ...]  # (title, whether the column holds numbers)
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False  # shown on request only


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: pictures first, tables beneath."""

    key: str  # its figures' ``section``, too
    title: str
    short_title: str  # in the list of parts
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    remarks: tuple[str, ...] = ()  # beneath the tables


@dataclass(frozen=True, kw_only=True)
class Document:
    """All that the page shows."""

    eyebrow: str
    title: str
    lede: str
    numbers: tuple[KeyNumber, ...]
    findings_title: str
    findings_lede: str
    findings: tuple[Finding, ...]
    next_steps: tuple[str, ...]
    sections: tuple[Section, ...]  # the first stands before the findings
    command: str
    repeat: str  # what the command keeps of what there is
    provenance: Mapping[str, Sequence[tuple[str, str]]]
    footer: str


def render_document(document: Document) -> str:
    """The page as text."""
    drawn = [figure for section in document.sections for figure in section.figures]
    return render_template("document.html.j2", document, drawn, title=document.title)


def write_document(document: Document, path: str | Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_text(render_document(document), path)
