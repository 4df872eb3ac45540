"""One self-contained page from the report's content: style, script, figures and Plotly inside, nothing fetched, ever.

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

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tamis.report import figures, training_figures
from tamis.report.content import ReportContent
from tamis.report.drawing import PALETTE, Figure
from tamis.report.environment import TEMPLATES, page_environment, page_style
from tamis.report.training import TrainingContent

__all__ = ["render_page", "render_template", "render_training_page", "write_page", "write_text"]


def write_page(content: ReportContent, path: str | Path) -> None:
    """Write a selection's page to ``path``."""
    write_text(render_page(content), path)


def write_text(page: str, path: str | Path) -> None:
    """Write a whole page to ``path`` (UTF-8), replacing what is there at once."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(page.encode("utf-8"))
    unfinished.replace(path)


def render_page(content: ReportContent) -> str:
    """The page of a selection as text."""
    return render_template("report.html.j2", content, figures.draw(content), title=content.headline.title)


def render_training_page(content: TrainingContent) -> str:
    """The page of a training run as text."""
    return render_template("training.html.j2", content, training_figures.draw(content), title=content.headline.title)


def render_template(template: str, content: Any, drawn: Sequence[Figure], *, title: str) -> str:
    """A page from one of the templates, with the house's style, scripts and figures."""
    scripts = (_script(get_plotlyjs()), _script((TEMPLATES / "page.js").read_text(encoding="utf-8")))
    filled = page_environment().get_template(template)
    return filled.render(
        title=title,
        content=content,
        figures=drawn,
        figure_json=_json({figure.key: {**figure.spec, "height": figure.height} for figure in drawn}),
        palette=PALETTE,
        style=page_style(),
        plotly_script=Markup(scripts[0]),
        page_script=Markup(scripts[1]),
        script_hashes=Markup(" ".join(f"'sha256-{_hash(script)}'" for script in scripts)),
    )


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
