"""From a template to one self-contained page: style, script, figures and Plotly inside, nothing fetched, ever.

Dataset text is hostile. Three fences, each enough alone: the template escapes everything, figure JSON is written with
``<``, ``>`` and ``&`` as escapes, and the page's own policy lets no script run but the two whose hashes it states and
no request leave.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tamis.report import wording
from tamis.report.drawing import PALETTE, Figure

__all__ = ["render_template", "write_text"]

_TEMPLATES = Path(__file__).parent / "templates"


def write_text(page: str, path: str | Path) -> None:
    """Write a whole page to ``path`` (UTF-8), replacing what is there at once."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(page.encode("utf-8"))
    unfinished.replace(path)


def render_template(template: str, content: Any, drawn: Sequence[Figure], *, title: str) -> str:
    """A page from one of the templates, with the house's style and figures; without figures it holds no script."""
    scripts = (_script(get_plotlyjs()), _script(_read("page.js"))) if drawn else ()
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            content=content,
            figures=drawn,
            figure_json=_json({figure.key: {**figure.spec, "height": figure.height} for figure in drawn}),
            palette=PALETTE,
            style=Markup(_read("page.css")),
            scripts=[Markup(script) for script in scripts],
            script_sources=Markup(" ".join(f"'sha256-{_hash(script)}'" for script in scripts) or "'none'"),
        )
    )


def _environment() -> jinja2.Environment:
    """Templates in which an unknown name is an error, and no value brings mark-up or control characters with it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
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


def _visible(value: Any) -> Any:
    """Last stop of every value on its way into a page: no control or direction character gets past."""
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _script(source: str) -> str:
    """Program text that can stand between script tags byte for byte as it will be hashed."""
    return source.replace("\r\n", "\n").replace("\0", "\\0").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _json(value: Mapping[str, Any]) -> Markup:
    """JSON that no HTML parser can be led out of, whatever strings are in it. NaN is an error: no figure draws it."""
    text = json.dumps(_listed(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _listed(value: Any) -> Any:
    """Tuples and arrays (Plotly keeps either) as lists; floats at the six digits a screen can show."""
    if isinstance(value, Mapping):
        return {key: _listed(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_listed(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
