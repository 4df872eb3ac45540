"""How the templates of pages are filled: escaped, strict about names, with the house's ways to write a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tamis.report import wording

__all__ = ["TEMPLATES", "page_environment", "page_style"]

TEMPLATES = Path(__file__).parent / "templates"


def page_environment() -> jinja2.Environment:
    """Templates in which an unknown name is an error, and no value brings mark-up or control characters with it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=wording.count,
        percent=wording.percent,
        number=wording.number,
        seconds=wording.seconds,
        short=lambda text: wording.one_line(text, 80),
    )
    return environment


def page_style() -> Markup:
    """The style sheet of all pages."""
    return Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))


def _visible(value: Any) -> Any:
    """Last stop of every value on its way into a page: no control or direction character gets past."""
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
