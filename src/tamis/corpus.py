"""Rows together with their tokens, rendered once into the store and read from there ever after."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from tamis.data.examples import Examples
from tamis.data.render import Renderer
from tamis.errors import BadRow
from tamis.protocols import Progress
from tamis.stages import finish, own_shards, record_cost
from tamis.store.reader import StageReader
from tamis.store.shards import Column
from tamis.store.writer import StageWriter
from tamis.types import IntArray, TokenizedExample

__all__ = ["Corpus", "tokenize"]

# Rows whose tokens are rendered together: only text work, so large shards cost nothing when a run is killed.
_TOKEN_SHARD_ROWS = 2048


class Corpus(Sequence[TokenizedExample]):
    """Rows of the pool or of the targets together with their tokens; ``corpus[i]`` is the tokenized row ``i``."""

    def __init__(self, name: str, examples: Examples, reader: StageReader) -> None:
        self.name = name
        self.examples = examples
        self._reader = reader
        self.lengths: IntArray = reader.read("length").astype(np.int64)
        self.supervised: IntArray = reader.read("supervised_tokens").astype(np.int64)
        self.truncated: IntArray = reader.read("truncated").astype(np.int64)
        self.dropped: npt.NDArray[np.bool_] = reader.read("dropped").astype(np.bool_)
        self.usable: npt.NDArray[np.bool_] = self.supervised > 0
        self.identity: str = reader.fingerprint
        self.stage: Path = reader.path  # where the tokens lie

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | Sequence[TokenizedExample]:
        """Tokens of one row (or of a slice of rows)."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.take(np.array([index]))[0]

    def take(self, rows: IntArray) -> list[TokenizedExample]:
        """Tokens of ``rows``, in that order."""
        ids = self._reader.take_ragged("input_ids", rows)
        masks = self._reader.take_ragged("supervised", rows)
        return [
            TokenizedExample(
                input_ids=i.astype(np.int32),
                supervised=m.astype(np.bool_),
                truncated=int(self.truncated[r]),
                dropped=bool(self.dropped[r]),
            )
            for i, m, r in zip(ids, masks, rows, strict=True)
        ]

    def sizes(self, rows: IntArray) -> dict[str, int]:
        """How many ``rows`` are, their tokens and supervised tokens, and the sum of their squared lengths."""
        lengths = self.lengths[rows]
        return {
            "rows": len(rows),
            "tokens": int(lengths.sum()),
            "supervised_tokens": int(self.supervised[rows].sum()),
            "squared_tokens": int((lengths**2).sum()),
        }

    def problems(self) -> dict[int, tuple[str | None, str]]:
        """Rows that could not be rendered, each with its field and the reason (only with ``on_bad_row="skip"``)."""
        found = {}
        flagged = np.flatnonzero(self._reader.read("failed"))
        for row, text in zip(flagged, self._reader.take_ragged("error", flagged), strict=True):
            field, problem = json.loads(bytes(text.astype(np.uint8)))
            found[int(row)] = (field, problem)
        return found


def tokenize(
    name: str,
    examples: Examples,
    renderer: Renderer,
    *,
    root: Path,
    on_bad_row: Literal["fail", "skip"],
    progress: Progress,
) -> Corpus:
    """Render every row to token ids and a label mask, once, into the store, each rank its share.

    Raises:
        BadRow: a row cannot be rendered and ``on_bad_row`` is "fail".
    """
    spec = {"renderer": renderer.identity, "data": examples.identity["content"], "on_bad_row": on_bad_row}
    writer = StageWriter(
        root,
        f"tokens-{name}",
        spec,
        num_rows=len(examples),
        shard_rows=_TOKEN_SHARD_ROWS,
        rows_digest=examples.identity["content"],
    )
    with progress.stage(f"tokenize {name}", len(examples), "rows") as advance:
        for shard in own_shards(writer, advance):
            started = time.perf_counter()
            first, stop = writer.shard_range(shard)
            rendered = [_render(examples, row, renderer, on_bad_row, advance) for row in range(first, stop)]
            tokens = [t for t, _ in rendered]
            errors = [np.frombuffer(e.encode(), dtype=np.uint8).copy() for _, e in rendered]
            columns: dict[str, Column] = {
                "input_ids": [t.input_ids for t in tokens],
                "supervised": [t.supervised.astype(np.uint8) for t in tokens],
                "error": errors,
                "failed": torch.tensor([len(e) > 0 for e in errors]),
                "length": torch.tensor([len(t.input_ids) for t in tokens], dtype=torch.int32),
                "supervised_tokens": torch.tensor([t.num_supervised for t in tokens], dtype=torch.int32),
                "dropped": torch.tensor([t.dropped for t in tokens]),
                "truncated": torch.tensor([t.truncated for t in tokens], dtype=torch.int32),
            }
            record_cost(
                writer.path,
                shard,
                time.perf_counter() - started,
                work="none",
                rows=stop - first,
                tokens=sum(len(t.input_ids) for t in tokens),
                supervised_tokens=sum(t.num_supervised for t in tokens),
            )
            writer.write_shard(shard, columns)
    finish(writer)
    return Corpus(name, examples, StageReader(writer.path))


def _render(
    examples: Examples, row: int, renderer: Renderer, on_bad_row: str, advance: Callable[[int], None]
) -> tuple[TokenizedExample, str]:
    try:
        rendered, error = renderer.render(examples[row]), ""
        if not len(rendered.input_ids):
            example = examples[row]
            raise BadRow("renders to no token at all; fill the row or remove it", file=example.file, row=example.row)
    except BadRow as problem:
        if on_bad_row == "fail":
            raise
        empty = np.zeros(0, dtype=np.int32)
        rendered, error = (
            TokenizedExample(input_ids=empty, supervised=empty.astype(np.bool_), truncated=0),
            # Without file and row: the tokens of equal rows are shared, wherever the rows stand.
            json.dumps([problem.field, problem.problem]),
        )
    advance(1)
    return rendered, error
