"""Where data, model and store meet: a resumable, sharded, batched map over rows, and what a method gets to work with.

Nothing here knows a method. A method asks its ``Task`` for rows, tokens, the model and ``map_rows``; everything it
computes that way survives a kill, is spread over the ranks, and is reused by the next run that asks for the same.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tamis.corpus import Corpus
from tamis.data.batches import collate, plan_batches
from tamis.disk import replace_atomically
from tamis.errors import InvalidSettings, NonFinite, Unsupported, first_line
from tamis.identity import fingerprint, rows_sha256
from tamis.model.flops import ModelShape, projected_flops, stage_flops
from tamis.model.limits import skeleton
from tamis.model.load import LoadedModel, ModelSettings, load_model, model_fingerprint, resolved_dtype
from tamis.model.memory import TokenLimit, default_batch_tokens
from tamis.model.processes import is_main
from tamis.model.targets import gradient_layers
from tamis.progress import NoProgress
from tamis.protocols import Progress
from tamis.stages import StageCost, Work, finish, own_shards, read_cost, record_cost, shards_without_cost
from tamis.store.manifest import read_manifest, stage_path
from tamis.store.reader import StageReader
from tamis.store.writer import StageWriter
from tamis.types import Batch, IntArray, LayerSpec
from tamis.versions import releases

__all__ = ["BatchFunction", "Collecting", "Task", "named_row"]

logger = logging.getLogger(__name__)

BatchFunction = Callable[[Batch], Mapping[str, Tensor]]

# Padded positions are masked and carry no label, so any id of the vocabulary will do.
_PAD_ID = 0


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How rows are pushed through the model. None of it changes a score beyond floating-point rounding."""

    batch_tokens: int | None = None  # padded tokens per batch; None: 2,048 on CPU, 16,384 on an accelerator
    batch_invariant: bool = False  # one row per pass, so that no score depends on its batch mates, to the last bit
    shard_rows: int = 256  # rows between two writes; what a kill can lose

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InvalidSettings(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if self.shard_rows < 1:
            raise InvalidSettings(f"shard_rows must be at least 1, got {self.shard_rows}")


@dataclass(kw_only=True)
class Task:
    """One question to a method: which of ``rows`` of the pool help the target rows, according to this model?

    ``target_rows`` are the usable target rows; a method's scores have one column for each, in this order, and
    ``target_group`` says to which of ``target_names`` each belongs.
    """

    pool: Corpus
    target: Corpus
    target_names: tuple[str, ...]
    target_rows: IntArray  # (M,)
    target_group: IntArray  # (M,)
    rows: IntArray  # (n,) ascending: the pool rows to score
    model_settings: ModelSettings
    collecting: Collecting
    store: Path
    seed: int = 0
    aggregate: Literal["round-robin", "mean"] = "round-robin"
    progress: Progress = field(default_factory=NoProgress)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stages: list[Path] = field(default_factory=list)  # every stage this run used, for the cost table
    # Where the models this run used beside its own are described, and how each is loaded.
    models: list[tuple[Path, ModelSettings]] = field(default_factory=list)
    _loaded: LoadedModel | None = None
    _fingerprint: str | None = None
    _shape: ModelShape | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model, loaded when first asked for: a run that finds all its work done never loads it."""
        if self._loaded is None:
            self._loaded = load_model(self.model_settings)
            if is_main():
                described = json.dumps(self._loaded.description, indent=2).encode()
                replace_atomically(self._description_file(), (described,))
        return self._loaded

    @property
    def fingerprint(self) -> str:
        """Identity of weights, configuration and tokenizer, without loading the weights."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.model_settings)
        return self._fingerprint

    def at_model(self, settings: ModelSettings) -> Task:
        """The same question to another model (a checkpoint, say); notes, warnings and costs are shared."""
        other = replace(self, model_settings=settings, _loaded=None, _fingerprint=None, _shape=None)
        self.models.append((other._description_file(), settings))
        return other

    def model_descriptions(self) -> list[dict[str, Any]]:
        """Every model that the scores come from, as it was when loaded, by this run or by the one it resumes."""
        files = dict([(self._description_file(), self.model_settings), *self.models])
        return [_described(path, settings) for path, settings in files.items() if path.exists()]

    def _description_file(self) -> Path:
        return self.store / f"model-{fingerprint(self.model_identity())[:12]}.json"

    def layers(self, *, include_head: bool = False) -> tuple[LayerSpec, ...]:
        """The layers whose per-sample gradients count, in the model's order."""
        return gradient_layers(self.loaded.model, include_head=include_head)

    def note(self, sentence: str) -> None:
        """Something the report has to say about this run."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def warn(self, sentence: str) -> None:
        """Something the user must see before training on the selection, on the console too."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def model_identity(self) -> dict[str, Any]:
        """Everything about the model that a stored number depends on."""
        settings = self.model_settings
        return {
            "fingerprint": self.fingerprint,
            "dtype": resolved_dtype(settings),
            "attention": settings.attention,
            # Another release may compute the same layer in another way.
            "libraries": releases("torch", "transformers", "peft"),
        }

    def record_cost(self, folder: Path, part: int, elapsed_s: float, **counts: Any) -> None:
        """Add work done outside ``map_rows`` (training) to the cost table; ``part`` numbers parts of ``folder``."""
        if folder not in self.stages:
            self.stages.append(folder)
        record_cost(folder, part, elapsed_s, **counts)

    def workdir(self, name: str, spec: Mapping[str, Any], *, uses_target: bool = True) -> Path:
        """A folder of the method's own under the store, one per ``spec`` (warm-up checkpoints, for example)."""
        full = {"pool": self.pool.identity, "model": self.model_identity(), **spec}
        if uses_target:
            full["target"] = self.target.identity
        path = self.store / f"{name}-{fingerprint(full)[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def map_rows(
        self,
        corpus: Corpus,
        rows: IntArray,
        *,
        name: str,
        spec: Mapping[str, Any],
        start: Callable[[], BatchFunction],
        work: Work = "gradient",
        operations: Callable[[float, float, float, float], float] | None = None,
        extra_operations: Callable[[float, float, float, float], float] | None = None,
        before: tuple[Corpus, IntArray] | None = None,
    ) -> StageReader:
        """Compute something for every row, once, and return it readable in the order of ``rows``.

        Where the store has the same of all usable rows, those of ``rows`` are taken from there, and count in the cost
        table as what they cost when they were computed: a shortlist beside a whole pool passes no row through the model
        again, and seems no cheaper for it.

        Args:
            corpus: the pool or the target.
            rows: (n,) positions in ``corpus``, all usable.
            name: the stage's name, seen in the store and in the progress.
            spec: everything that determines the numbers besides data and model, which are added here.
            start: called only if a shard is missing; returns the function from a batch to tensors of shape (B, ...).
            work: what a batch costs, for the cost table.
            operations: a closer count, of (rows, tokens, supervised tokens, squared tokens), where the work is not a
                whole pass; called after ``start``.
            extra_operations: beside a whole pass, from the same counts.
            before: rows that ``start`` itself passes through the model, each as often as it does; they count with the
                first shard that a process computes.

        Raises:
            StoreMismatch: the folder holds a stage made from something else.
            Unsupported: a single row does not fit in memory.
        """
        rows = np.asarray(rows, dtype=np.int64)
        full_spec: dict[str, Any] = {
            "stage": name,
            "tokens": corpus.identity,
            "rows": rows_sha256(rows),
            "work": work,
            "model": self.model_identity(),
            "batch_invariant": self.collecting.batch_invariant,
            "settings": json.loads(json.dumps(dict(spec), default=str)),
        }
        writer = StageWriter(
            self.store,
            f"{name}-{corpus.name}",
            full_spec,
            num_rows=len(rows),
            shard_rows=self.collecting.shard_rows,
            fixed={"batch_tokens": self.collecting.batch_tokens},
            rows_digest=full_spec["rows"],
        )
        self.stages.append(writer.path)
        whole = self._same_of_all_rows(corpus, full_spec, f"{name}-{corpus.name}")
        compute: BatchFunction | None = None
        limit = TokenLimit(writer.fixed["batch_tokens"] or 0, writer.path)
        with self.progress.stage(f"{name} ({corpus.name})", len(rows), "rows") as advance:
            for shard in own_shards(writer, advance):
                if whole is not None:
                    first, stop = writer.shard_range(shard)
                    taken = whole.cost(rows[first:stop])
                    if operations is None:
                        taken["operations"] = self._operations(work, taken, extra_operations)
                    record_cost(writer.path, shard, work=work, **taken)
                    writer.write_shard(shard, whole.columns(rows[first:stop]))
                    advance(stop - first)
                    continue
                first, stop = writer.shard_range(shard)
                part = rows[first:stop]
                counts: dict[str, float] = dict(corpus.sizes(part))
                if compute is None:
                    device = self.loaded.device  # loading weights is not part of what the rows cost
                    limit.tokens = limit.tokens or default_batch_tokens(device)
                    started = time.perf_counter()
                    compute = start()
                    if before is not None:
                        counts = {name: counts[name] + more for name, more in before[0].sizes(before[1]).items()}
                else:
                    started = time.perf_counter()
                columns = self._run(corpus, part, compute, limit, shard, advance)
                elapsed_s = time.perf_counter() - started
                if operations is not None:
                    counts["operations"] = operations(*counts.values())
                else:
                    counts["operations"] = self._operations(work, counts, extra_operations)
                record_cost(writer.path, shard, elapsed_s, work=work, **counts)
                writer.write_shard(shard, columns)
        finish(writer)
        return StageReader(writer.path)

    def projected_operations(
        self, projection: str, dim: int | None, *, include_head: bool
    ) -> Callable[[float, float, float, float], float]:
        """How many operations the projection of a pass's gradients costs, for ``extra_operations``."""

        def operations(rows: float, tokens: float, supervised_tokens: float, squared_tokens: float) -> float:
            sizes = {"rows": rows, "tokens": tokens, "supervised_tokens": supervised_tokens}
            return projected_flops(self._model_shape(), projection, dim, include_head=include_head, **sizes)

        return operations

    def _operations(
        self,
        work: Work,
        counts: Mapping[str, Any],
        extra: Callable[[float, float, float, float], float] | None,
    ) -> float:
        """Of a whole pass: here and not when the run is done, since a later part of it may have another model."""
        sizes = (counts["tokens"], counts["supervised_tokens"], counts["squared_tokens"])
        passed = stage_flops(self._model_shape(), work, *sizes)
        return passed + (extra(counts["rows"], *sizes) if extra is not None else 0.0)

    def _model_shape(self) -> ModelShape:
        if self._shape is None:
            self._shape = ModelShape.from_model(skeleton(self.model_settings))
        return self._shape

    def _same_of_all_rows(self, corpus: Corpus, spec: Mapping[str, Any], name: str) -> _Whole | None:
        """The finished stage that differs from ``spec`` in its rows only, and has all usable ones; None: not there."""
        rows = np.flatnonzero(corpus.usable).astype(np.int64)
        if (digest := rows_sha256(rows)) == spec["rows"]:
            return None
        path = stage_path(self.store, name, {**spec, "rows": digest})
        return None if read_manifest(path) is None else _Whole(StageReader(path), corpus, rows)

    def _run(
        self,
        corpus: Corpus,
        rows: IntArray,
        compute: BatchFunction,
        limit: TokenLimit,
        shard: int,
        advance: Callable[[int], None],
    ) -> dict[str, Tensor]:
        """One shard: batches of similar length, then back into the order of ``rows``.

        If a batch does not fit in memory, the shard is begun again with half its size, so that its batches follow from
        the limit alone. Longest rows come first, so that little is lost.
        """
        max_rows = 1 if self.collecting.batch_invariant else None
        tokenized = corpus.take(rows)
        lengths = corpus.lengths[rows]
        most = 0  # rows done in the best attempt, which is how far the progress is
        group: IntArray = np.arange(0)

        def attempt() -> list[tuple[IntArray, Mapping[str, Tensor]]]:
            nonlocal most, group
            done: list[tuple[IntArray, Mapping[str, Tensor]]] = []
            reached = 0
            for group in plan_batches(lengths, batch_tokens=limit.at(shard), max_rows=max_rows):
                batch = collate(rows[group], [tokenized[i] for i in group], _PAD_ID).to(self.loaded.device)
                try:
                    result = {key: value.detach().cpu() for key, value in compute(batch).items()}
                except NonFinite as error:
                    raise _with_places(error, corpus) from error
                done.append((group, result))
                reached += len(group)
                advance(max(0, reached - most))
                most = max(most, reached)
            return done

        done = limit.within_memory(
            shard,
            attempt,
            latest=lambda: (len(group), len(group) * int(lengths[group].max())),
            refuse=lambda: Unsupported(_one_row_too_large(corpus, int(rows[group[0]]))),
        )
        order = np.argsort(np.concatenate([group for group, _ in done]), kind="stable")
        names = list(done[0][1])
        return {key: torch.cat([result[key] for _, result in done])[torch.from_numpy(order)] for key in names}

    def costs(self) -> list[StageCost]:
        """What every stage of this task spent, in the order in which they were first used.

        Rows that a stage took from another one of this task were passed through the model once, and count once.
        """
        for path in dict.fromkeys(self.stages):
            if lost := shards_without_cost(path):
                self.warn(
                    f"{path}: what {lost} of its shards cost is not known (cost-*.jsonl is damaged or gone); the run "
                    "seems cheaper than it was; delete that folder and run again to compute and count it anew"
                )
        own = frozenset(path.name for path in self.stages)
        return [c for path in dict.fromkeys(self.stages) if (c := read_cost(path, paid_by=own)) is not None]


