"""All runs that a comparison asks for, and making those that are missing, each rank its share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from tamis.budget import describe_budget, parse_budget
from tamis.comparison.cells import Cell, Price, make_cell, updates_at_cost, updates_for
from tamis.comparison.contenders import SUBSETS, Contender
from tamis.comparison.records import Records, Run
from tamis.corpus import Corpus
from tamis.model.load import ModelSettings, model_fingerprint
from tamis.model.processes import barrier, rank, world_size
from tamis.notation import candidates_parts
from tamis.protocols import Progress
from tamis.runs.compare_selections import Chosen, PoolTable
from tamis.runs.compare_training import TrainingBench, training_settings
from tamis.seeds import child_seed, random_subset
from tamis.settings import CompareSettings
from tamis.types import IntArray

__all__ = ["Grid", "common_spec", "make_missing", "share_out"]

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Contenders x budgets x seeds."""

    settings: CompareSettings
    contenders: Sequence[Contender]
    chosen: Mapping[tuple[str, str], Chosen]  # (contender, budget)
    table: PoolTable
    pool: Corpus
    price: Price
    common: Mapping[str, Any]  # what determines every run: model, data, libraries
    target: str  # identity of the target's content, which online methods look at

    def steps(self, budget: str) -> int:
        """Updates of every contender but those at equal cost."""
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        return updates_for(
            budget,
            rows=len(self.pool),
            tokens=int(self.pool.lengths.sum()),
            epochs=settings.epochs,
            update_rows=settings.update_rows,
        )

    def cells(self, contender: Contender, budget: str) -> list[Cell]:
        """Its runs at a budget, by seed. Not for runs at equal cost, which ``matched_cells`` gives."""
        return [self._cell(contender, budget, self.settings.seed + draw) for draw in self._draws(contender)]

    def matched_cells(self, contender: Contender, budget: str, runs: Sequence[Run]) -> list[Cell]:
        """``full`` for as many updates as cost what the method's own ``runs`` and its selection did, seed by seed.

        Empty if that is as many as the method makes itself, at every seed: then plain ``full`` is its equal.
        """
        chosen = self.chosen.get((contender.of, budget))
        cells = []
        for run in runs:
            steps = updates_at_cost(
                run.tflops + (chosen.tflops if chosen is not None else 0.0),
                self.price,
                self.pool,
                self.table.all_rows(),
                training_settings(self.settings, steps=1),
                seed=run.seed,
            )
            cells.append(self._make(contender, budget, run.seed, steps, rows=self.table.all_rows()))
        return [] if all(cell.steps == run.steps for cell, run in zip(cells, runs, strict=True)) else cells

    def subset_cells(self) -> tuple[list[Cell], list[IntArray]]:
        """Runs on random parts of the pool, all with one start and order, and the rows of each."""
        settings, rows = self.settings, self.table.all_rows()
        count = max(1, round(settings.subset_share * len(rows)))
        budget = describe_budget(parse_budget(count))
        contender = Contender(name=SUBSETS, kind="subset", is_baseline=True)
        drawn = [
            rows[random_subset(child_seed(settings.seed, "part of the pool", draw), len(rows), count)]
            for draw in range(settings.subsets)
        ]
        steps = self.steps(budget)
        return [self._make(contender, budget, settings.seed, steps, rows=own) for own in drawn], drawn

    def _draws(self, contender: Contender) -> range:
        return range(contender.draws(self.settings.seeds))

    def _cell(self, contender: Contender, budget: str, seed: int) -> Cell:
        steps = self.steps(budget)
        if contender.kind == "untouched":
            return self._make(contender, budget, seed, 0, rows=None)
        if contender.kind == "online":
            return self._make(contender, budget, seed, steps, rows=None, online=self._online(contender))
        if contender.kind == "selected":
            rows = self.chosen[contender.name, budget].rows
        elif contender.kind == "uniform":
            rows = self.table.uniform(budget, seed=seed)
        elif contender.kind == "same-sources":
            rows = self.table.same_sources(self.chosen[contender.of, budget].rows, seed=seed)
        else:
            rows = self.table.all_rows()
        return self._make(contender, budget, seed, steps, rows=rows)

    def _make(self, contender: Contender, budget: str, seed: int, steps: int, **more: Any) -> Cell:
        return make_cell(contender, budget=budget, seed=seed, steps=steps, common=self.common, **more)

    def _online(self, contender: Contender) -> dict[str, Any]:
        assert contender.text is not None
        scored = contender.text.candidates
        kind, proxy = candidates_parts(scored)
        return {
            **({} if scored == "exact" else {"candidates": scored}),
            **({"proxy": _content_of(proxy)} if kind == "proxy" else {}),
            "method": contender.text.method,
            "set": self.settings.own_settings(contender.name),
            "oversample": self.settings.oversample,
            "target": self.target,
            "drop_leaks": self.settings.drop_leaks,
            "processes": world_size(),
        }


@lru_cache
def _content_of(model: str) -> str:
    return model_fingerprint(ModelSettings(name=model))


def common_spec(settings: CompareSettings, **content: Any) -> dict[str, Any]:
    """What determines every run of a comparison alike; ``content`` is what model and files hold."""
    training = asdict(training_settings(settings, steps=1))
    for name in ("steps", "epochs", "save_steps", "batch_tokens"):  # a run's own, or without effect
        del training[name]
    lora = {name: getattr(settings, name) for name in ("lora_rank", "lora_alpha")}
    asked = {"pattern": settings.answer_pattern, "tokens": settings.answer_tokens}
    return {
        "algorithm": "compare-v2",
        "training": training,
        "tune": settings.tune,
        **lora,
        "lora_targets": list(settings.lora_targets),
        "answers": asked if settings.metric == "exact-match" else None,
        **content,
    }


def share_out(cells: Sequence[Cell], *, rank: int, ranks: int) -> tuple[list[Cell], list[Cell]]:
    """Runs that all ranks make together, and those that this one makes alone, longest first.

    Every rank works out the same shares, whatever the order in which it was told of the cells.
    """
    together = sorted((cell for cell in cells if cell.contender.kind == "online"), key=lambda cell: cell.key)
    apart = sorted((c for c in cells if c.contender.kind != "online"), key=lambda c: (-c.steps, c.key))
    return together, apart[rank::ranks]


def make_missing(bench: TrainingBench, cells: Sequence[Cell], records: Records, *, progress: Progress) -> None:
    """Make the runs that have no record yet, and return when all have one. All ranks call this together.

    Runs are shared out by ``share_out``; online methods train over all ranks at once.
    """
    distinct = list({cell.key: cell for cell in cells}.values())
    missing = [cell for cell in distinct if not records.has(cell.key)]
    barrier()  # nobody writes before everybody has looked, or the ranks would share out different lists
    together, own = share_out(missing, rank=rank(), ranks=world_size())
    done = sum(cell.steps for cell in distinct) - sum(cell.steps for cell in missing)
    total = done + sum(cell.steps for cell in (*together, *own))
    with progress.stage("train and measure", total, "updates") as advance:
        if done:
            advance(done)
        for cell in (*together, *own):
            found = bench.run(cell, advance)
            if found is not None:
                records.write(found)
                bench.clean(cell)
    for cell in distinct:
        # No barrier: the runs of another rank may take longer than the time-out of a process group.
        while not records.has(cell.key):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    barrier()
    if rank() == 0:
        for cell in distinct:
            bench.clean(cell)
