"""One run of a comparison: open the model, train it on the given rows or by an online method, measure, record."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tamis.comparison.benchmarks import Benchmarks
from tamis.comparison.cells import Cell, Price, Seen, rows_seen_in, seen_rows
from tamis.comparison.measure import answer_of, held_out_losses, last_answer, written_answers
from tamis.comparison.records import Run
from tamis.corpora import Rendered, model_settings
from tamis.data.rows import Rows
from tamis.disk import make_folder, replace_atomically
from tamis.errors import NonFinite
from tamis.model.load import load_model, no_progress_bars
from tamis.model.processes import is_main
from tamis.online.fate import read_candidates
from tamis.progress import NoProgress
from tamis.runs.train import train_from_settings
from tamis.runs.train_setup import LEARNING_RATES, compute_dtype, open_model
from tamis.settings import CompareSettings
from tamis.training.loop import Spent, TrainSettings, fine_tune
from tamis.types import IntArray

__all__ = ["TrainingBench", "training_settings"]


def training_settings(settings: CompareSettings, *, steps: int) -> TrainSettings:
    """Of ``fine_tune``; the same for every contender but for the number of updates."""
    return TrainSettings(
        steps=steps,
        save_steps=settings.save_steps,
        update_rows=settings.update_rows,
        learning_rate=settings.learning_rate or LEARNING_RATES[settings.tune],
        lr_warmup_share=settings.warmup_share,
        weight_decay=settings.weight_decay,
        clip=settings.clip or None,
        batch_tokens=settings.batch_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingBench:
    """What every run needs: where things lie, the rows as tokens, and what an operation is reckoned as."""

    settings: CompareSettings
    rendered: Rendered  # the pool, and the held-out rows in place of a target
    held_out: IntArray  # rows of ``rendered.target``
    price: Price
    held: Mapping[str, Rows]
    benchmarks: Benchmarks | None = None

    def run(self, cell: Cell, advance: Callable[[int], None]) -> Run | None:
        """Make the run that ``cell`` describes; None from the ranks that only helped with it.

        Its checkpoints stay until ``clean``, which waits for the record: a kill between the two repeats no update.
        """
        if cell.contender.kind == "online":
            return self._online(cell, advance)
        folder = self._unfinished(cell)
        opened = self._open(cell.seed)
        clock = _Clock(folder)
        seen = Seen(rows=0, tokens=0, supervised_tokens=0, squared_tokens=0)
        if cell.rows is not None and cell.steps:
            training = training_settings(self.settings, steps=cell.steps)
            try:
                fine_tune(
                    opened.model,
                    self.rendered.pool,
                    cell.rows,
                    training,
                    seed=cell.seed,
                    folder=folder,
                    name_of=lambda row: self.rendered.pool.examples.ids[row],
                    advance=advance,
                    on_checkpoint=clock.add,
                )
            except NonFinite as error:
                raise NonFinite(f"{cell.contender.name}, seed {cell.seed}: {error}", rows=error.rows) from error
            rows = rows_seen_in(training, cell.rows, steps=cell.steps, seed=cell.seed)
            seen = seen_rows(self.rendered.pool, rows)
        return self._measured(
            cell,
            opened.model,
            opened.tokenizer,
            seen=seen,
            distinct=0 if cell.rows is None else min(len(cell.rows), seen.rows),
            tflops=self.price.tflops(seen),
            train_seconds=clock.total,
        )

    def clean(self, cell: Cell) -> None:
        """Remove the checkpoints of a recorded run, which nothing needs any more."""
        shutil.rmtree(Path(self.settings.out) / "unfinished" / cell.key, ignore_errors=True)

    def _unfinished(self, cell: Cell) -> Path | None:
        """Where checkpoints go; short runs write none and start anew."""
        if cell.rows is None or cell.steps <= self.settings.save_steps:
            return None
        return Path(self.settings.out) / "unfinished" / cell.key

    def _open(self, seed: int) -> Any:
        run = self.settings.train_settings(out=self.settings.out, steps=1, seed=seed)
        with no_progress_bars():
            return open_model(run, dtype=compute_dtype(run))

    def _online(self, cell: Cell, advance: Callable[[int], None]) -> Run | None:
        """All ranks train together, as ``tamis train`` does."""
        settings, out = self.settings, Path(self.settings.out) / "online" / cell.key
        run = settings.train_settings(out=str(out), steps=cell.steps, seed=cell.seed, online=cell.contender.text)
        result = train_from_settings(run, progress=NoProgress(), held=self.held)
        advance(cell.steps)
        if not is_main():
            return None
        stored = "float32" if settings.tune == "full" else settings.dtype
        place = replace(model_settings(run), name=str(result.model), revision=None, dtype=stored)
        with no_progress_bars():
            opened = load_model(place)
        cost, log = result.manifest["cost"], read_candidates(out / "candidates")
        trained_on = log["row"].to_numpy()[log["kept"].to_numpy()].astype(np.int64)
        found = self._measured(
            cell,
            opened.model,
            opened.tokenizer,
            seen=seen_rows(self.rendered.pool, trained_on),
            distinct=len(np.unique(trained_on)),
            tflops=float(cost["total_tflops"]),  # all candidates and target rows that it looked at among them
            choosing_tflops=float(cost["total_tflops"] - cost["tflops"]["update"]),
            train_seconds=float(cost["seconds"]),
            warnings=result.warnings,
        )
        for name in ("checkpoints", "store"):  # large; the log, the candidates and the model stay
            with contextlib.suppress(OSError):
                shutil.rmtree(out / name)
        return found

    def _measured(
        self,
        cell: Cell,
        model: Any,
        tokenizer: Any,
        *,
        seen: Seen,
        distinct: int,
        tflops: float,
        train_seconds: float,
        choosing_tflops: float = 0.0,
        warnings: tuple[str, ...] = (),
    ) -> Run:
        settings, corpus = self.settings, self.rendered.target
        started = time.perf_counter()
        losses = held_out_losses(model, corpus, self.held_out, batch_tokens=settings.batch_tokens)
        answers: list[str] = []
        matches: list[bool] = []
        if settings.metric == "exact-match":
            answers = written_answers(model, tokenizer, corpus, self.held_out, max_tokens=settings.answer_tokens)
            for text, example in zip(answers, corpus.take(self.held_out), strict=True):
                wanted = answer_of(last_answer(tokenizer, example), settings.answer_pattern)
                matches.append(bool(wanted) and answer_of(text, settings.answer_pattern) == wanted)
        tasks = {} if self.benchmarks is None else self.benchmarks.scores(model, tokenizer)
        return Run(
            key=cell.key,
            contender=cell.contender.name,
            budget=cell.budget,
            seed=cell.seed,
            steps=cell.steps,
            rows=distinct,
            seen_rows=seen.rows,
            tokens=seen.tokens,
            supervised_tokens=seen.supervised_tokens,
            tflops=tflops,
            choosing_tflops=choosing_tflops,
            train_seconds=round(train_seconds, 3),
            measure_seconds=round(time.perf_counter() - started, 3),
            loss=float(losses.mean()),
            exact_match=float(np.mean(matches)) if matches else None,
            row_losses=tuple(losses.tolist()),
            row_matches=tuple(matches),
            answers=tuple(answers),
            warnings=warnings,
            spec=cell.spec,
            tasks=tasks,
        )


class _Clock:
    """Seconds between checkpoints, kept beside them so that a resumed run knows what the killed one spent."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / "seconds.json"
        self._spent: dict[str, float] = {}
        if self._file is not None and self._file.is_file():
            with contextlib.suppress(ValueError):  # damaged: what was spent so far is not known
                self._spent = json.loads(self._file.read_text(encoding="utf-8"))

    def add(self, spent: Spent) -> None:
        """An interval has ended."""
        self._spent[str(spent.checkpoint)] = spent.elapsed_s
        if self._file is not None:
            make_folder(self._file.parent)  # its checkpoint is not there yet
            replace_atomically(self._file, (json.dumps(self._spent).encode(),))

    @property
    def total(self) -> float:
        """Of all intervals."""
        return sum(self._spent.values())
