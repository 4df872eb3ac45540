"""The report of a training run: every number against plain loops over a planted log, the page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from page_visits import check_widths, open_page
from planted_reports import ATTACKS
from tamis.cli.main import run
from tamis.errors import InvalidInput
from tamis.online.account import forecast_pairs
from tamis.online.fate import _SCHEMA
from tamis.report.curves import effective_sizes, fates, shares_by_source
from tamis.report.document import Document, Section, render_document, write_document
from tamis.report.training import TrainingInputs, training_document
from tamis.report.training_findings import held_out_losses
from tamis.runs.report import write_report
from tamis.types import Example

STEPS, KEEP, OFFERED = 40, 2, 4


def planted(*, good_forecasts: bool = True, hostile: bool = False) -> TrainingInputs:
    """40 updates: two cold ones, row ``step % 10`` and another of four kept; sources by the row's last digit."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        offered = [(step + 3 * i) % 20 for i in range(OFFERED)]
        for place, row in enumerate(offered):
            kept, source = place < KEEP, ATTACKS[row % 2] if hostile else f"s{row % 3}"
            rows.append(
                {
                    "step": step, "choice": step - 1, "row": row, "source": source,
                    "tokens": 5, "loss": 2.0, "alignment": None if step <= 2 else float(row - 6), "kept": kept,
                    "weight": (1.5, 0.5)[place] if kept else 0.0, "dropped": False, "cold": step <= 2,
                }
            )  # fmt: skip
    log: list[dict[str, Any]] = [{"eval_loss": 3.0, "step": 0}]
    for step in range(1, STEPS + 1):
        entry: dict[str, Any] = {"loss": 2.0, "step": step, "selection/fallback": 0.25}
        entry["selection/target_rows_seen"] = min(24, 4 * step)
        if step % 4 == 0:
            predicted = float(draw.random())
            realised = predicted + 0.05 * float(draw.normal()) if good_forecasts else float(draw.normal())
            entry |= {"selection/predicted_drop": predicted, "selection/realised_drop": realised}
        log.append(entry)
        if step % 10 == 0:
            log.append({"eval_loss": 3.0 - step / 20 if step <= 30 else 1.6, "step": step})
    log.append({"final_eval_loss": 1.5, "step": STEPS})
    text = "".join(ATTACKS) if hostile else "How much is 1 plus 2?"
    manifest = {
        "settings": {"model": text if hostile else "tiny", "method": "filter-then-weight", "target": ["t.jsonl"]},
        "method": {"name": "filter-then-weight"}, "command": "tamis train --config run.yaml",
        "warnings": [text] if hostile else [],
        "training": {"steps": STEPS, "stopped_early": True},
        "cost": {
            "seconds": 12.5, "candidate_tokens": 700, "target_tokens": 300, "total_tflops": 4.5,
            "tflops": {"candidates": 3.0, "target": 1.0, "update": 0.5},
        },
    }  # fmt: skip

    def read(row: int) -> Example:
        return Example(
            index=row, id=f"id-{row}", file="p.jsonl", row=row, source="s", format="messages",
            messages=({"role": "user", "content": f"{text} {row}"}, {"role": "assistant", "content": text}),
        )  # fmt: skip

    return TrainingInputs(
        log=log, candidates=pa.Table.from_pylist(rows, schema=_SCHEMA), manifest=manifest,
        target_names=[text if hostile else "sums"], read_example=read,
    )  # fmt: skip


def bare(**changes: Any) -> TrainingInputs:
    """One update of a run with all rows, still going on, nothing measured, its pool gone."""
    given: dict[str, Any] = {
        "log": [{"step": 1, "loss": 1.0}], "candidates": planted().candidates.slice(0, OFFERED),
        "manifest": {"settings": {"method": "full"}}, "target_names": ["t"], "read_example": None, "no_texts": "gone",
        "is_finished": False,
    }  # fmt: skip
    return TrainingInputs(**{**given, **changes})


def section(document: Document, key: str) -> Section:
    return next(section for section in document.sections if section.key == key)


@pytest.fixture(scope="module")
def document() -> Document:
    return training_document(planted())


