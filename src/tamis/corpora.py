"""From the user's files to a pool and a target that a method can work with: read, rendered, checked, compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tamis.corpus import Corpus, tokenize
from tamis.data.duplicates import exact_duplicates, find_leaks, near_duplicates
from tamis.data.examples import Examples, read_examples
from tamis.data.render import Renderer
from tamis.data.row_warnings import bad_row_warnings, row_warnings
from tamis.data.rows import Rows
from tamis.errors import BadRow, InvalidInput
from tamis.model.limits import model_limits
from tamis.model.load import ModelSettings, load_tokenizer
from tamis.notation import target_parts
from tamis.protocols import Progress
from tamis.row_limits import check_row_limits
from tamis.settings import DoctorSettings, PlanSettings, SelectSettings, TrainRunSettings
from tamis.types import IntArray

__all__ = [
    "Corpora",
    "Rendered",
    "SkippedRow",
    "Sources",
    "dropped_sentence",
    "leaked_rows",
    "model_settings",
    "read_corpora",
    "read_sources",
    "render_corpora",
    "write_skipped",
]

# Rows up to which near copies are always looked for, so that the report can show them: about two minutes.
_NEAR_COPIES_SOUGHT = 200_000


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that was left out, and why."""

    corpus: str
    file: str
    row: int  # 0-based
    field: str | None
    problem: str


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The rows as read."""

    pool: Examples
    target: Examples
    target_names: tuple[str, ...]
    target_group: IntArray  # for each target row, the target it belongs to


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The rows as tokens and labels, those that cannot be used left out."""

    pool: Corpus
    target: Corpus
    target_rows: IntArray  # usable target rows
    target_group: IntArray  # for each of them, which target it stands for
    skipped: tuple[SkippedRow, ...]
    warnings: tuple[str, ...]  # what is done to the rows that one does not expect


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The pool and the target rows, and how they relate."""

    pool: Corpus
    target: Corpus
    target_names: tuple[str, ...]
    target_rows: IntArray  # usable target rows
    target_group: IntArray  # for each of them, which target it stands for
    skipped: tuple[SkippedRow, ...]
    first_copy: IntArray  # (N,) the first exact copy of each pool row, itself included
    first_near_copy: IntArray  # (N,) likewise for near copies
    leaked: npt.NDArray[np.bool_]  # (N,) the row, or its prompt, is also a target row
    notes: tuple[str, ...]  # sentences the report must show
    warnings: tuple[str, ...]  # those the console must show too: what is done to the rows is not what one expects


def model_settings(settings: SelectSettings | DoctorSettings | PlanSettings | TrainRunSettings) -> ModelSettings:
    """The part of a run's settings that says how to load the model."""
    return ModelSettings(
        name=settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
        gradient_checkpointing=settings.gradient_checkpointing,
        device_map=None if isinstance(settings, TrainRunSettings) else settings.device_map,
    )


def read_sources(settings: SelectSettings | TrainRunSettings, held: Mapping[str, Rows] | None = None) -> Sources:
    """Read and check every row the user named. Nothing is written and no tokenizer is needed.

    ``held`` has the rows in memory that ``settings`` name, by their names.

    Raises:
        InvalidInput: a file cannot be used.
        BadRow: a row cannot be used and ``on_bad_row`` is "fail".
    """
    targets = [target_parts(text) for text in settings.target]
    how: dict[str, Any] = {"row_format": settings.row_format, "on_bad_row": settings.on_bad_row, "held": held}
    pool = read_examples(settings.pool, **how)
    target = read_examples([path for _, path in targets], **how)
    group = np.array(target.named_by, dtype=np.int64)[target.file_index]
    return Sources(pool=pool, target=target, target_names=tuple(name for name, _ in targets), target_group=group)


def render_corpora(
    sources: Sources, settings: SelectSettings | TrainRunSettings, *, store: Path, progress: Progress
) -> Rendered:
    """Render the rows to tokens and labels, and leave out what cannot be used.

    Raises:
        InvalidInput: nothing usable is left in the pool or in a target.
        BadRow: a row cannot be rendered or has no supervised token, and ``on_bad_row`` is "fail".
    """
    limits, tokenizer = model_limits(model_settings(settings)), load_tokenizer(model_settings(settings))
    renderer = Renderer(tokenizer, max_length=settings.max_length)
    pool, target = (
        tokenize(name, examples, renderer, root=store, on_bad_row=settings.on_bad_row, progress=progress)
        for name, examples in (("pool", sources.pool), ("target", sources.target))
    )
    skipped = [*_skipped(pool, settings.on_bad_row), *_skipped(target, settings.on_bad_row)]

    if not pool.usable.any():
        raise InvalidInput(
            f"no row of the pool ({', '.join(settings.pool)}) carries a supervised token; nothing to select"
        )
    target_rows = np.flatnonzero(target.usable).astype(np.int64)
    target_group = sources.target_group[target_rows]
    for index, name in enumerate(sources.target_names):
        if not (target_group == index).any():
            cut = int(((sources.target_group == index) & _lost_to_the_limit(target)).sum())
            why = f" (rows that lost all of them to --max-length: {cut}; raise it)" if cut else ""
            raise InvalidInput(f"target '{name}' has no row with a supervised token; give it usable rows{why}")

    warnings = [*renderer.notes]
    for corpus in (pool, target):
        lost = _lost_to_the_limit(corpus)
        warnings += bad_row_warnings(_problems(corpus, skipped, told=lost), corpus.name)
        warnings += row_warnings(corpus.examples, renderer, corpus.name)
        if cut := int(lost.sum()):
            warnings.append(
                f"{corpus.name}: {cut} of {len(corpus)} rows lost every supervised token to --max-length and cannot be "
                "used; raise it, or shorten them."
            )
        rows = np.flatnonzero(corpus.usable).astype(np.int64)
        lengths = corpus.lengths[rows]
        warnings += check_row_limits(
            limits, tokenizer, corpus.examples, kind=corpus.name, rows=rows, lengths=lengths, take=corpus.take
        )
        if corpus.dropped.any():
            warnings.append(dropped_sentence(corpus.name, int(corpus.dropped.sum()), len(corpus)))
    return Rendered(
        pool=pool,
        target=target,
        target_rows=target_rows,
        target_group=target_group,
        skipped=tuple(skipped),
        warnings=tuple(warnings),
    )


