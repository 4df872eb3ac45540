"""The page of a proxy: the verdict first, every measurement drawn and listed, hostile names harmless in a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from page_visits import check_widths, open_page
from planted_reports import ATTACKS
from tamis.proxies.align import Aligned, CurvePoint
from tamis.proxies.compressible import LeftOut
from tamis.proxies.influence import Interval, ModelAgreement
from tamis.proxies.retention import BEFORE, CONTROL, Advice, Cost, Kept, Retention, SweepPoint
from tamis.report.document import Document, Section, render_document, write_document
from tamis.report.retention import retention_document

MANIFEST = {"command": "tamis proxy --config out/run.yaml", "warnings": [], "settings": {"keep": 0.9}}
SWEEP = ((0.1, 0.99, 1.6), (0.5, 0.78, 2.4), (0.9, -0.11, 2.95))  # sparsity, rank correlation, loss


def kept(name: str, value: float, loss: float | None, targets: tuple[str, ...]) -> Kept:
    agreement = ModelAgreement(
        spearman=Interval(value=value, low=value - 0.05, high=value + 0.01),
        top_overlap=Interval(value=0.5, low=0.4, high=0.6),
        by_target=dict.fromkeys(targets, value),
    )
    return Kept(name=name, loss=loss, agreement=agreement)


def curve(*points: tuple[int, float, float]) -> Aligned:
    """Of (step, seconds, rank correlation)."""
    measured = tuple(CurvePoint(step=step, seconds=spent, retention=value) for step, spent, value in points)
    return Aligned(steps=100, best_step=100, curve=measured, seconds=points[-1][1], tokens=1000)


def planted(*, final: float = 0.87, text: str = "a model", targets: tuple[str, ...] = ("sums", "words")) -> Retention:
    """A proxy in factors, aligned, with a control and a sweep; ``text`` stands where a user's text would."""
    found = Retention(
        model=text, preset="default", objective="align+kl", space="product", sparsity=0.5, achieved=0.48,
        achieved_whole=0.4, compressed_layers=210, ranks=(48, 192),
        left_out=(LeftOut(layers=text, numel=1234, reason=f"tied {text}"),), rows={"held_out": 200, "probe": 128},
        targets=dict.fromkeys(targets, 16), loss_full=1.5, final=kept("this proxy", final, 1.9, targets),
        others=(kept(BEFORE, 0.78, 2.4, targets), kept(CONTROL, 0.8, 1.87, targets)),
        sweep=tuple(
            SweepPoint(sparsity=rho, achieved=rho - 0.02, kept=kept("-", value, loss, targets))
            for rho, value, loss in SWEEP
        ),
        aligned=curve((0, 0.0, 0.77), (50, 110.0, 0.83), (100, 221.5, 0.86)),
        control=curve((0, 0.0, 0.77), (300, 240.0, 0.79)),
        cost=Cost(
            params_full=1000, params_proxy=600, tflops_full=12.0, tflops_proxy=6.6, block_tflops_full=10.0,
            block_tflops_proxy=4.7, timed_rows=32, seconds_full=14.2, seconds_proxy=9.1, build_seconds=65.0,
            align_seconds=320.0, pool_pass_seconds=5200.0,
        ),
        advice=Advice(keep=0.9, sparsity=None, sentences=()), notes=(text,),
    )  # fmt: skip
    return replace(found, advice=found.advised(0.9))


def bare() -> Retention:
    """Another model as the proxy: no factors, no sweep, no alignment, and no loss."""
    return replace(
        planted(), preset="influence-scorer", sparsity=None, ranks=None, compressed_layers=0, left_out=(), others=(),
        sweep=(), aligned=None, control=None, notes=(), final=kept("this proxy", 0.93, None, ("sums", "words")),
    )  # fmt: skip


def section(document: Document, key: str) -> Section:
    return next(section for section in document.sections if section.key == key)


