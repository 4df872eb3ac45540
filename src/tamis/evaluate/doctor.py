"""Whether a model, a pool and a target fit together, before anyone spends money: what carries loss, what is covered,
what the template does, and whether the numbers can be trusted. Plain dataclasses; printing is the command line's.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tamis.corpora import dropped_sentence, model_settings
from tamis.data.duplicates import exact_duplicates, find_leaks
from tamis.data.render import Renderer
from tamis.data.row_warnings import tool_warnings
from tamis.data.rows import Rows
from tamis.evaluate.checks import BatchCheck, LengthDistortion, SignCheck
from tamis.evaluate.inputs import SampledCorpus, read_sample
from tamis.evaluate.numbers import Numbers, changes, check_numbers, measure_distortion
from tamis.evaluate.template import TemplateReport, examine_template
from tamis.model.limits import model_limits, skeleton
from tamis.model.load import load_model, load_tokenizer
from tamis.model.targets import Coverage, coverage, gradient_layers
from tamis.notation import target_parts
from tamis.progress import NoProgress
from tamis.projection import make_projector
from tamis.protocols import Progress
from tamis.settings import DoctorSettings

__all__ = ["CorpusReport", "DoctorResult", "LeakReport", "Preview", "examine"]

SIGN = "A positive score means: training on the row lowers the target loss."
_FEW = 5  # problems and ids named one by one
_NOTICEABLE = 0.01  # relative difference of features that can reorder close scores


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One row as the model will see it: pieces of text, each with whether it carries loss."""

    id: str
    file: str
    row: int
    tokens: int
    supervised_tokens: int
    truncated_tokens: int
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """The pool or the target. All rows were read; tokens are counted over the ``sampled`` ones."""

    kind: str
    files: tuple[str, ...]
    rows: int
    formats: dict[str, int]
    sampled: int
    tokens: int
    supervised_tokens: int
    unsupervised_rows: int
    unsupervised_ids: tuple[str, ...]
    truncated_rows: int
    truncated_tokens: int
    dropped_rows: int  # in which the chat template leaves out a part of an assistant turn
    bad_rows: int
    problems: tuple[str, ...]
    exact_copies: int
    repeated_ids: int
    previews: tuple[Preview, ...]


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """Pool rows that the target holds too."""

    exact: int
    same_prompt: int
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DoctorResult:
    """All that ``tamis doctor`` found."""

    model: dict[str, Any]  # the model as it was loaded
    coverage: Coverage  # every parameter, by whether its gradient takes part in the scores
    template: TemplateReport  # how chats are rendered
    pool: CorpusReport  # rows and tokens of the pool, copies, bad rows, and some rows with their loss mask
    target: CorpusReport | None  # the same of the target; None without one
    leaks: LeakReport | None  # pool rows that are also in the target; None without one
    batch_check: BatchCheck | None  # single rows against the same in a padded batch; None if not run
    sign_check: SignCheck | None  # predicted against measured change of the target loss; None if not run
    sign_convention: str  # what a positive score means
    projection: dict[str, Any] | None  # what the distortion was measured for
    distortion: tuple[LengthDistortion, ...]  # by length, shortest rows first
    failures: tuple[str, ...]  # checks that failed, in sentences; they are among the warnings too
    passed: bool  # no check failed; checks that did not run fail nothing
    warnings: tuple[str, ...]  # what to know before going on


