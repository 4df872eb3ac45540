"""Whether a model, a pool and a target fit together, before anyone spends money: what carries loss, what is covered,
what the template does, and whether the numbers can be trusted. Plain dataclasses; printing is the command line's.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tamis.corpora import dropped_sentence, model_settings
from tamis.data.duplicates import exact_duplicates, find_leaks
from tamis.data.render import Renderer
from tamis.errors import NonFinite
from tamis.evaluate.checks import (
    BatchCheck,
    LengthDistortion,
    SignCheck,
    check_batch_composition,
    check_distortion,
    check_sign,
)
from tamis.evaluate.inputs import SampledCorpus, read_sample
from tamis.model.limits import model_limits, skeleton
from tamis.model.load import LoadedModel, load_model, load_tokenizer
from tamis.model.targets import Coverage, coverage, gradient_layers
from tamis.notation import target_parts
from tamis.progress import NoProgress
from tamis.projection import AnyProjector, make_projector
from tamis.protocols import Progress
from tamis.settings import DoctorSettings
from tamis.types import TokenizedExample

__all__ = ["CorpusReport", "DoctorResult", "LeakReport", "Preview", "TemplateReport", "examine", "examine_template"]

SIGN = "A positive score means: training on the row lowers the target loss."
_FEW = 5  # problems and ids named one by one
_NOTICEABLE = 0.01  # relative difference of features that can reorder close scores
_CHECK_TOKENS = 512  # rows of the numeric checks are no longer than this, if there are enough of them
_LENGTHS = 4  # groups of rows, from the shortest to the longest, on which a projection is measured
_GROUP_TOKENS = 8192  # padded tokens of such a group, if two rows fit


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
class TemplateReport:
    """What the chat template does to a conversation, found with probe messages."""

    origin: str  # "tokenizer", "given" or "default"
    has_generation_marks: bool
    added_text: str  # written before the first turn although no message asked for it (a default system turn)
    trims_content: bool
    takes_system: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """Pool rows that the target holds too."""

    exact: int
    same_prompt: int
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DoctorResult:
    """All that ``tamis doctor`` found."""

    model: dict[str, Any]
    coverage: Coverage
    template: TemplateReport
    pool: CorpusReport
    target: CorpusReport | None
    leaks: LeakReport | None
    batch_check: BatchCheck | None
    sign_check: SignCheck | None
    sign_convention: str
    projection: dict[str, Any] | None  # what the distortion was measured for
    distortion: tuple[LengthDistortion, ...]  # by length, shortest rows first
    failures: tuple[str, ...]  # checks that failed, in sentences; they are among the warnings too
    passed: bool  # no check failed; checks that did not run fail nothing
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """What the numeric checks found."""

    batch_check: BatchCheck | None = None
    sign_check: SignCheck | None = None
    failures: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()  # which did not, and why


def examine(settings: DoctorSettings, *, progress: Progress | None = None) -> DoctorResult:
    """Look at everything that ``settings`` name.

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
    )
    pool = read(settings.pool, kind="pool")
    target = read([target_parts(text)[1] for text in settings.target], kind="target") if settings.target else None
    leaks = _leaks(pool, target) if target is not None else None
    limits = model_limits(loading)
    misfits = [s for corpus in (pool, target) if corpus is not None for s in corpus.check_fit(limits, tokenizer)]

    loaded = None
    numbers = _Numbers()
    distortion: list[LengthDistortion] = []
    if settings.numeric:
        with progress.stage("load the model", 1, "models") as advance:
            loaded = load_model(loading)
            advance(1)
        with progress.stage("numeric checks", 2, "checks") as advance:
            numbers = _check(loaded, pool, target, settings.check_rows, advance)
        if numbers.sign_check is not None and settings.projection != "none":
            distortion, why_not = _measure(loaded, pool, projector, settings.check_rows, progress)
            numbers = replace(numbers, not_run=tuple(why_not))
    model = loaded.model if loaded is not None else skeleton(loading)
    covered = coverage(model, gradient_layers(model))
    described = {"name": settings.model, "attention": settings.attention} if loaded is None else loaded.description
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
        failures=numbers.failures,
        passed=not numbers.failures,
        warnings=(),
    )
    return replace(result, warnings=(*_warnings(result, misfits), *numbers.failures, *numbers.not_run))


def examine_template(tokenizer: Any, *, given: bool, notes: Sequence[str]) -> TemplateReport:
    """What the tokenizer's chat template writes for probe messages; without one, what the default does."""
    source = tokenizer.chat_template
    if not source:
        return TemplateReport(
            origin="default",
            has_generation_marks=True,
            added_text="",
            trims_content=False,
            takes_system=True,
            notes=tuple(notes),
        )
    text = source if isinstance(source, str) else " ".join(map(str, source.values()))
    user = {"role": "user", "content": "  §q  "}
    chat = [user, {"role": "assistant", "content": "  §a  "}]
    one = _applied(tokenizer, chat)
    two = _applied(tokenizer, [*chat, *chat])
    system = _applied(tokenizer, [{"role": "system", "content": "§s"}, *chat])
    return TemplateReport(
        origin="given" if given else "tokenizer",
        has_generation_marks=bool(re.search(r"\{%-?\s*generation\b", text)),
        added_text=_added_text(one, two, tokenizer),
        trims_content=one is not None and not ("  §q  " in one and "  §a  " in one),
        takes_system=system is not None and "§s" in system,
        notes=tuple(notes),
    )