def drawn(document: Document, key: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """The role and the points of every trace of a figure."""
    (figure,) = [figure for figure in section(document, "kept").figures if figure.key == key]
    low, high = figure.spec["layout"]["yaxis"]["range"]
    traces = [(each["meta"], list(zip(each["x"], each["y"], strict=True))) for each in figure.spec["data"]]
    assert all(low < y < high for _, points in traces for _, y in points), "a point lies outside of the axis"
    return traces


def test_figures_place_every_measurement_and_the_wanted_level() -> None:
    document = retention_document(planted(), MANIFEST)
    assert drawn(document, "sweep") == [
        ("quiet", [(0.1, 0.9), (0.9, 0.9)]),
        ("selected", [(rho, value) for rho, value, _ in SWEEP]),
        ("pool", [(rho, 1.5 / loss) for rho, _, loss in SWEEP]),
        ("target", [(0.5, 0.87)]),
    ]
    assert drawn(document, "alignment") == [
        ("quiet", [(0.0, 0.9), (240.0, 0.9)]),
        ("selected", [(0.0, 0.77), (110.0, 0.83), (221.5, 0.86)]),
        ("pool", [(0.0, 0.77), (240.0, 0.79)]),
    ]
    ratio = replace(planted(), loss_full=60.0)  # a ratio of losses can be far above 1
    assert max(y for _, y in drawn(retention_document(ratio, MANIFEST), "sweep")[2][1]) > 30


def test_tables_hold_what_is_drawn_and_measured() -> None:
    document = retention_document(planted(), MANIFEST)
    by_label = {table.label: table for part in document.sections for table in part.tables}
    assert by_label["Agreement with the full model"].rows[0] == (
        *("this proxy", "0.87 (0.82 to 0.88)", "50% (40% to 60%)", "1.9"),
    )
    assert by_label["Agreement by target"].rows == (("sums", "16", "0.87"), ("words", "16", "0.87"))
    sweep = by_label["Other sparsities, measured before alignment"].rows
    assert [(row[0], row[2][:5].strip(), row[4]) for row in sweep] == [
        *(("0.1", "0.99", "1.6"), ("0.5", "0.78", "2.4"), ("0.9", "−0.11", "2.95")),
    ]
    alignment = by_label["Alignment, measured on validation rows"].rows
    assert [row[1::2] for row in alignment] == [
        *(("0", "0.77"), ("50", "0.83"), ("100", "0.86"), ("0", "0.77"), ("300", "0.79"))
    ]
    assert [row[3] for row in by_label["Cost of scoring"].rows] == ["60%", "47%", "55%", "64%"]
    assert by_label["Layers that stay as they are"].rows == (("a model", "1,234", "tied a model"),)


def test_a_measurement_without_an_interval_says_so_and_is_read_back() -> None:
    none = Interval(value=0.87, low=None, high=None)
    found = planted()
    agreement = replace(found.final.agreement, spearman=none, top_overlap=replace(none, value=0.5))
    found = replace(found, final=replace(found.final, agreement=agreement))
    assert Retention.from_json(found.to_json()).final == found.final
    document = retention_document(found, MANIFEST)
    assert [entry.detail for entry in document.numbers[:2]] == ["rank correlation, –", "–"]
    table = next(table for part in document.sections for table in part.tables if "full model" in table.label)
    assert table.rows[0][1:3] == ("0.87 (–)", "50% (–)")


@pytest.mark.parametrize(("final", "severity"), [(0.87, "warning"), (0.95, "passed")])
def test_the_advice_comes_first_and_says_whether_enough_is_kept(final: float, severity: str) -> None:
    found = planted(final=final)
    document = retention_document(found, {**MANIFEST, "warnings": ["3 rows are short"]})
    advice, warning, note = document.sections[0].findings
    assert (advice.severity, warning.severity, note.severity) == (severity, "warning", "note")
    assert f"{advice.sentence} {advice.advice}".strip() == " ".join(found.advice.sentences)
    assert warning.sentence == "3 rows are short"
    page = render_document(document)
    assert page.index(advice.sentence) < page.index('data-figure="sweep"') < page.index("Agreement with the full model")


def test_a_page_without_figures_needs_no_script_and_allows_none() -> None:
    page = render_document(retention_document(bare(), MANIFEST))
    assert "script-src 'none';" in page and "<script" not in page and "JavaScript" not in page
    assert "holds no model" in page and '<dd class="value">–</dd>' in page
    assert "Layers that stay" not in page and "Alignment" not in page, "a table without rows"


def test_hostile_names_are_text_at_any_width_in_both_themes(browser: Any, tmp_path: Path) -> None:
    text = "".join(ATTACKS)
    document = retention_document(
        planted(text=text, targets=(text, "שלום", "c" * 300)), {**MANIFEST, "command": text, "warnings": [text]}
    )
    write_document(document, tmp_path / "report.html")
    seen = open_page(browser, tmp_path / "report.html", scheme="dark")
    assert seen.page.locator("[data-figure]").count() == 2
    line = "getComputedStyle(document.querySelector('[data-figure=sweep] .trace .js-line')).stroke"
    dark = seen.page.evaluate(line)
    check_widths(seen.page, (1280, 360))
    seen.page.emulate_media(color_scheme="light")
    check_widths(seen.page, (360, 1280))
    assert seen.page.evaluate(line) != dark
    assert seen.page.evaluate("window.owned") is None
    assert seen.page.locator("img, iframe, form, input, base, body style").count() == 0
    assert seen.page.locator("script").count() == 3
    body = seen.page.locator("body").inner_text()
    assert "{{ 7 * 7 }}" in body and "⟦U+202E⟧" in body and "\u202e" not in body
    seen.page.close()
    assert seen.complaints == []


def test_without_script_the_page_says_in_words_and_tables_what_figures_would(browser: Any, tmp_path: Path) -> None:
    document = retention_document(planted(), MANIFEST)
    write_document(document, tmp_path / "report.html")
    page = browser.new_page(java_script_enabled=False, viewport={"width": 700, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    page.emulate_media(media="print")
    words = page.locator("figure noscript p")
    for index, figure in enumerate(section(document, "kept").figures):
        assert words.nth(index).is_visible() and words.nth(index).inner_text() == figure.alt
    assert not page.locator(".plot").first.is_visible(), "an empty frame"
    for table in section(document, "kept").tables:
        assert page.get_by_role("table", name=table.label).is_visible()
    page.close()
