"""A page opened in a browser, with a note of everything that a page must not do: requests, dialogs, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Visit:
    """An open page and its complaints."""

    page: Any
    complaints: list[str] = field(default_factory=list)


def open_page(browser: Any, path: Path, *, scheme: str = "light", width: int = 1280) -> Visit:
    """``path`` once its figures are drawn; a page without a figure holds no script and is there at once."""
    own = path.as_uri()
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen = Visit(page)

    def routed(route: Any) -> None:
        if route.request.url == own:
            route.continue_()
        else:
            seen.complaints.append(f"request: {route.request.url}")
            route.abort()

    def dialog(shown: Any) -> None:
        seen.complaints.append(f"dialog: {shown.message}")
        shown.dismiss()

    page.route("**/*", routed)
    page.on("dialog", dialog)
    page.on("console", lambda message: seen.complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: seen.complaints.append(f"error: {error}"))
    page.on("requestfailed", lambda request: seen.complaints.append(f"failed: {request.url}"))
    page.goto(own)
    if page.locator("[data-figure]").count():
        page.wait_for_selector("html[data-drawn]", state="attached")
    return seen


def until(page: Any, claim: str) -> None:
    """Wait until a JavaScript expression holds (Playwright's own wait needs eval, which the page's policy forbids)."""
    for _ in range(100):
        if page.evaluate(claim):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never became true: {claim}")


def check_widths(page: Any, widths: Sequence[int]) -> None:
    """At each width, with every folded part closed and open: nothing sticks out, and every figure is drawn in it."""
    has_shapes = "box => box.querySelector('svg.main-svg .trace path') !== null"
    fits = "box => box.scrollWidth <= box.clientWidth + 1"
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        for is_open in ("false", "true"):
            page.evaluate(f"document.querySelectorAll('details').forEach(part => {{ part.open = {is_open}; }})")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        until(page, f"[...document.querySelectorAll('.plot')].every({fits})")  # figures follow a resize after a moment
        assert page.evaluate(f"[...document.querySelectorAll('[data-figure]')].every({has_shapes})")
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = false; })")
