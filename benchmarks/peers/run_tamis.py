"""The scoring stage of tamis, as ``tamis select --method tracin`` runs it: target pass, pool pass, and the store.

Variants: ``exact-dot`` and ``exact-cosine`` (``--projection none``, mean target), ``projected-cosine`` (the default),
and ``whole``: ``tamis.select`` from the files to the report with the default method, model loading included.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from worker import IGNORED, Clock, Rows, Run, inputs, serve

import tamis
from tamis.collect import Collecting, Task
from tamis.corpora import model_settings, read_corpora, read_sources
from tamis.corpus import Corpus
from tamis.progress import NoProgress
from tamis.settings import SelectSettings
from tamis.store.reader import StageReader
from tamis.types import IntArray, TokenizedExample

VARIANT, GIVEN = inputs()
METHODS = {
    "exact-dot": tamis.methods.TracIn(normalize="dot", projection="none"),
    "exact-cosine": tamis.methods.TracIn(projection="none"),
    "projected-cosine": tamis.methods.TracIn(),
}
EXACT = VARIANT.startswith("exact")
SETTINGS = SelectSettings(
    model=GIVEN["model"],
    pool=(GIVEN["pool_file"],),
    target=(GIVEN["target_file"],),
    max_length=GIVEN["max_length"],
    aggregate="mean" if EXACT else "round-robin",
    dtype="float32",
    device="cpu",
)


class TimedCorpus(Corpus):
    """The pool, noting when the first of its rows are read for a pass through the model: the target side is done."""

    clock: Clock

    def take(self, rows: IntArray) -> list[TokenizedExample]:
        self.clock.mark("target")
        return super().take(rows)


def check_same_tokens(corpus: Corpus, rows: Rows) -> None:
    """The other tools are given the very tokens and labels that tamis makes of the files."""
    for example, ids, labels in zip(corpus, rows.input_ids, rows.labels, strict=True):
        supervised = np.array(labels[1:]) != IGNORED
        if example.input_ids.tolist() != ids or not np.array_equal(example.supervised[1:], supervised):
            raise AssertionError("the rows handed to the other tools are not those that tamis scores")


def start() -> Run:
    store = Path(GIVEN["folder"]) / f"tokens-{VARIANT}"
    corpora = read_corpora(read_sources(SETTINGS), SETTINGS, store=store, progress=NoProgress())
    check_same_tokens(corpora.pool, Rows(**GIVEN["pool"]))
    check_same_tokens(corpora.target, Rows(**GIVEN["target"]))
    pool = TimedCorpus(corpora.pool.name, corpora.pool.examples, StageReader(corpora.pool.stage))
    task = Task(
        pool=pool,
        target=corpora.target,
        target_names=corpora.target_names,
        target_rows=corpora.target_rows,
        target_group=corpora.target_group,
        rows=np.arange(len(pool), dtype=np.int64),
        model_settings=model_settings(SETTINGS),
        collecting=Collecting(batch_tokens=GIVEN["batch_tokens"]),
        store=store,
        aggregate=SETTINGS.aggregate,
    )
    _ = task.loaded, task.fingerprint  # before the clock starts, as for every other tool

    def run(pool_rows: Rows, target_rows: Rows, folder: Path, clock: Clock) -> list[float]:
        count = len(target_rows)
        pool.clock = clock
        mine = replace(
            task,
            rows=task.rows[: len(pool_rows)],
            target_rows=task.target_rows[:count],
            target_group=task.target_group[:count],
            store=folder,
            notes=[],
            stages=[],
        )
        clock.start()
        scores = METHODS[VARIANT].score(mine)
        clock.mark("pool")
        return [float(score) for score in scores.values.mean(axis=1)]

    return run


def start_whole() -> Run:
    def run(pool_rows: Rows, target_rows: Rows, folder: Path, clock: Clock) -> list[float]:
        clock.start()
        clock.mark("target")
        selection = tamis.select(
            model=SETTINGS.model,
            pool=SETTINGS.pool,
            target=SETTINGS.target,
            method="tracin",
            budget="25%",
            out=folder / "out",
            batch_tokens=GIVEN["batch_tokens"],
            max_length=SETTINGS.max_length,
            dtype="float32",
            device="cpu",
        )
        clock.mark("pool")
        return [float(score) for score in selection.table["score"].to_pylist()]

    return run


if __name__ == "__main__":
    serve(start_whole if VARIANT == "whole" else start, GIVEN, ("tamis", "torch", "transformers"))
