"""A comparison from top to bottom: claim, read, select, train and measure every cell, test, write.

Called again after an interruption it goes on: selections are found in their folders and finished runs in their records.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from tamis.budget import parse_budget, rows_for
from tamis.comparison.benchmarks import open_benchmarks
from tamis.comparison.cells import Cell, Price
from tamis.comparison.contenders import Contender, contenders_of
from tamis.comparison.datamodel import Foretold, foretell
from tamis.comparison.records import Records, Run, write_rows, write_runs
from tamis.comparison.result import CompareResult, SelectionFacts, largest_source
from tamis.comparison.verdict import compare_pairs, standings_of
from tamis.config import write_config
from tamis.corpora import Rendered, Sources, leaked_rows, model_settings, read_sources, render_corpora, write_skipped
from tamis.data.examples import Examples, read_examples
from tamis.data.rows import Rows
from tamis.disk import check_writable
from tamis.errors import InvalidSettings
from tamis.model.flops import ModelShape, TrainedMatrices
from tamis.model.limits import skeleton
from tamis.model.load import model_fingerprint, resolved_dtype, template_sha256
from tamis.model.processes import barrier, is_main
from tamis.notation import target_parts
from tamis.progress import NoProgress
from tamis.protocols import Progress
from tamis.report.comparison import comparison_document
from tamis.report.conclude import conclude
from tamis.report.document import write_document
from tamis.report.wording import counted
from tamis.runs.compare_grid import Grid, common_spec, make_missing
from tamis.runs.compare_halves import half_files, halves_of, said_of_halves, write_halves
from tamis.runs.compare_selections import Chosen, PoolTable, select_rows
from tamis.runs.compare_training import TrainingBench
from tamis.runs.manifest import TRAINER, base_identity
from tamis.runs.outputs import check_claim, claim_folder, write_json
from tamis.runs.planted import PlantedResult, planted_from_settings
from tamis.runs.train_rows import check_candidates
from tamis.runs.train_setup import LORA_RANK, check_device, check_proxy_vocabulary, check_tuning, method_and_step
from tamis.settings import SelectSettings, TrainRunSettings
from tamis.settings.compare import CompareSettings, method_parts
from tamis.training.lora import add_lora
from tamis.values import to_dict
from tamis.versions import versions

__all__ = ["CompareResult", "PlantedResult", "compare_from_settings"]

logger = logging.getLogger(__name__)


def compare_from_settings(
    settings: CompareSettings,
    *,
    progress: Progress | None = None,
    held: Mapping[str, Rows] | None = None,
) -> CompareResult | PlantedResult:
    """The comparison that ``settings`` describe; see ``tamis.compare``. ``held`` has the rows in memory they name."""
    held, progress = held or {}, progress or NoProgress()
    if settings.planted:
        return planted_from_settings(settings, progress=progress, held=held)
    out = Path(settings.out)
    if is_main():  # what takes no time is tried before files are read and weights are hashed
        check_writable(out)
    run = settings.train_settings(out=settings.out, steps=1, seed=settings.seed)
    resolved_dtype(model_settings(run))  # refuses a device that is not there
    online = []
    for text in settings.contenders:
        if text.is_online:  # only these train with the Trainer
            check_device(run)
            asked_for = settings.train_settings(out=settings.out, steps=1, seed=settings.seed, online=text)
            check_proxy_vocabulary(asked_for)
            online.append(method_and_step(asked_for))
    check_tuning(run)
    price = _price_of(run)  # refuses layers that take no adapter
    benchmarks = open_benchmarks(
        settings.tasks, folder=settings.task_folder, limit=settings.task_limit, shots=settings.task_shots
    )
    model = model_fingerprint(model_settings(run))
    asked = settings
    measured = _measured_in_place_of_target(settings)
    sources = read_sources(measured, held)
    _refuse_equal_budgets(settings.all_budgets, num_rows=len(sources.pool))
    target = _read_target(settings, held) if settings.eval else sources.target
    halves = None if settings.eval else halves_of(sources, seed=settings.seed)
    template = template_sha256(settings.chat_template)
    # Of the Trainer too where no contender is online yet: one may be added to a finished comparison.
    content = base_identity(model=model, chat_template=template, libraries=TRAINER)
    identity = {
        **content,
        "data": {
            "pool": sources.pool.identity,
            "target": target.identity,
            "eval": sources.target.identity if halves is None else {"half of the target, by seed": settings.seed},
        },
    }
    if is_main():
        claim_folder(out, identity)
        write_config("compare", asked, out / "run.yaml", held=list(held))
    barrier()
    if halves is not None:
        folder = out / "halves"
        if is_main():
            write_halves(folder, sources.target, halves)
        barrier()
        targets, held_out = half_files(folder, halves)
        settings = replace(settings, target=targets, eval=held_out)
        target, measured = _read_target(settings, held), _measured_in_place_of_target(settings)
        sources = replace(sources, target=_read_target(replace(settings, target=settings.eval), held))
        sources = replace(sources, target_group=np.array(sources.target.named_by)[sources.target.file_index])

    rendered = render_corpora(sources, measured, store=_store(settings), progress=progress)
    if halves is not None:
        rendered = replace(rendered, warnings=(*rendered.warnings, said_of_halves(halves)))
    if is_main():
        write_skipped(out / "skipped.jsonl", rendered.skipped)
    usable = np.flatnonzero(rendered.pool.usable)
    for method, step_settings in online:
        check_candidates(rendered.pool.examples.sources_of(usable), method, step_settings)
    contenders = contenders_of(settings)
    chosen = _select_all(settings, contenders, progress, held)
    any_table = chosen["bm25", settings.budget].table
    grid = Grid(
        settings=settings,
        contenders=contenders,
        chosen=chosen,
        table=PoolTable.of(any_table, settings),
        pool=rendered.pool,
        price=price,
        common=common_spec(
            settings,
            **content,
            dtype=resolved_dtype(model_settings(run)),
            attention=settings.attention,
            pool=rendered.pool.identity,
            eval=rendered.target.identity,
            tasks=None if benchmarks is None else benchmarks.identity,
        ),
        target=target.identity["content"],
    )
    bench = TrainingBench(
        settings=settings,
        rendered=rendered,
        held_out=rendered.target_rows,
        price=grid.price,
        held=held,
        benchmarks=benchmarks,
    )
    records = Records(out / "records")
    cells = _train_all(grid, bench, records, progress)
    runs = {key: [records.read(cell.key) for cell in own] for key, own in cells.items()}
    foretold, parts = _foretell(grid, bench, records, progress)
    result = _result(settings, grid, rendered, sources, target.digests, runs, foretold, identity, held)
    result = replace(result, manifest={**result.manifest, "settings": to_dict(asked)})
    if is_main():
        check_claim(out, identity)
        _write(result, rendered, [*_distinct(runs), *parts])
    barrier()
    return result


def _refuse_equal_budgets(budgets: Sequence[str], *, num_rows: int) -> None:
    """Budgets that come to the same rows would be trained twice, and make a curve of one point."""
    seen: dict[int, str] = {}
    for budget in budgets:
        asked = parse_budget(budget)
        if asked.kind == "tokens":
            continue
        rows = rows_for(asked, num_rows)
        if rows in seen:
            raise InvalidSettings(
                f"the budgets {seen[rows]} and {budget} are both {rows} of the pool's {num_rows} rows; leave one out"
            )
        seen[rows] = budget


def _price_of(run: TrainRunSettings) -> Price:
    """What training costs: of the model with the adapter that its runs put on it."""
    model = skeleton(model_settings(run))
    if run.tune == "lora" and not isinstance(model, PeftModel):
        model = add_lora(model, rank=run.lora_rank or LORA_RANK, alpha=1.0, seed=0, targets=run.lora_targets)
    return Price(shape=ModelShape.from_model(model), trained=TrainedMatrices.of(model))


def _measured_in_place_of_target(settings: CompareSettings) -> SelectSettings:
    """Held-out rows are read, checked and rendered like target rows; without any, the target's are divided later."""
    plain = settings.select_settings(method_parts("uniform"), budget=settings.budget, out=settings.out)
    return replace(plain, target=settings.eval or settings.target)