def read_corpora(sources: Sources, settings: SelectSettings, *, store: Path, progress: Progress) -> Corpora:
    """Render the rows, leave out what cannot be used, and find copies and leaks.

    Raises:
        InvalidInput: nothing usable is left in the pool or in a target.
        BadRow: a row cannot be rendered or has no supervised token, and ``on_bad_row`` is "fail".
    """
    rendered = render_corpora(sources, settings, store=store, progress=progress)
    pool = rendered.pool
    first_copy = exact_duplicates(sources.pool)
    first_near_copy = first_copy
    notes = list[str]()
    if settings.duplicates == "near" or len(pool) <= _NEAR_COPIES_SOUGHT:
        with progress.stage("near copies (pool)", len(pool), "rows") as advance:
            first_near_copy = near_duplicates(sources.pool, threshold=settings.near_threshold)
            advance(len(pool))
    else:
        notes.append(
            f"Near copies were not sought among {len(pool)} rows, which takes minutes; --duplicates near "
            "seeks them and takes one of each."
        )
    return Corpora(
        pool=pool,
        target=rendered.target,
        target_names=sources.target_names,
        target_rows=rendered.target_rows,
        target_group=rendered.target_group,
        skipped=rendered.skipped,
        first_copy=first_copy,
        first_near_copy=first_near_copy,
        leaked=leaked_rows(sources),
        notes=tuple(notes),
        warnings=rendered.warnings,
    )


def leaked_rows(sources: Sources) -> npt.NDArray[np.bool_]:
    """For each pool row, whether it or its prompt is also a target row."""
    leaks = find_leaks(sources.pool, sources.target)
    leaked = np.zeros(len(sources.pool), dtype=np.bool_)
    leaked[leaks.exact] = True
    leaked[leaks.same_prompt] = True
    return leaked


def _lost_to_the_limit(corpus: Corpus) -> npt.NDArray[np.bool_]:
    """(rows,): nothing is supervised in what the length limit left of them."""
    lost: npt.NDArray[np.bool_] = ~corpus.usable & (corpus.truncated > 0)
    return lost


def _problems(corpus: Corpus, skipped: Sequence[SkippedRow], *, told: npt.NDArray[np.bool_]) -> list[str]:
    """One line for each skipped row of ``corpus``, but for those that a sentence of their own tells of."""
    examples = corpus.examples
    known = {(examples.files[examples.file_index[row]], int(examples.row[row])) for row in np.flatnonzero(told)}
    return [
        f"{row.file}, row {row.row} (0-based): {row.problem}"
        for row in skipped
        if row.corpus == corpus.name and (row.file, row.row) not in known
    ]


def _skipped(corpus: Corpus, on_bad_row: str) -> list[SkippedRow]:
    """Rows left out: bad ones, those that could not be rendered, and those whose loss mask is empty.

    Raises:
        BadRow: a row has no supervised token and bad rows are not to be skipped.
    """
    examples = corpus.examples
    found = [
        SkippedRow(corpus=corpus.name, file=b.file, row=b.row, field=b.field, problem=b.problem)
        for b in examples.skipped
    ]
    unrendered = corpus.problems()
    for row in np.flatnonzero(~corpus.usable):
        example = examples[int(row)]
        field, problem = unrendered.get(int(row), (None, None))
        if problem is None:
            cut = int(corpus.truncated[row])
            problem = (
                f"no supervised token is left after {cut} of its tokens were cut at --max-length; raise it"
                if cut
                else "has no supervised token: nothing in it is an assistant's answer"
            )
            if on_bad_row == "fail":
                problem += ", remove the row, or use --on-bad-row skip"
                raise BadRow(problem, file=example.file, row=example.row)
        found.append(SkippedRow(corpus=corpus.name, file=example.file, row=example.row, field=field, problem=problem))
    return found


def dropped_sentence(kind: str, rows: int, of: int) -> str:
    """What to know of rows whose text the chat template leaves out in part."""
    return (
        f"{kind}: in {rows} of {of} rows the chat template leaves out a part of an assistant turn (its reasoning, as a "
        "rule); that part is neither seen nor trained on. --chat-template takes a template that keeps it."
    )


def write_skipped(path: Path, skipped: Sequence[SkippedRow]) -> None:
    """One JSON line per row that was left out; no file if there is none."""
    if not skipped:
        path.unlink(missing_ok=True)  # of an earlier run of this folder, with other data on disk
        return
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in skipped]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
