"""The page in a real browser: complete, quiet, offline, harmless with hostile data, in both themes, narrow and wide."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from page_visits import Visit, check_widths, open_page, until
from planted_reports import ATTACKS, edge, hostile, plain, realistic
from tamis.report.content import ReportInputs, build_content
from tamis.report.selection import render_page, write_page

PAGES: dict[str, Callable[[], ReportInputs]] = {"realistic": realistic, "edge": edge, "hostile": hostile}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, make in PAGES.items():
        write_page(build_content(make()), folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.fixture(scope="module")
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Visit]]:
    """Open a page once for each (name, scheme, width) it is first seen in: Plotly takes a second or two to load."""
    opened: dict[tuple[str, str, int], Visit] = {}

    def go(name: str, *, scheme: str = "light", width: int = 1400) -> Visit:
        key = (name, scheme, width)
        if key not in opened:
            opened[key] = open_page(browser, pages[name], scheme=scheme, width=width)
        opened[key].page.emulate_media(media="screen", color_scheme=scheme)
        opened[key].page.set_viewport_size({"width": width, "height": 900})
        return opened[key]

    yield go
    for seen in opened.values():
        seen.page.close()


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [("realistic", "light", 1400), ("realistic", "dark", 360), ("edge", "dark", 1400), ("hostile", "light", 1400)],
)
def test_page_is_complete_and_quiet(visit: Callable[..., Visit], name: str, scheme: str, width: int) -> None:
    seen = visit(name, scheme=scheme, width=width)
    page = seen.page
    figures = page.locator("[data-figure]").count()
    assert figures == page.evaluate(
        "Object.keys(JSON.parse(document.getElementById('figure-data').textContent)).length"
    )
    check_widths(page, (width, 360, 1400))
    assert seen.complaints == []


def test_a_row_opens_on_a_click_and_shows_its_text(visit: Callable[..., Visit]) -> None:
    page = visit("realistic").page
    row = page.locator("#rows details.row:not([open])").first
    text = row.locator(".text").first
    assert not text.is_visible()
    row.locator("summary").click()
    assert page.locator("#rows details.row[open] .text").first.is_visible()


def test_figures_follow_a_change_of_theme_and_print_light(visit: Callable[..., Visit]) -> None:
    seen = visit("realistic", scheme="light")
    page = seen.page
    bar = "getComputedStyle(document.querySelector('[data-figure=sources] .trace:last-child .point path')).fill"
    light = page.evaluate(bar)
    page.emulate_media(color_scheme="dark")
    until(page, f"{bar} !== '{light}'")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    until(page, f"{bar} === '{light}'")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgb(251, 250, 247)",
    )
    page.set_viewport_size({"width": 700, "height": 900})  # about an A4 column
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    until(page, f"{bar} !== '{light}'")
    assert seen.complaints == []


def test_hostile_data_becomes_text_and_nothing_else(visit: Callable[..., Visit]) -> None:
    seen = visit("hostile")
    page = seen.page
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    for box in page.locator("[data-figure]").all():  # hovering builds labels from the data too
        box.hover(position={"x": 160, "y": 40})
    assert page.evaluate("window.owned") is None
    assert page.locator("img, iframe, object, embed, form, input, base").count() == 0
    assert page.locator("script").count() == 3  # figure data, Plotly, the page's own
    assert page.locator("body style").count() == 0
    links = page.evaluate(
        "[...document.querySelectorAll('a')].map(a => a.getAttribute('href') ?? a.href?.baseVal ?? '')"
    )
    assert links
    assert all(link.startswith("#") for link in links)
    body = page.locator("body").inner_text()
    for shown in (
        ATTACKS[0],
        ATTACKS[1],
        "nul␀byte",
        "invoice⟦U+202E⟧gnp.exe",
        "lone ⟦U+D800⟧ surrogate",
        "{{ 7 * 7 }}",
    ):
        assert shown in body
    assert "characters are not shown" in body
    handlers = "[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))"
    assert not page.evaluate(handlers)
    assert seen.complaints == []


def test_an_injected_script_would_not_run(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    """The second fence: even if escaping failed, the page's policy stops foreign scripts and requests."""
    broken = tmp_path / "broken.html"
    attack = "<script>window.owned = 1</script><img src='https://example.invalid/x.gif' onerror='window.owned = 1'>"
    broken.write_text(pages["edge"].read_text("utf-8").replace("<main>", "<main>" + attack), "utf-8")
    page = browser.new_page()
    page.goto(broken.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    assert page.evaluate("window.owned") is None
    page.close()


def test_page_is_accessible_in_structure(visit: Callable[..., Visit]) -> None:
    page = visit("realistic").page
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.evaluate("[...document.querySelectorAll('th')].every(th => th.scope === 'col' || th.scope === 'row')")
    described = "box => box.getAttribute('role') === 'img' && box.ariaLabel.length > 20"
    assert page.evaluate(f"[...document.querySelectorAll('.plot')].every({described})")
    assert page.evaluate("document.documentElement.lang") == "en"
    found = "link => document.querySelector(link.getAttribute('href')) !== null"
    targets = page.evaluate(f"[...document.querySelectorAll('nav a')].map({found})")
    assert targets
    assert all(targets)
    ids = page.evaluate("[...document.querySelectorAll('main [id]')].filter(e => !e.closest('.plot')).map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_plotly_is_inside_once_and_nothing_is_linked() -> None:
    page = render_page(build_content(plain()))
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(?:script|img|iframe)[^>]+src=", page)
    assert re.findall(r"<link[^>]+>", page) == ['<link rel="icon" href="data:,">']


def test_rendering_is_deterministic_and_replaces_the_file_whole(tmp_path: Path) -> None:
    content = build_content(edge())
    target = tmp_path / "report.html"
    target.write_text("old")
    write_page(content, target)
    first = target.read_bytes()
    write_page(build_content(edge()), target)
    assert target.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