def _read_target(settings: CompareSettings, held: Mapping[str, Rows]) -> Examples:
    return read_examples(
        [path for _, path in map(target_parts, settings.target)],
        row_format=settings.row_format,
        on_bad_row=settings.on_bad_row,
        held=held,
    )


def _store(settings: CompareSettings) -> Path:
    return Path(settings.store) if settings.store else Path(settings.out) / "store"


def _select_all(
    settings: CompareSettings, contenders: Sequence[Contender], progress: Progress, held: Mapping[str, Rows]
) -> dict[tuple[str, str], Chosen]:
    """The selection of every method at every budget, from one store of features.

    Methods that see the whole pool come first, so that those behind a shortlist find their rows' features in the store.
    """
    texts = {c.name: c.text for c in contenders if c.kind == "selected" and c.text is not None}
    made = {
        (name, budget): select_rows(settings, texts[name], budget, progress=progress, held=held)
        for name in sorted(texts, key=lambda name: texts[name].shortlist is not None)
        for budget in settings.all_budgets
    }
    return {(name, budget): made[name, budget] for name in texts for budget in settings.all_budgets}


def _train_all(
    grid: Grid, bench: TrainingBench, records: Records, progress: Progress
) -> dict[tuple[str, str], list[Cell]]:
    """Every run; first those known from the start, then those whose length follows from what others cost."""
    cells = {
        (contender.name, budget): grid.cells(contender, budget)
        for budget in grid.settings.all_budgets
        for contender in grid.contenders
        if contender.kind != "equal-cost"
    }
    make_missing(bench, [cell for own in cells.values() for cell in own], records, progress=progress)
    matched = {}
    for budget in grid.settings.all_budgets:
        for contender in grid.contenders:
            if contender.kind == "equal-cost":
                runs = [records.read(cell.key) for cell in cells[contender.of, budget]]
                found = grid.matched_cells(contender, budget, runs)
                if found:
                    matched[contender.name, budget] = found
                    logger.info(
                        "%s, budget %s: %d updates, for the %d of %s and its selection",
                        *(contender.name, budget, found[0].steps, runs[0].steps, contender.of),
                    )
    make_missing(bench, [cell for own in matched.values() for cell in own], records, progress=progress)
    return {**matched, **cells}