def test_fates_are_those_of_a_plain_count(document: Document) -> None:
    fate = fates(planted().candidates)
    rows = planted().candidates.to_pylist()
    chosen = {row: sum(r["kept"] for r in rows if r["row"] == row) for row in range(20)}
    labels = {"never": [0], "once": [1], "twice": [2], "3 to 5 times": [3, 4, 5], "more often": range(6, 99)}
    for label, found in fate.times_chosen:
        assert found == sum(times in labels[label] for times in chosen.values())
    total = sum(r["weight"] for r in rows)
    shares = [source.weight_share for source in fate.by_source]
    assert shares == sorted(shares, reverse=True)
    for source in fate.by_source:
        own = [r for r in rows if r["source"] == source.name]
        assert (source.offered, source.rows) == (len(own), len({r["row"] for r in own}))
        assert source.chosen == sum(r["kept"] for r in own)
        assert source.never == sum(not chosen[row] for row in {r["row"] for r in own})
        assert source.weight_share == pytest.approx(sum(r["weight"] for r in own) / total)
    weights = {row: sum(r["weight"] for r in rows if r["row"] == row) for row in range(20)}
    assert weights[fate.most_weight[0]] == max(weights.values())
    assert all(not chosen[row] for row in fate.never_chosen)
    # The page shows these and no others.
    assert section(document, "fate").tables[0].rows == tuple((label, str(n)) for label, n in fate.times_chosen)
    assert [row[:3] for row in section(document, "sources").tables[0].rows] == [
        (source.name, str(source.rows), str(source.offered)) for source in fate.by_source
    ]
    most, never = section(document, "rows").cards
    assert [card.row for card in most.rows] == list(fate.most_weight[:5])
    assert [card.row for card in never.rows] == list(fate.never_chosen[:5])


def test_curves_are_those_of_a_plain_loop(document: Document) -> None:
    rows = planted().candidates.to_pylist()
    aligned, effective, offered = effective_sizes(planted().candidates)
    assert (offered, effective.steps) == (OFFERED, tuple(range(1, STEPS + 1)))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective.values == pytest.approx([math.exp(entropy)] * STEPS)
    for step, share in zip(aligned.steps, aligned.values, strict=True):
        assert share == np.mean([r["alignment"] > 0 for r in rows if r["step"] == step])
    assert aligned.steps == tuple(range(3, STEPS + 1))  # cold choices measure nothing
    sources = shares_by_source(planted().candidates)
    shares = {curve.name: dict(zip(curve.steps, curve.values, strict=True)) for curve in sources}
    edges = sorted(shares["s0"])
    for first, last in zip([0, *edges], edges, strict=False):
        part = [r for r in rows if first < r["step"] <= last]
        for name, curve in shares.items():
            own = sum(r["weight"] for r in part if r["source"] == name)
            assert curve[last] == pytest.approx(own / sum(r["weight"] for r in part))
    (held_out,) = held_out_losses(planted().log)
    assert held_out.steps == (0, 10, 20, 30, 40, 40)
    assert held_out.values == (3.0, 2.5, 2.0, 1.5, 1.6, 1.5)
    # The page draws these and sums them up.
    figures = {figure.key: figure.spec["data"][0] for part in document.sections for figure in part.figures}
    for key, curve in (("held-out", held_out), ("aligned", aligned), ("effective", effective), ("sources", sources[0])):
        assert (tuple(figures[key]["x"]), tuple(figures[key]["y"])) == (curve.steps, curve.values)
    loss, choices, cost = (section(document, key) for key in ("loss", "choices", "cost"))
    assert loss.paragraphs == ("The run stopped early after 40 updates, and keeps the weights of update 30.",)
    assert loss.tables[0].rows == (("all targets", "3", "1.5", "3", "1.5", "6"),)
    assert choices.tables[0].rows[2] == ("Distinct target rows looked at", "4", "4", "24", "24")
    assert [row[1:] for row in cost.tables[0].rows] == [("3", "67%"), ("1", "22%"), ("0.5", "11%"), ("4.5", "")]