def examine(
    settings: DoctorSettings, *, progress: Progress | None = None, held: Mapping[str, Rows] | None = None
) -> DoctorResult:
    """Look at everything that ``settings`` name; ``held`` has the rows in memory that they name.

    Raises:
        InvalidInput: data or model cannot be used at all.
    """
    progress = progress or NoProgress()
    loading = model_settings(settings)
    projector = make_projector(settings.projection, dim=settings.projection_dim)
    tokenizer = load_tokenizer(loading)
    renderer = Renderer(tokenizer, max_length=settings.max_length)
    template = examine_template(tokenizer, given=settings.chat_template is not None, notes=renderer.notes)
    read = functools.partial(
        read_sample,
        renderer=renderer,
        row_format=settings.row_format,
        on_bad_row=settings.on_bad_row,
        sample=settings.sample,
        progress=progress,
        held=held,
    )
    pool = read(settings.pool, kind="pool")
    target = read([target_parts(text)[1] for text in settings.target], kind="target") if settings.target else None
    leaks = _leaks(pool, target) if target is not None else None
    limits = model_limits(loading)
    misfits = list[str]()
    for corpus in filter(None, (pool, target)):
        misfits += tool_warnings(corpus.examples, renderer, corpus.kind)
        misfits += corpus.check_usable_rows(limits, tokenizer)

    loaded = None
    numbers = Numbers()
    distortion: list[LengthDistortion] = []
    if settings.numeric:
        with progress.stage("load the model", 1, "models") as advance:
            loaded = load_model(loading)
            advance(1)
        with progress.stage("numeric checks", 2, "checks") as advance:
            numbers = check_numbers(loaded, pool, target, settings.check_rows, advance)
        if numbers.sign_check is not None and settings.projection != "none":
            distortion, why_not = measure_distortion(loaded, pool, projector, settings.check_rows, progress)
            numbers = replace(numbers, not_run=tuple(why_not))
    model = loaded.model if loaded is not None else skeleton(loading)
    covered = coverage(model, gradient_layers(model))
    described = {"name": settings.model, "attention": settings.attention} if loaded is None else loaded.description
    failures = (*numbers.failures, *_nothing_to_learn(pool, target))
    reports = [_report(corpus, renderer, settings.preview) for corpus in (pool, target) if corpus is not None]
    result = DoctorResult(
        model=dict(described),
        coverage=covered,
        template=template,
        pool=reports[0],
        target=reports[1] if target is not None else None,
        leaks=leaks,
        batch_check=numbers.batch_check,
        sign_check=numbers.sign_check,
        sign_convention=SIGN,
        projection={"name": settings.projection, **projector.identity} if distortion else None,
        distortion=tuple(distortion),
        failures=failures,
        passed=not failures,
        warnings=(),
    )
    return replace(result, warnings=(*_warnings(result, misfits), *failures, *numbers.not_run))


def _nothing_to_learn(pool: SampledCorpus, target: SampledCorpus | None) -> list[str]:
    """A sentence for each file of the target, and for a pool, of which no row looked at carries a supervised token."""
    found = []
    if not pool.usable:
        found.append(f"pool: none of the {len(pool.rows)} rows looked at carries a supervised token; see --max-length.")
    if target is not None:
        seen = Counter(target.example(i).file for i in range(len(target.rows)))
        usable = Counter(target.example(i).file for i in target.usable)
        found += [
            f"target: none of the {rows} rows looked at of {file} carries a supervised token, so nothing can be scored "
            "for it; raise --max-length, or give rows with an answer."
            for file, rows in seen.items()
            if not usable[file]
        ]
    return found


def _leaks(pool: SampledCorpus, target: SampledCorpus) -> LeakReport:
    found = find_leaks(pool.examples, target.examples)
    rows = np.concatenate([found.exact, found.same_prompt])[:_FEW]
    return LeakReport(
        exact=len(found.exact),
        same_prompt=len(found.same_prompt),
        ids=tuple(pool.examples.ids[int(row)] for row in rows),
    )


def _report(corpus: SampledCorpus, renderer: Renderer, previews: int) -> CorpusReport:
    examples, tokenized = corpus.examples, [t for t in corpus.tokenized if t is not None]
    unsupervised = [i for i, t in enumerate(corpus.tokenized) if t is not None and t.num_supervised == 0]
    first = exact_duplicates(examples)
    shown = corpus.usable
    chosen = sorted({shown[int(i)] for i in np.linspace(0, len(shown) - 1, previews).round()}) if shown else []
    return CorpusReport(
        kind=corpus.kind,
        files=tuple(examples.files),
        rows=len(examples),
        formats=dict(Counter(corpus.example(i).format for i in range(len(corpus.rows)))),
        sampled=len(corpus.rows),
        tokens=sum(len(t.input_ids) for t in tokenized),
        supervised_tokens=sum(t.num_supervised for t in tokenized),
        unsupervised_rows=len(unsupervised),
        unsupervised_ids=tuple(examples.ids[int(corpus.rows[i])] for i in unsupervised[:_FEW]),
        truncated_rows=sum(t.truncated > 0 for t in tokenized),
        truncated_tokens=sum(t.truncated for t in tokenized),
        dropped_rows=sum(t.dropped for t in tokenized),
        bad_rows=len(corpus.problems),
        problems=corpus.problems[:_FEW],
        exact_copies=int((first != np.arange(len(first))).sum()),
        repeated_ids=len(examples.duplicate_ids),
        previews=tuple(_preview(corpus, renderer, position) for position in chosen),
    )