def _foretell(
    grid: Grid, bench: TrainingBench, records: Records, progress: Progress
) -> tuple[tuple[Foretold, ...], list[Run]]:
    """The linear datamodelling score of every method that selects, and the runs that it comes from."""
    cells, parts = grid.subset_cells()
    if not cells:
        return (), []
    make_missing(bench, cells, records, progress=progress)
    runs = [records.read(cell.key) for cell in cells]
    losses, seed = [run.loss for run in runs], grid.settings.seed
    found = []
    for (name, budget), chosen in grid.chosen.items():
        if budget == grid.settings.budget:  # a method's scores are the same at every budget
            score = np.asarray(chosen.table["score"].to_numpy(zero_copy_only=False), dtype=np.float64)
            found.append(foretell(name, score, parts, losses, seed=seed))
    return tuple(found), runs


def _result(
    settings: CompareSettings,
    grid: Grid,
    rendered: Rendered,
    sources: Sources,
    target_digests: Sequence[str],
    runs: Mapping[tuple[str, str], Sequence[Run]],
    foretold: tuple[Foretold, ...],
    identity: Mapping[str, Any],
    held: Mapping[str, Rows],
) -> CompareResult:
    by_name = {contender.name: contender for contender in grid.contenders}
    spent = {key: (chosen.tflops, chosen.seconds) for key, chosen in grid.chosen.items()}
    task_of = [sources.target_names[group] for group in rendered.target_group]
    standings = standings_of(runs, by_name, spent, metric=settings.metric, task_of=task_of)
    _, content_of = np.unique([sources.target.digests[row] for row in rendered.target_rows], return_inverse=True)
    differences = [
        difference
        for budget in settings.all_budgets
        for difference in compare_pairs(
            runs, grid.contenders, budget=budget, metric=settings.metric, content_of=content_of
        )
    ]
    selections = tuple(_facts(name, budget, chosen, grid.table) for (name, budget), chosen in grid.chosen.items())
    conclusion = conclude(
        standings,
        differences,
        selections,
        budget=settings.budget,
        metric=settings.metric,
        seeds=settings.seeds,
        held_out_rows=len(rendered.target_rows),
        warnings=[
            *rendered.warnings,
            *_contamination(rendered, sources, target_digests),
            *_of_runs(_distinct(runs), known=rendered.warnings),
        ],
    )
    command = f"tamis compare --config {Path(settings.out) / 'run.yaml'}"
    manifest = {
        **identity,
        "command": command if not held else "tamis.compare(...) in Python with the same rows",
        "versions": versions(),
        "updates": {budget: grid.steps(budget) for budget in settings.all_budgets},
        "records": {f"{name} at {budget}": [run.key for run in own] for (name, budget), own in runs.items()},
        "cost": {
            "selection_seconds": sum(chosen.seconds for chosen in grid.chosen.values()),
            "training_seconds": sum(run.train_seconds for run in _distinct(runs)),
            "measuring_seconds": sum(run.measure_seconds for run in _distinct(runs)),
        },
    }
    return CompareResult(
        out=Path(settings.out),
        metric=settings.metric,
        budget=settings.budget,
        seeds=settings.seeds,
        held_out_rows=len(rendered.target_rows),
        tasks=sources.target_names,
        standings=tuple(standings),
        differences=tuple(differences),
        selections=selections,
        foretold=foretold,
        conclusion=conclusion,
        manifest=manifest,
    )


