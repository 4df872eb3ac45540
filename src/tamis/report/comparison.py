"""The page of a comparison, computed from its result: the verdict first, every number traceable to its records."""

from __future__ import annotations

from collections.abc import Sequence

from tamis.comparison.result import CompareResult
from tamis.comparison.verdict import Difference, Standing
from tamis.report.comparison_figures import cost_figure, curve_figures, gain_figure, run_figure
from tamis.report.comparison_tables import cost_table, foretold_table, standings_table, task_tables, tests_table
from tamis.report.conclude import mean_text, p_text
from tamis.report.document import Document, KeyNumber, Section, Table
from tamis.report.finding import Finding, Severity
from tamis.report.provenance import provenance
from tamis.report.wording import count, counted, number, one_line, percent

__all__ = ["comparison_document"]

FOOTER = (
    "Made by tamis from files beside this page: records/ has every run, results.csv one line of each, rows.parquet the "
    "loss of every held-out row, verdict.json these numbers. This page fetches nothing and sends nothing."
)


def comparison_document(result: CompareResult) -> Document:
    """All that the page shows."""
    here = result.at(result.budget)
    differences = [difference for difference in result.differences if difference.budget == result.budget]
    at_cost = [difference for difference in differences if difference.against == "full at equal cost"]
    sections = [
        Section(
            key="believe",
            title="Should you believe it?",
            short_title="Believe it?",
            paragraphs=("Differences of the best method named, the hardest opponent first; then what to mind.",),
            findings=_findings(result, here, differences),
            next_steps=tuple(one_line(step, 400) for step in result.conclusion.next_steps),
        ),
        Section(
            key="standings",
            title="All contenders",
            short_title="Contenders",
            paragraphs=(_protocol(result, here),),
            figures=(run_figure(here, result.metric),),
            tables=(standings_table(here, result), *task_tables(here, result)),
        ),
        Section(
            key="tests",
            title="Could it be chance?",
            short_title="Chance",
            paragraphs=(
                "Two questions, two tests. Over seeds: would another draw, start and order of rows say the same? Over "
                "held-out rows: would other rows of the task? Both are paired t-tests, and both p-values are adjusted "
                "for all tests of the table (Holm). A difference counts only if both are below 0.05.",
            ),
            tables=(tests_table(differences),),
            remarks=_remarks_on_tests(differences),
        ),
        Section(
            key="cost",
            title="What it cost",
            short_title="Cost",
            paragraphs=(
                "Selecting counts in full with every run, though all runs of a method share one selection; so does "
                "what several methods share in the store. Online methods pay for it in every run. "
                "Baselines without a model pass cost their training only.",
            ),
            figures=(cost_figure(here),),
            tables=(cost_table(here),),
        ),
    ]
    curves = curve_figures(result)
    if curves:
        others = [budget for budget in dict.fromkeys(s.budget for s in result.standings) if budget != result.budget]
        sections.insert(
            2,
            Section(
                key="curves",
                title="What more rows bring",
                short_title="Budgets",
                figures=curves,
                tables=tuple(standings_table(result.at(budget), result, folded=True) for budget in others),
            ),
        )
    if result.foretold:
        sections.append(_foretold_section(result))
    sections += [_selections_section(result), _runs_section(result)]
    if at_cost:
        sections.insert(
            0,
            Section(
                key="verdict",
                title="At equal cost",
                short_title="Verdict",
                paragraphs=(
                    "The opponent that matters: the same model trained on the whole pool, for as many updates as the "
                    "selection and its own training cost together (plain full where that is as many as all make).",
                ),
                figures=(gain_figure(at_cost, result.metric),),
            ),
        )
    return Document(
        eyebrow="tamis: does selecting pay?",
        title=result.conclusion.title,
        lede=result.conclusion.sentence,
        numbers=_numbers(result, here, at_cost),
        sections=tuple(sections),
        repeat="Runs that are finished are kept: more seeds, methods or budgets behind the command add to them.",
        command=one_line(str(result.manifest.get("command", "")), 2000),
        provenance=provenance(result.manifest, without=("records",)),
        footer=FOOTER,
    )


def _numbers(result: CompareResult, here: Sequence[Standing], at_cost: Sequence[Difference]) -> tuple[KeyNumber, ...]:
    best = next((standing for standing in here if not standing.is_baseline), here[0])
    key = next((difference for difference in at_cost if difference.contender == best.name), None)
    numbers = [
        KeyNumber(
            value=mean_text(best), label=f"{result.metric} of {one_line(best.name, 40)}", detail="best method named"
        )
    ]
    if key is not None:
        opponent = result.standing(key.opponent)
        assert opponent is not None
        numbers += [
            KeyNumber(value=mean_text(opponent), label="full at equal cost", detail=counted(opponent.steps, "update")),
            KeyNumber(
                value=p_text(key.p), label="p of the difference", detail="the larger of seeds and rows, adjusted"
            ),
        ]
    numbers.append(
        KeyNumber(
            value=percent(best.select_tflops / best.tflops if best.tflops else 0.0),
            label="of the cost is selecting",
            detail=f"{number(best.select_tflops, 3)} of {number(best.tflops, 3)} TFLOPs",
        )
    )
    return tuple(numbers)


