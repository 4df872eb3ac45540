"""Where data, model and store meet: a resumable, sharded, batched map over rows, and what a method gets to work with.

Nothing here knows a method. A method asks its ``Task`` for rows, tokens, the model and ``map_rows``; everything it
computes that way survives a kill, is spread over the ranks, and is reused by the next run that asks for the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tamis.data.batches import collate, plan_batches
from tamis.data.examples import Examples
from tamis.data.render import Renderer
from tamis.errors import BadRow, InvalidInput, Unsupported
from tamis.model.load import LoadedModel, ModelSettings, load_model, model_fingerprint
from tamis.model.processes import barrier, is_main, rank, world_size
from tamis.model.targets import gradient_layers
from tamis.protocols import Progress
from tamis.store.atomic import replace_atomically
from tamis.store.manifest import fingerprint
from tamis.store.reader import StageReader
from tamis.store.writer import StageWriter
from tamis.types import Batch, IntArray, LayerSpec, TokenizedExample

__all__ = ["BatchFunction", "Collecting", "Corpus", "NoProgress", "StageCost", "Task", "Work", "tokenize"]

logger = logging.getLogger(__name__)

BatchFunction = Callable[[Batch], Mapping[str, Tensor]]
Work = Literal["none", "forward", "gradient"]

# Rows whose tokens are rendered together: only text work, so large shards cost nothing when a run is killed.
_TOKEN_SHARD_ROWS = 2048


class NoProgress:
    """Says nothing. What the library uses unless the caller passes something that does."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Open a silent stage."""
        yield lambda done: None


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How rows are pushed through the model. None of it changes a score beyond floating-point rounding."""

    batch_tokens: int | None = None  # padded tokens per batch; None: 2,048 on CPU, 16,384 on an accelerator
    batch_invariant: bool = False  # one row per pass, so that no score depends on its batch mates, to the last bit
    shard_rows: int = 256  # rows between two writes; what a kill can lose

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InvalidInput(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if self.shard_rows < 1:
            raise InvalidInput(f"shard_rows must be at least 1, got {self.shard_rows}")


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage spent, summed over shards and ranks, including the runs before a resume."""

    name: str
    work: Work
    rows: int
    tokens: int
    supervised_tokens: int
    squared_tokens: int  # sum over rows of length squared: what attention pays
    elapsed_s: float


class Corpus(Sequence[TokenizedExample]):
    """Rows of the pool or of the targets together with their tokens; ``corpus[i]`` is the tokenized row ``i``."""

    def __init__(self, name: str, examples: Examples, reader: StageReader) -> None:
        self.name = name
        self.examples = examples
        self._reader = reader
        self.lengths: IntArray = reader.read("length").astype(np.int64)
        self.supervised: IntArray = reader.read("supervised_tokens").astype(np.int64)
        self.truncated: IntArray = reader.read("truncated").astype(np.int64)
        self.usable: npt.NDArray[np.bool_] = self.supervised > 0
        self.identity: str = reader.fingerprint

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
            TokenizedExample(input_ids=i.astype(np.int32), supervised=m.astype(np.bool_), truncated=int(self.truncated[r]))
            for i, m, r in zip(ids, masks, rows, strict=True)
        ]

    def problems(self) -> list[tuple[int, str]]:
        """Rows that could not be rendered, with the reason (only with ``on_bad_row="skip"``)."""
        if "error" not in self._reader.names:
            return []
        found = []
        flagged = np.flatnonzero(self._reader.read("failed"))
        for row, text in zip(flagged, self._reader.take_ragged("error", flagged), strict=True):
            found.append((int(row), bytes(text.astype(np.uint8)).decode("utf-8")))
        return found