def _facts(name: str, budget: str, chosen: Chosen, table: PoolTable) -> SelectionFacts:
    source, share = largest_source([str(source) for source in table.source[chosen.rows]])
    usable = table.source[table.usable]
    return SelectionFacts(
        name=name,
        budget=budget,
        folder=str(chosen.folder),
        rows=len(chosen.rows),
        largest_source=source,
        largest_share=share,
        pool_rows=len(usable),
        pool_share=float(np.mean([str(name) == source for name in usable])),
        warnings=chosen.warnings,
    )


def _contamination(rendered: Rendered, sources: Sources, target_digests: Sequence[str]) -> list[str]:
    """What flatters the measurement."""
    found = []
    leaked = int((rendered.pool.usable & leaked_rows(sources)).sum())
    if leaked:
        found.append(
            f"The pool has {counted(leaked, 'row')} whose text or prompt is held out, too: what trains on such rows is "
            "flattered. Remove them from the pool."
        )
    digests = [sources.target.digests[row] for row in rendered.target_rows]
    shared = len(set(digests) & set(target_digests))
    if shared:
        found.append(
            f"The target has {counted(shared, 'held-out row')}, too: methods see what measures them. Remove them there."
        )
    copies = len(digests) - len(set(digests))
    if copies:
        found.append(
            f"Exact copies of other held-out rows: {copies}. Means count every one, tests over rows each text once."
        )
    return found


def _of_runs(runs: Sequence[Run], *, known: Sequence[str]) -> list[str]:
    """What runs warn of, each with the contender's name, without what is known of the data anyway."""
    return list(dict.fromkeys(f"{run.contender}: {said}" for run in runs for said in run.warnings if said not in known))


def _distinct(runs: Mapping[tuple[str, str], Sequence[Run]]) -> list[Run]:
    return list({run.key: run for own in runs.values() for run in own}.values())


def _write(result: CompareResult, rendered: Rendered, runs: Sequence[Run]) -> None:
    out = result.out
    write_runs(out / "results.csv", runs)
    names = np.asarray(result.tasks, dtype=object)[rendered.target_group]
    ids = [rendered.target.examples.ids[int(row)] for row in rendered.target_rows]
    write_rows(out / "rows.parquet", runs, tasks=[str(name) for name in names], ids=ids)
    write_json(out / "verdict.json", result.summary())
    write_document(comparison_document(result), out / "report.html")
    write_json(out / "manifest.json", result.manifest)  # last: its presence says that the comparison is complete
