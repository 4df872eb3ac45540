"""A task in memory for the tests of scorers: the parts of `tamis.collect.Task` they use, without store or files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamis.types import Batch, TokenizedExample
from tiny_models import random_batch


def random_tokens(lengths: Sequence[int], *, seed: int = 0) -> list[TokenizedExample]:
    """Rows of random ids, each with a random mask of at least one label."""
    batch = random_batch(lengths, seed=seed)
    return [
        TokenizedExample(
            input_ids=batch.input_ids[row, :length].numpy().astype(np.int32),
            supervised=batch.supervised[row, :length].numpy(),
            truncated=0,
        )
        for row, length in enumerate(lengths)
    ]


class FakeExamples:
    """Texts under the ids "row 0", "row 1", ..."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.ids = [f"row {i}" for i in range(len(texts))]
        self._texts = list(texts)

    def text(self, index: int) -> str:
        return self._texts[index]


class FakeCorpus:
    def __init__(self, name: str, tokens: Sequence[TokenizedExample], texts: Sequence[str] | None = None) -> None:
        self.name, self.identity, self._tokens = name, name, list(tokens)
        self.examples = FakeExamples(texts if texts is not None else [f"text {i}" for i in range(len(tokens))])
        self.lengths = np.array([len(t.input_ids) for t in tokens], np.int64)
        self.supervised = np.array([t.num_supervised for t in tokens], np.int64)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self._tokens[index]


class FakeReader:
    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self._columns = columns

    def read(self, name: str) -> np.ndarray:
        return self._columns[name].copy()

    def blocks(self, name: str, rows: int = 4096) -> Iterator[tuple[int, np.ndarray]]:
        whole = self.read(name)
        for start in range(0, len(whole), rows):
            yield start, whole[start : start + rows]


class FakeProgress:
    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        assert sum(done) == total, f"stage {name} said {sum(done)} of {total} {unit}"


@dataclass(kw_only=True)
class FakeTask:
    """Every row of the pool is scored against every target row unless told otherwise."""

    pool: FakeCorpus
    target: FakeCorpus
    store: Path
    model: nn.Module | None = None
    target_names: tuple[str, ...] = ("target",)
    target_rows: np.ndarray = field(default=None)  # type: ignore[assignment]  # filled below
    target_group: np.ndarray = field(default=None)  # type: ignore[assignment]
    rows: np.ndarray = field(default=None)  # type: ignore[assignment]
    seed: int = 0
    batch_rows: int = 3
    progress: FakeProgress = field(default_factory=FakeProgress)
    notes: list[str] = field(default_factory=list)
    stages_run: list[tuple[str, str]] = field(default_factory=list)  # (stage, corpus) that were computed, not reused
    _stored: dict[str, FakeReader] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.target_rows is None:
            self.target_rows = np.arange(len(self.target))
        if self.target_group is None:
            self.target_group = np.zeros(len(self.target_rows), np.int64)
        if self.rows is None:
            self.rows = np.arange(len(self.pool))

    @property
    def loaded(self) -> Any:
        assert self.model is not None, "this method must not need a model"
        return SimpleNamespace(model=self.model, device=torch.device("cpu"))

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def workdir(self, name: str, spec: Mapping[str, Any]) -> Path:
        folder = self.store / f"{name}-{abs(hash(repr(sorted(spec.items()))))}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def map_rows(
        self,
        corpus: FakeCorpus,
        rows: np.ndarray,
        *,
        name: str,
        spec: Mapping[str, Any],
        start: Callable[[], Callable[[Batch], Mapping[str, Tensor]]],
        work: str = "gradient",
        uses_model: bool = True,
        operations: Callable[[float, float, float, float], float] | None = None,
    ) -> FakeReader:
        """Rows in batches of ``batch_rows``, longest rows first, then back into the order of ``rows``."""
        key = repr((corpus.name, rows.tolist(), name, sorted(spec.items()), uses_model))
        if key not in self._stored:
            self.stages_run.append((name, corpus.name))
            compute, columns = start(), {}
            order = np.argsort(-corpus.lengths[rows], kind="stable")
            for first in range(0, len(rows), self.batch_rows):
                places = order[first : first + self.batch_rows]
                for column, values in compute(padded_batch(corpus, rows[places])).items():
                    assert len(values) == len(places)
                    columns.setdefault(column, []).append(values.detach())
            back = torch.from_numpy(np.argsort(order, kind="stable"))
            self._stored[key] = FakeReader({k: torch.cat(v)[back].numpy() for k, v in columns.items()})
        return self._stored[key]


def padded_batch(corpus: FakeCorpus, rows: np.ndarray) -> Batch:
    """The rows padded on the right to the longest."""
    tokens = [corpus[int(row)] for row in rows]
    width = max(len(t.input_ids) for t in tokens)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    supervised = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, t in enumerate(tokens):
        ids[place, : len(t.input_ids)] = torch.from_numpy(t.input_ids.astype(np.int64))
        mask[place, : len(t.input_ids)] = 1
        supervised[place, : len(t.input_ids)] = torch.from_numpy(t.supervised)
    return Batch(rows=torch.from_numpy(rows), input_ids=ids, attention_mask=mask, supervised=supervised)