def tokenize(
    name: str, examples: Examples, renderer: Renderer, *, root: Path, on_bad_row: Literal["fail", "skip"], progress: Progress
) -> Corpus:
    """Render every row to token ids and a label mask, once, into the store, each rank its share.

    Raises:
        BadRow: a row cannot be rendered and ``on_bad_row`` is "fail".
    """
    spec = {"renderer": renderer.identity, "data": examples.content_hash, "on_bad_row": on_bad_row}
    writer = StageWriter(
        root, f"tokens-{name}", spec, num_rows=len(examples), shard_rows=_TOKEN_SHARD_ROWS, rows_digest=examples.content_hash
    )
    with progress.stage(f"tokenize {name}", len(examples), "rows") as advance:
        for shard in _my_shards(writer, advance):
            started = time.perf_counter()
            first, stop = writer.shard_range(shard)
            rendered = [_render(examples, row, renderer, on_bad_row, advance) for row in range(first, stop)]
            tokens = [t for t, _ in rendered]
            errors = [np.frombuffer(e.encode(), dtype=np.uint8).copy() for _, e in rendered]
            writer.write_shard(
                shard,
                {
                    "input_ids": [t.input_ids for t in tokens],
                    "supervised": [t.supervised.astype(np.uint8) for t in tokens],
                    "error": errors,
                    "failed": torch.tensor([len(e) > 0 for e in errors]),
                    "length": torch.tensor([len(t.input_ids) for t in tokens], dtype=torch.int32),
                    "supervised_tokens": torch.tensor([t.num_supervised for t in tokens], dtype=torch.int32),
                    "truncated": torch.tensor([t.truncated for t in tokens], dtype=torch.int32),
                },
            )
            _record_cost(writer.path, shard, time.perf_counter() - started)
    _finish(writer)
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
        rendered, error = TokenizedExample(input_ids=empty, supervised=empty.astype(np.bool_), truncated=0), str(problem)
    advance(1)
    return rendered, error


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
    projection: str | None = None  # the user's choice; None: the method's own default
    projection_dim: int | None = None
    progress: Progress = field(default_factory=NoProgress)
    notes: list[str] = field(default_factory=list)
    stages: list[Path] = field(default_factory=list)  # every stage this run used, for the cost table
    _loaded: LoadedModel | None = None
    _fingerprint: str | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model, loaded when first asked for: a run that finds all its work done never loads it."""
        if self._loaded is None:
            self._loaded = load_model(self.model_settings)
        return self._loaded

    @property
    def fingerprint(self) -> str:
        """Identity of weights, configuration and tokenizer, without loading the weights."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.model_settings)
        return self._fingerprint

    def at_model(self, settings: ModelSettings) -> Task:
        """The same question to another model (a checkpoint, say); notes and costs are shared."""
        return replace(self, model_settings=settings, _loaded=None, _fingerprint=None)

    def model_description(self) -> dict[str, Any]:
        """What the model is, as it was when it was loaded, by this run or by the one that this run resumes."""
        path = self.store / f"model-{fingerprint(self.model_identity())[:12]}.json"
        if self._loaded is not None:
            if is_main():
                replace_atomically(path, (json.dumps(self._loaded.description, indent=2).encode(),))
            return dict(self._loaded.description)
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        return {"name": self.model_settings.name, "fingerprint": self.fingerprint, "loaded": False}

    def layers(self, *, include_head: bool = False) -> tuple[LayerSpec, ...]:
        """The layers whose per-sample gradients count, in the model's order."""
        return gradient_layers(self.loaded.model, include_head=include_head)

    def note(self, sentence: str) -> None:
        """Something the report has to say about this run."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def model_identity(self) -> dict[str, Any]:
        """Everything about the model that a stored number depends on."""
        settings = self.model_settings
        return {"fingerprint": self.fingerprint, "dtype": settings.dtype, "attention": settings.attention}

    def at_model(self, settings: ModelSettings) -> Task:
        """The same question put to another model, a checkpoint for example; loaded when first asked for, freed with it.

        Notes and stages are shared with this task.
        """
        return replace(self, model_settings=settings, _loaded=None, _fingerprint=None)

    def record_cost(self, folder: Path, part: int, elapsed_s: float, **counts: Any) -> None:
        """Add work done outside ``map_rows`` (training) to the cost table; ``part`` numbers the pieces of ``folder``."""
        if folder not in self.stages:
            self.stages.append(folder)
        _record_cost(folder, part, elapsed_s, **counts)

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
        uses_model: bool = True,
    ) -> StageReader:
        """Compute something for every row, once, and return it readable in the order of ``rows``.

        Args:
            corpus: the pool or the target.
            rows: (n,) positions in ``corpus``, all usable.
            name: the stage's name, seen in the store and in the progress.
            spec: everything that determines the numbers besides data and model, which are added here.
            start: called only if a shard is missing; returns the function from a batch to tensors of shape (B, ...).
            work: what a batch costs, for the cost table.
            uses_model: whether the model's identity belongs to the spec.

        Raises:
            StoreMismatch: the folder holds a stage made from something else.
            Unsupported: a single row does not fit in memory.
        """
        rows = np.asarray(rows, dtype=np.int64)
        full_spec: dict[str, Any] = {"stage": name, "tokens": corpus.identity, "rows": _digest_rows(rows), "work": work}
        if uses_model:
            full_spec["model"] = self.model_identity()
        full_spec["settings"] = json.loads(json.dumps(dict(spec), default=str))
        device = torch.device("cpu") if not uses_model else None
        fixed = {"batch_tokens": self.collecting.batch_tokens, "batch_invariant": self.collecting.batch_invariant}
        writer = StageWriter(
            self.store,
            f"{name}-{corpus.name}",
            full_spec,
            num_rows=len(rows),
            shard_rows=self.collecting.shard_rows,
            fixed=fixed,
            rows_digest=full_spec["rows"],
        )
        self.stages.append(writer.path)
        compute: BatchFunction | None = None
        with self.progress.stage(f"{name} ({corpus.name})", len(rows), "rows") as advance:
            for shard in _my_shards(writer, advance):
                if compute is None:
                    compute = start()
                    device = device or self.loaded.device
                started = time.perf_counter()
                first, stop = writer.shard_range(shard)
                part = rows[first:stop]
                columns = self._run(corpus, part, compute, device or torch.device("cpu"), writer.fixed, advance)
                writer.write_shard(shard, columns)
                _record_cost(
                    writer.path,
                    shard,
                    time.perf_counter() - started,
                    work=work,
                    rows=len(part),
                    tokens=int(corpus.lengths[part].sum()),
                    supervised_tokens=int(corpus.supervised[part].sum()),
                    squared_tokens=int((corpus.lengths[part] ** 2).sum()),
                )
        _finish(writer)
        return StageReader(writer.path)

    def _run(
        self,
        corpus: Corpus,
        rows: IntArray,
        compute: BatchFunction,
        device: torch.device,
        fixed: Mapping[str, Any],
        advance: Callable[[int], None],
    ) -> dict[str, Tensor]:
        """One shard: batches of similar length, then back into the order of ``rows``."""
        batch_tokens = fixed["batch_tokens"] or (2048 if device.type == "cpu" else 16384)
        max_rows = 1 if fixed["batch_invariant"] else None
        groups = plan_batches(corpus.lengths[rows], batch_tokens=batch_tokens, max_rows=max_rows)
        tokenized = corpus.take(rows)
        done: list[tuple[IntArray, Mapping[str, Tensor]]] = []
        pending = list(reversed(groups))
        while pending:
            group = pending.pop()
            batch = collate(rows[group], [tokenized[i] for i in group], self._pad_id()).to(device)
            try:
                result = {key: value.detach().cpu() for key, value in compute(batch).items()}
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(group) == 1:
                    raise Unsupported(_one_row_too_large(corpus, int(rows[group[0]]))) from error
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                middle = len(group) // 2
                logger.warning("out of memory with %d rows of %d tokens; halving", len(group), batch.input_ids.shape[1])
                pending += [group[middle:], group[:middle]]
                continue
            done.append((group, result))
            advance(len(group))
        order = np.argsort(np.concatenate([group for group, _ in done]), kind="stable")
        names = list(done[0][1])
        return {key: torch.cat([result[key] for _, result in done])[torch.from_numpy(order)] for key in names}

    def _pad_id(self) -> int:
        # Padded positions are masked and carry no label, so any id of the vocabulary will do.
        return 0

    def costs(self) -> list[StageCost]:
        """What every stage of this task spent, in the order in which they were first used."""
        return [cost for path in dict.fromkeys(self.stages) if (cost := read_cost(path)) is not None]


def read_cost(stage: Path) -> StageCost | None:
    """Sum of the cost records of a stage, None if it wrote none."""
    shards: dict[int, dict[str, Any]] = {}
    for file in sorted(stage.glob("cost-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run; its shard is computed again
            shards[record["shard"]] = record
    if not shards:
        return None
    records = list(shards.values())
    return StageCost(
        name=stage.name.rsplit("-", 1)[0],
        work=records[0].get("work", "none"),
        rows=sum(r.get("rows", 0) for r in records),
        tokens=sum(r.get("tokens", 0) for r in records),
        supervised_tokens=sum(r.get("supervised_tokens", 0) for r in records),
        squared_tokens=sum(r.get("squared_tokens", 0) for r in records),
        elapsed_s=sum(r["elapsed_s"] for r in records),
    )


def _record_cost(stage: Path, shard: int, elapsed_s: float, **more: Any) -> None:
    with (stage / f"cost-{rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"shard": shard, "elapsed_s": round(elapsed_s, 4), **more}) + "\n")


def _my_shards(writer: StageWriter, advance: Callable[[int], None]) -> Iterator[int]:
    """This rank's missing shards. Those already on disk are reported as progress at once."""
    missing = set(writer.missing_shards())
    for shard in range(writer.num_shards):
        if shard % world_size() != rank():
            continue
        if shard in missing:
            yield shard
        else:
            first, stop = writer.shard_range(shard)
            advance(stop - first)


def _finish(writer: StageWriter) -> None:
    barrier()  # every rank has written its shards
    if is_main():
        writer.finish()
    barrier()  # the manifest is there for everyone


def _digest_rows(rows: IntArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def _one_row_too_large(corpus: Corpus, row: int) -> str:
    example = corpus.examples[row]
    return (
        f"{example.file}, row {example.row} (0-based): its {int(corpus.lengths[row])} tokens alone do not fit in memory; "
        "lower --max-length, use --dtype bfloat16, or turn on --gradient-checkpointing"
    )