def _findings(
    result: CompareResult, here: Sequence[Standing], differences: Sequence[Difference]
) -> tuple[Finding, ...]:
    best = next((standing for standing in here if not standing.is_baseline), None)
    found = []
    for index, difference in enumerate(d for d in differences if best is not None and d.contender == best.name):
        severity: Severity = "open"
        verdict = "chance could explain the difference"
        if difference.p is None:
            verdict = "a single run or row cannot exclude chance"
        elif difference.is_sure:
            severity, verdict = ("passed", "better") if difference.gain > 0 else ("warning", "worse")
        opponent = result.standing(difference.opponent)
        shown = "" if opponent is None else f" ({mean_text(opponent)})"
        runs = difference.over_seeds.n
        if opponent is not None and len(opponent.values) > runs:  # uniform has more draws than the method has seeds
            same = "draw of the same seed" if runs == 1 else f"{runs} draws of the same seeds"
            shown = f" (of its {len(opponent.values)} draws, {mean_text(opponent)}, the {same})"
        found.append(
            Finding(
                key=f"difference-{index}",
                severity=severity,
                title=f"Against {difference.against}: {verdict}",
                sentence=f"{one_line(difference.contender, 60)} {'loses' if difference.gain < 0 else 'gains'} "
                f"{_size(difference)} against {one_line(difference.opponent, 80)}{shown}; p = "
                f"{p_text(difference.seeds_p)} over {counted(difference.over_seeds.n, 'seed')}, "
                f"{p_text(difference.rows_p)} over {counted(difference.over_rows.n, 'held-out row')}.",
            )
        )
    names = {standing.name for standing in here}
    for index, sentence in enumerate(result.conclusion.warnings):
        name, colon, rest = sentence.partition(": ")  # a remark on one contender begins with its name
        about = name if colon and name in names else ""
        title = f"Mind this of {one_line(about, 60)}" if about else "Mind this"
        said = one_line(rest if about else sentence, 600)
        found.append(Finding(key=f"mind-{index}", severity="warning", title=title, sentence=said))
    return tuple(found)


def _size(difference: Difference) -> str:
    relative = "" if difference.relative is None else f" ({percent(abs(difference.relative))})"
    return f"{number(abs(difference.gain), 3)}{relative}"


def _protocol(result: CompareResult, here: Sequence[Standing]) -> str:
    usual = next((s for s in here if s.kind == "uniform"), here[0])
    return (
        f"Every contender trains the same model for {counted(usual.steps, 'update')}, full at equal cost apart, and is "
        f"measured on the same {counted(result.held_out_rows, 'held-out row')}. Seeds set adapter starts and the "
        "order of rows; uniform and the draw from the chosen sources also redraw their rows."
    )


def _remarks_on_tests(differences: Sequence[Difference]) -> tuple[str, ...]:
    remarks = [
        "A positive gain is in the method's favour. Seeds repeat training, not the selection of a method, which was "
        "made once."
    ]
    if any(d.over_seeds.n < 3 for d in differences):
        remarks.append("Tests over fewer than three seeds have next to no power; give --seeds 5.")
    return tuple(remarks)


def _foretold_section(result: CompareResult) -> Section:
    return Section(
        key="foretold",
        title="Do the scores predict the loss?",
        short_title="Foretold",
        paragraphs=(
            f"The same model was trained on {count(result.foretold[0].parts)} random parts of the pool. The linear "
            "datamodelling score is the rank correlation between the sum of a part's scores and how low its held-out "
            "loss came: 1 predicts the order of all parts, 0 is chance. The interval is over parts.",
        ),
        tables=(foretold_table(result.foretold),),
    )


def _selections_section(result: CompareResult) -> Section:
    named = {standing.name for standing in result.standings if not standing.is_baseline}
    remarks = [
        f"{facts.name} at {facts.budget}: {one_line(warning, 400)}"
        for facts in result.selections
        if facts.name in named
        for warning in facts.warnings
    ]
    return Section(
        key="selections",
        title="Selections",
        paragraphs=("Each has a report of its own in its folder; what those of methods named warn of stands beneath.",),
        tables=(
            Table(
                label="Selections",
                heads=("method", "budget", "rows", "largest source", "folder"),
                words=("largest source", "folder"),
                rows=tuple(
                    (
                        one_line(f.name, 60),
                        f.budget,
                        count(f.rows),
                        f"{one_line(f.largest_source, 40)}, {percent(f.largest_share)}",
                        one_line(f.folder, 160),
                    )
                    for f in result.selections
                ),
            ),
        ),
        remarks=tuple(remarks),
    )


def _runs_section(result: CompareResult) -> Section:
    rows = tuple(
        (one_line(key, 120), one_line(s.name, 60), s.budget, number(value, 6))
        for s in result.standings
        for key, value in zip(s.keys, s.values, strict=True)
    )
    return Section(
        key="runs",
        title="Every run",
        short_title="Runs",
        paragraphs=("A record holds the run's settings, cost and the loss of every held-out row: records/NAME.json.",),
        tables=(
            Table(
                label="Records",
                heads=("record", "contender", "budget", result.metric),
                words=("contender",),
                rows=rows,
                folded=True,
            ),
        ),
    )