def _added_text(one: str | None, two: str | None, tokenizer: Any) -> str:
    """What stands before the first user turn only: a default system turn, a date, an instruction."""
    if one is None or two is None or "§q" not in one or two.count("§q") != 2:
        return ""
    before_first = one[: one.index("§q")]
    before_second = two[: two.rindex("§q")]
    shared = 0  # length of the turn's opening, which both end with
    while shared < len(before_first) and before_first[-1 - shared] == before_second[-1 - shared]:
        shared += 1
    added = before_first[: len(before_first) - shared]
    return added.removeprefix(tokenizer.bos_token or "")


def _applied(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str | None:
    """The rendered text, or None where the template refuses these roles (many refuse a system turn)."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception:  # templates raise whatever they like
        return None


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


def _check(
    loaded: LoadedModel, pool: SampledCorpus, target: SampledCorpus | None, count: int, advance: Any
) -> _Numbers:
    """Batch composition and sign, as far as they could run."""
    rows = _rows_to_check(pool, count)
    if len(rows) < 2:
        return _Numbers(not_run=("The numeric checks need two usable pool rows; they did not run.",))
    layers = gradient_layers(loaded.model)
    dtype = str(loaded.description["dtype"])
    try:
        batch_check = check_batch_composition(loaded.model, layers, list(rows.values()), dtype=dtype)
        advance(1)
        if target is not None and (found := _rows_to_check(target, count)):
            against, candidates = list(found.values()), rows
        else:  # without a target, one pool row stands for it
            (_, stand_in), *others = rows.items()
            against, candidates = [stand_in], dict(others)
        sign_check = check_sign(loaded.model, layers, candidates, against, dtype=dtype)
        advance(1)
    except NonFinite as error:
        return _Numbers(failures=(f"The numeric checks stopped: {error}",))
    failures = [] if batch_check.passed else [_batch_failure(batch_check)]
    if sign_check is None:
        failures.append(
            "Every gradient of the checked rows is zero, so there is no sign to check and gradient scores mean "
            "nothing; are the model's weights there?"
        )
    elif not sign_check.passed and not sign_check.is_routed:
        failures.append(
            "A small step on a pool row did not change the target loss as its score says "
            f"({_changes(sign_check)}); do not trust gradient scores of this model in this dtype."
        )
    return _Numbers(batch_check=batch_check, sign_check=sign_check, failures=tuple(failures))


def _batch_failure(check: BatchCheck) -> str:
    return (
        "A row's loss or gradient depends on its batch mates more than rounding explains "
        f"(features differ by {check.feature_difference:.1%}); use --batch-invariant or --dtype float32."
    )


def _changes(check: SignCheck) -> str:
    tried = f", the smallest of {check.steps} steps" if check.steps > 1 else ""
    return f"predicted {check.predicted_change:+.3g}, measured {check.measured_change:+.3g}{tried}"


def _measure(
    loaded: LoadedModel, pool: SampledCorpus, projector: AnyProjector, count: int, progress: Progress
) -> tuple[list[LengthDistortion], list[str]]:
    """What the projection adds to cosines at each of a few lengths, or the reason why that is not known."""
    groups = _rows_by_length(pool, count)
    found: list[LengthDistortion] = []
    try:
        with progress.stage("projection against exact gradients", len(groups), "lengths") as advance:
            for group in groups:
                found += check_distortion(loaded.model, gradient_layers(loaded.model), [group], projector)
                advance(1)
    except NonFinite as error:
        return [], [f"The distortion of the projection was not measured: {error}"]
    if not found:
        return [], ["The distortion of the projection was not measured: that needs two different rows with a gradient."]
    return found, []


def _rows_by_length(corpus: SampledCorpus, count: int) -> list[list[TokenizedExample]]:
    """Groups of ``count`` neighbours in length, from the shortest rows to the longest; no row twice, and no copies."""
    first = exact_duplicates(corpus.examples)
    originals = [i for i in corpus.usable if first[corpus.rows[i]] == corpus.rows[i]]
    ordered = sorted((t for i in originals if (t := corpus.tokenized[i]) is not None), key=lambda t: len(t.input_ids))
    number = min(_LENGTHS, len(ordered) // 2)
    size = min(count, len(ordered) // max(1, number))
    groups = []
    for start in np.linspace(0, len(ordered) - size, number).round().astype(int):
        group = ordered[start : start + size]
        groups.append(group[-max(2, _GROUP_TOKENS // len(group[-1].input_ids)) :])
    return groups


def _rows_to_check(corpus: SampledCorpus, count: int) -> dict[int, TokenizedExample]:
    """Usable rows of different lengths, so that a batch of them is padded: row number -> tokens."""
    usable = [(corpus.tokenized[i], int(corpus.rows[i])) for i in corpus.usable]
    ordered = sorted(((t, row) for t, row in usable if t is not None), key=lambda pair: len(pair[0].input_ids))
    short = [pair for pair in ordered if len(pair[0].input_ids) <= _CHECK_TOKENS]
    ordered = short if len(short) >= count else ordered[:count]
    if not ordered:
        return {}
    spread = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return {ordered[i][1]: ordered[i][0] for i in spread}


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
            f"The sign could not be confirmed ({_changes(sign)}): this model routes tokens to experts, and where a "
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
