"""What ``doctor`` and ``plan`` see of the data: all rows read and checked, and some of them tokenized."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tamis.data.examples import Examples, read_examples
from tamis.data.render import Renderer
from tamis.data.rows import Rows
from tamis.errors import BadRow, InvalidInput
from tamis.model.limits import ModelLimits
from tamis.protocols import Progress
from tamis.row_limits import check_row_limits
from tamis.types import Example, IntArray, RowFormat, TokenizedExample

__all__ = ["CorpusSize", "SampledCorpus", "read_sample"]


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """Rows and tokens, whole or estimated from a sample; ``squared_tokens`` is the sum of squared lengths."""

    rows: int
    tokens: float
    supervised_tokens: float
    squared_tokens: float

    def times(self, factor: float) -> CorpusSize:
        """The size of a part (or a multiple) of these rows with the same mix of lengths."""
        return CorpusSize(
            rows=round(self.rows * factor),
            tokens=self.tokens * factor,
            supervised_tokens=self.supervised_tokens * factor,
            squared_tokens=self.squared_tokens * factor,
        )


@dataclass(frozen=True, kw_only=True)
class SampledCorpus:
    """A pool or target whose every row was read and checked, and some of whose rows were tokenized."""

    kind: Literal["pool", "target"]
    examples: Examples
    rows: IntArray  # (n,) rows that were tokenized, evenly spaced
    tokenized: tuple[TokenizedExample | None, ...]  # (n,) None: could not be rendered
    problems: tuple[str, ...]  # one line for each row that could not be read or rendered
    seconds_per_row: float  # of rendering and tokenizing

    @property
    def usable(self) -> list[int]:
        """Positions in ``rows`` of those with a supervised token."""
        return [i for i, t in enumerate(self.tokenized) if t is not None and t.num_supervised > 0]

    def check_usable_rows(self, limits: ModelLimits, tokenizer: Any) -> list[str]:
        """As ``row_limits.check_row_limits``, of the usable rows."""
        at = {int(self.rows[i]): self._at(i) for i in self.usable}
        return check_row_limits(
            limits,
            tokenizer,
            self.examples,
            kind=self.kind,
            rows=np.array(list(at), dtype=np.int64),
            lengths=np.array([len(tokens.input_ids) for tokens in at.values()], dtype=np.int64),
            take=lambda rows: [at[int(row)] for row in rows],
        )

    def example(self, position: int) -> Example:
        """The row at a position of ``rows``, as read."""
        return self.examples[int(self.rows[position])]

    def size(self) -> CorpusSize:
        """Usable rows and their tokens, scaled from the sample to the whole.

        Raises:
            InvalidInput: no sampled row is usable.
        """
        return self._scaled(self.usable, len(self.examples) / len(self.rows))

    def sizes(self, group: IntArray, count: int) -> tuple[CorpusSize, ...]:
        """The same of each of ``count`` parts of the rows; a part without a usable row in the sample is like the whole.

        Args:
            group: of every row of ``examples``, the part that it belongs to.
            count: of parts.

        Raises:
            InvalidInput: no sampled row is usable.
        """
        found = []
        for number in range(count):
            rows, sampled = int((group == number).sum()), int((group[self.rows] == number).sum())
            usable = [i for i in self.usable if group[self.rows[i]] == number]
            found.append(
                self._scaled(usable, rows / sampled) if usable else self.size().times(rows / len(self.examples))
            )
        return tuple(found)

    @property
    def longest(self) -> int:
        """Tokens of the longest usable row of the sample."""
        return max(len(self._at(i).input_ids) for i in self.usable)

    def _scaled(self, usable: Sequence[int], factor: float) -> CorpusSize:
        lengths = np.array([len(self._at(i).input_ids) for i in usable], dtype=np.float64)
        if not len(lengths):
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise InvalidInput(f"no row of the {self.kind} carries a supervised token{first}")
        sampled = CorpusSize(
            rows=len(lengths),
            tokens=float(lengths.sum()),
            supervised_tokens=float(sum(self._at(i).num_supervised for i in usable)),
            squared_tokens=float((lengths**2).sum()),
        )
        return sampled.times(factor)

    def _at(self, position: int) -> TokenizedExample:
        found = self.tokenized[position]
        assert found is not None
        return found


def read_sample(
    paths: Sequence[str],
    renderer: Renderer,
    *,
    kind: Literal["pool", "target"],
    row_format: RowFormat | None,
    on_bad_row: Literal["fail", "skip"],
    sample: int,
    progress: Progress,
    held: Mapping[str, Rows] | None = None,
) -> SampledCorpus:
    """Read and check all rows of ``paths``; tokenize ``sample`` of them, evenly spaced (0: all).

    ``held`` has the rows in memory that ``paths`` name.

    Raises:
        BadRow: a row cannot be used and ``on_bad_row`` is "fail".
        InvalidInput: a file cannot be used.
    """
    examples = read_examples(paths, row_format=row_format, on_bad_row=on_bad_row, held=held)
    count = min(sample, len(examples)) if sample else len(examples)
    rows = np.linspace(0, len(examples) - 1, count).round().astype(np.int64)
    tokenized: list[TokenizedExample | None] = []
    problems = [f"{bad.file}, row {bad.row} (0-based): {bad.problem}" for bad in examples.skipped]
    started = time.perf_counter()
    with progress.stage(f"tokenize {kind}", count, "rows") as advance:
        for row in rows.tolist():
            try:
                tokenized.append(renderer.render(examples[row]))
            except BadRow as problem:
                if on_bad_row == "fail":
                    raise
                problems.append(str(problem))
                tokenized.append(None)
            advance(1)
    return SampledCorpus(
        kind=kind,
        examples=examples,
        rows=rows,
        tokenized=tuple(tokenized),
        problems=tuple(problems),
        seconds_per_row=(time.perf_counter() - started) / count,
    )
