"""The page of a comparison in a real browser: complete, quiet, offline, harmless with hostile names, at any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from comparison_runs import contender, made_run
from tamis.comparison.datamodel import Foretold
from tamis.comparison.result import CompareResult, SelectionFacts
from tamis.comparison.verdict import compare_pairs, standings_of
from tamis.report.comparison import comparison_document
from tamis.report.conclude import conclude
from tamis.report.document import render_document, write_document

ATTACK = "<script>window.owned = 1</script><b>\u202e{{ 7 * 7 }}"


def hostile_result() -> CompareResult:
    """Two methods, two budgets, two tasks; every text that comes from a user is an attack."""
    contenders = [
        contender("less", "selected"),
        contender("x" + ATTACK, "selected"),
        contender("full at less's cost", "equal-cost", of="less"),
        contender("random, less's sources", "same-sources", of="less"),
        *(contender(name, kind) for name, kind in (("uniform", "uniform"), ("full", "full"), ("bm25", "selected"))),
    ]
    runs = {
        (one.name, budget): [
            made_run(
                one.name,
                seed,
                [1.0 + 0.1 * place + 0.01 * seed * (place + 1) + 0.2 * row for row in range(6)],
                budget=budget,
                rows=int(4 * float(budget.rstrip("%"))),
            )
            for seed in range(3)
        ]
        for budget in ("5%", "20%")
        for place, one in enumerate(contenders)
    }
    by_name, spent = {c.name: c for c in contenders}, {("less", "5%"): (3.0, 9.0)}
    standings = standings_of(runs, by_name, spent, metric="loss", task_of=[ATTACK] * 3 + ["sums"] * 3)
    differences = [
        difference
        for budget in ("5%", "20%")
        for difference in compare_pairs(runs, contenders, budget=budget, metric="loss", content_of=np.arange(6))
    ]
    facts = SelectionFacts(
        name="less",
        budget="5%",
        folder=ATTACK,
        rows=20,
        largest_source=ATTACK,
        largest_share=0.9,
        pool_rows=400,
        pool_share=0.1,
        warnings=(ATTACK,),
    )
    conclusion = conclude(
        standings, differences, [facts], budget="5%", metric="loss", seeds=3, held_out_rows=6, warnings=[ATTACK]
    )
    return CompareResult(
        out=Path("out"), metric="loss", budget="5%", seeds=3, held_out_rows=6, tasks=(ATTACK, "sums"),
        standings=tuple(standings), differences=tuple(differences), selections=(facts,), conclusion=conclusion,
        foretold=(Foretold(name=ATTACK, correlation=0.5, low=None, high=None, parts=3),),
        manifest={"command": ATTACK, "settings": {"pool": [ATTACK]}},
    )  # fmt: skip


def test_page_is_complete_quiet_and_harmless(browser: Any, tmp_path: Path) -> None:
    write_document(comparison_document(hostile_result()), tmp_path / "report.html")
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="dark")
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    drawn = page.locator("[data-figure]").count()
    assert drawn == 5  # the gain, the runs, a curve for each of the two methods, the cost
    shapes = "box => box.querySelector('svg.main-svg .trace path') !== null"
    dot = "getComputedStyle(document.querySelector('[data-figure=gains] .trace .point')).fill"
    dark = page.evaluate(dot)
    for scheme, width in (("dark", 1400), ("light", 360)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        page.wait_for_timeout(400)  # figures follow a resize and a theme after a moment
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(f"[...document.querySelectorAll('[data-figure]')].filter({shapes}).length") == drawn
    assert page.evaluate(dot) != dark
    assert page.evaluate("window.owned") is None
    body = page.locator("body").inner_text()
    assert "<script>window.owned = 1</script>" in body and "{{ 7 * 7 }}" in body and "⟦U+202E⟧" in body
    assert page.locator("script").count() == 3 and page.locator("h1").count() == 1
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    assert complaints == []
    page.close()


def test_what_the_page_leads_with_is_equal_cost_and_its_tables_hold_every_number() -> None:
    result = hostile_result()
    document = comparison_document(result)
    assert document.title == result.conclusion.title and "equal cost" in document.title
    assert document.sections[0].key == "verdict"
    page = render_document(document)
    assert page.index('data-figure="gains"') < page.index('id="believe"') < page.index('data-figure="runs"')
    assert "Not measured" not in page and "Not shown" in page, "every difference was measured"
    tests = next(section for section in document.sections if section.key == "tests").tables[0]
    assert len(tests.rows) == len([d for d in result.differences if d.budget == "5%"])
    listed = next(section for section in document.sections if section.key == "runs").tables[0]
    assert {row[0] for row in listed.rows} >= {"less-0", "uniform-2"}
    assert len(listed.rows) == sum(len(standing.values) for standing in result.standings)
    assert {figure.key for section in document.sections for figure in section.figures} == {
        *("gains", "runs", "cost", "curve-0", "curve-1")
    }


def test_rendering_is_deterministic() -> None:
    assert render_document(comparison_document(hostile_result())) == render_document(
        comparison_document(hostile_result())
    )