def _described(path: Path, settings: ModelSettings) -> dict[str, Any]:
    """The model's description in a file; of one that is damaged the model says it again, and the user is told."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s is damaged (%s); its model is loaded again to describe it", path, first_line(error))
        found = load_model(settings).description
        if is_main():
            replace_atomically(path, (json.dumps(found, indent=2).encode(),))
    return found


class _Whole:
    """A finished stage over all usable rows of a corpus, and what a part of it cost."""

    def __init__(self, reader: StageReader, corpus: Corpus, rows: IntArray) -> None:
        self._reader, self._corpus, self._rows = reader, corpus, rows

    def columns(self, part: IntArray) -> dict[str, Tensor]:
        """Everything that the stage has of the rows ``part``, as it was stored."""
        positions, found = np.searchsorted(self._rows, part), {}
        for name, record in self._reader.manifest.tensors.items():
            column = torch.from_numpy(self._reader.take(name, positions))
            # Readers widen bfloat16, and shards of a stage must agree in their element types.
            found[name] = column.bfloat16() if record.dtype == "BF16" else column
        return found

    def cost(self, part: IntArray) -> dict[str, Any]:
        """Of ``part``: its own counts, and of seconds and operations its share by tokens."""
        own: dict[str, Any] = {**self._corpus.sizes(part), "taken_from": self._reader.path.name}
        spent = read_cost(self._reader.path)
        share = own["tokens"] / spent.tokens if spent is not None and spent.tokens else 0.0
        own["elapsed_s"] = share * spent.elapsed_s if spent is not None else 0.0
        if spent is not None and spent.operations is not None:
            own["operations"] = share * spent.operations
        return own


def _with_places(error: NonFinite, corpus: Corpus) -> NonFinite:
    """The same error, with the file and row of every position that it names."""
    named = "; ".join(named_row(corpus, row) for row in error.rows[:3])
    return NonFinite(f"{error} [{named}]" if named else str(error), rows=error.rows)


def named_row(corpus: Corpus, row: int) -> str:
    """File and place of a row, as messages name it."""
    example = corpus.examples[row]
    return f"{example.file}, row {example.row} (0-based)"


def _one_row_too_large(corpus: Corpus, row: int) -> str:
    return (
        f"{named_row(corpus, row)}: its {int(corpus.lengths[row])} tokens alone do not fit in "
        "memory; lower --max-length, use --dtype bfloat16, or turn on --gradient-checkpointing"
    )