def test_the_verdict_follows_the_forecasts(document: Document) -> None:
    for inputs, severity, word in (
        (planted(), "passed", "Yes."),
        (planted(good_forecasts=False), "warning", "No."),
    ):
        found = training_document(inputs)
        (finding,) = [f for f in found.sections[0].findings if f.key == "forecasts"]
        pairs = forecast_pairs(inputs.log)
        assert (finding.severity, finding.sentence.split()[0]) == (severity, word)
        assert f"{np.corrcoef(pairs.T)[0, 1]:.2f}" in finding.sentence and len(pairs) == 10
        marks = section(found, "forecasts").figures[0].spec["data"][1]
        assert [marks["x"], marks["y"]] == pairs.T.tolist()
    keys = {finding.key: finding.severity for finding in document.sections[0].findings}
    assert keys["held-out"] == "passed" and keys["target-rows"] == "passed" and keys["fallbacks"] == "warning"
    assert next(iter(keys)) == "fallbacks", "the gravest first"


def test_a_run_without_measurements_shows_what_there_is() -> None:
    found = training_document(bare())
    words = {finding.key: finding for finding in found.sections[0].findings}
    assert "looks at no target" in words["forecasts"].sentence and words["unfinished"].severity == "note"
    assert [part.key for part in found.sections] == ["believe", "choices", "sources", "fate", "rows"]
    page = render_document(found)
    assert "Texts are not shown: gone" in page and "not finished yet" in page
    (single,) = section(found, "choices").figures[0].spec["data"]
    assert len(single["x"]) == 1 and "markers" in single["mode"], "a line through one point cannot be seen"
    empty = training_document(bare(log=[], candidates=planted().candidates.slice(0, 0)))
    assert [part.key for part in empty.sections] == ["believe", "rows"]
    assert "<script" not in render_document(empty)


def test_losses_that_are_not_finite_are_a_warning_and_no_gap() -> None:
    """The log holds them as null."""
    for names, first in (({"final_eval_loss"}, STEPS), ({"eval_loss", "final_eval_loss"}, 0)):
        given = planted()
        log = [{key: None if key in names else value for key, value in entry.items()} for entry in given.log]
        found = training_document(dataclasses.replace(given, log=log))
        (finding,) = [f for f in found.sections[0].findings if f.key == "held-out"]
        assert (finding.severity, finding.advice.split(":")[0]) == (
            "warning",
            "Training has diverged, or a row overflows",
        )
        assert f"not finite after update {first}" in finding.sentence
        page = render_document(found)
        assert page.count(f"not finite after update {first}") == 2  # among the key numbers, too
        assert "No row was held out" not in page


def test_the_page_in_a_browser_is_complete_quiet_and_harmless(browser: Any, tmp_path: Path) -> None:
    write_document(training_document(planted(hostile=True)), tmp_path / "report.html")
    seen = open_page(browser, tmp_path / "report.html", scheme="dark", width=360)
    assert seen.page.locator("[data-figure]").count() == 8
    check_widths(seen.page, (360, 1280))
    assert seen.page.evaluate("window.owned") is None
    seen.page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert seen.page.locator("#rows details.row .text").first.is_visible()
    order = "[...document.querySelectorAll('main section')].map(part => part.id)"
    assert seen.page.evaluate(order) == [
        *("believe", "forecasts", "loss", "choices", "sources", "fate", "rows", "cost", "repeat")
    ]
    seen.page.close()
    assert seen.complaints == []


def test_folders_of_other_kinds_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match="holds neither a training run"):
        write_report(tmp_path)
    (tmp_path / "scores.parquet").touch()
    with pytest.raises(InvalidInput, match=r"is of a selection.*tamis select --config .*run.yaml --report"):
        write_report(tmp_path)
    (tmp_path / "report.html").write_text("the page")
    assert run(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "report.html")}
    assert (tmp_path / "report.html").read_text() == "the page"
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "other.html"), "--quiet"]) == 0
    assert (tmp_path / "other.html").read_text() == "the page"
    with pytest.raises(InvalidInput, match="pass an --out file that can be written"):
        write_report(tmp_path, out=tmp_path)