def _preview(corpus: SampledCorpus, renderer: Renderer, position: int) -> Preview:
    example, tokens = corpus.example(position), corpus.tokenized[position]
    assert tokens is not None
    return Preview(
        id=example.id,
        file=example.file,
        row=example.row,
        tokens=len(tokens.input_ids),
        supervised_tokens=tokens.num_supervised,
        truncated_tokens=tokens.truncated,
        pieces=tuple(renderer.preview(example)),
    )


def _warnings(result: DoctorResult, misfits: Sequence[str]) -> list[str]:
    """What deserves a second look, in sentences; failed checks are told apart."""
    found = [*result.template.notes, *misfits]
    if result.template.added_text:
        found.append(
            "The chat template adds text of its own before the first turn "
            f"({_short(result.template.added_text)!r}); every row without a system turn starts with it."
        )
    for corpus in filter(None, (result.pool, result.target)):
        name, sampled = corpus.kind, corpus.sampled
        if corpus.bad_rows:
            found.append(f"{name}: {corpus.bad_rows} rows cannot be used; the first: {corpus.problems[0]}")
        if corpus.unsupervised_rows:
            ids = ", ".join(corpus.unsupervised_ids)
            found.append(f"{name}: {corpus.unsupervised_rows} of {sampled} rows carry no supervised token ({ids}).")
        if corpus.truncated_rows:
            found.append(
                f"{name}: {corpus.truncated_rows} of {sampled} rows are longer than --max-length and lose "
                f"{corpus.truncated_tokens} tokens at the end, answers first."
            )
        if corpus.dropped_rows:
            found.append(dropped_sentence(name, corpus.dropped_rows, sampled))
        if corpus.exact_copies:
            found.append(f"{name}: {corpus.exact_copies} rows are exact copies of earlier ones.")
        if corpus.repeated_ids:
            found.append(f"{name}: {corpus.repeated_ids} ids occur more than once; rows stay apart all the same.")
    if result.leaks is not None and result.leaks.exact + result.leaks.same_prompt:
        found.append(
            f"{result.leaks.exact} pool rows are target rows, {result.leaks.same_prompt} more share a prompt with one "
            f"({', '.join(result.leaks.ids)}); select with --drop-leaks to leave them out."
        )
    if result.coverage.share < 0.5:
        found.append(
            f"Only {result.coverage.share:.0%} of the trainable numbers take part in gradient scores; see the coverage."
        )
    batch, sign = result.batch_check, result.sign_check
    if batch is not None and batch.passed and batch.feature_difference > _NOTICEABLE:
        found.append(
            f"Rounding lets a row's gradient depend on its batch mates by {batch.feature_difference:.1%}; "
            "rows with nearly equal scores may swap places. --batch-invariant or --dtype float32 prevents that."
        )
    if sign is not None and sign.is_routed and not sign.passed:
        found.append(
            f"The sign could not be confirmed ({changes(sign)}): this model routes tokens to experts, and where a "
            "step changes a route the loss jumps, so it is not differentiable there. Scores hold for the routes as "
            "they are."
        )
    if result.distortion:
        error, spread = (
            float(np.sqrt(np.mean([getattr(at, name) ** 2 for at in result.distortion])))
            for name in ("rms_error", "spread")
        )
        if error > spread:
            found.append(
                f"The projection changes cosines of gradients by {error:.3f}, which is more than those of rows of one "
                f"length differ among themselves ({spread:.3f}); raise --projection-dim."
            )
    return found


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
