"""Which embeddings may carry the landmarks' scores: the one that is named, or all that a budget and a model allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.data.batches import collate
from tamis.embeddings import EMBEDDINGS, ErrorOuter, Given, Jvp, ModelEmbedding, TfIdf
from tamis.errors import InvalidSettings, NonFinite, Unsupported, first_line
from tamis.model.blocks import Decoder
from tamis.model.head import head_of
from tamis.model.memory import is_out_of_memory
from tamis.score.distillation.row_embeddings import AnyEmbedding, identity_of, is_model_embedding
from tamis.seeds import child_seed
from tamis.types import Batch

__all__ = [
    "EMBEDDING_NAMES",
    "EmbeddingSettings",
    "beyond_the_budget",
    "blocks_beyond_the_model",
    "candidate_embeddings",
    "embeddings_within",
    "label_of",
    "nominal_passes",
]

EMBEDDING_NAMES = ("auto", *EMBEDDINGS)

_DEPTH = 4  # blocks that shallow embeddings run through, as published
_NEED_HEAD = ("error", "error-outer", "hidden-error", "jvp")
_NEED_FIRST_LAYERS = ("jvp", "lens-gradient")  # which move or differentiate the weights of the first blocks


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """What the user says of embeddings."""

    name: str
    budget: float  # forward passes a row, head and sketches not counted
    depth: int | None
    directions: int
    positions: Literal["mean", "last"]
    combine: Literal["mean", "concat"]
    side: int | None
    tail_blocks: int
    given: str | None

    def identity(self, *corpora: Corpus) -> dict[str, Any]:
        """The same with what the given folder holds in place of its name; ``corpora`` are looked up in it by their ids.

        Raises:
            InvalidInput: the folder is not as ``Given`` describes it.
        """
        plain = dataclasses.asdict(self)
        if self.given is not None:
            plain["given"] = identity_of(Given(path=self.given), *corpora)
        return plain


def candidate_embeddings(settings: EmbeddingSettings, task: Task) -> tuple[AnyEmbedding, ...]:
    """Those for the task's model, by seeds that are not those of the landmarks' own projection.

    With "auto", a note says which ones the model or a setting beside the budget does not allow, and why.

    Raises:
        InvalidSettings: a setting is out of an embedding's range.
    """
    seed = child_seed(task.seed, "embedding") % 2**31
    found = embeddings_within(settings, _blocks_of(task), seed)
    for sentence in beyond_the_budget(settings, task):
        task.note(sentence)
    return _possible(task, found) if settings.name == "auto" else found


def blocks_beyond_the_model(settings: EmbeddingSettings, task: Task) -> tuple[str, ...]:
    """A sentence for each setting that asks for more blocks than the task's model has."""
    blocks = _blocks_of(task)
    uses_tail = any(e.name == "tail-gradient" for e in embeddings_within(settings, blocks, 0))
    tail = settings.tail_blocks if uses_tail else None
    return tuple(
        f"{name}={asked} was asked for, but the model has {blocks} block{'s' if blocks > 1 else ''}; all are used"
        for name, asked in (("depth", settings.depth), ("tail_blocks", tail))
        if asked is not None and asked > blocks
    )


def _blocks_of(task: Task) -> int:
    config: Any = task.loaded.model.config
    return int(config.get_text_config().num_hidden_layers)


def embeddings_within(settings: EmbeddingSettings, blocks: int, seed: int) -> tuple[AnyEmbedding, ...]:
    """The embedding that is named, or with "auto" all that cost no more than the budget, the cheapest first.

    Args:
        settings: the user's.
        blocks: of the model.
        seed: of sketches and directions.

    Raises:
        InvalidSettings: a setting is out of an embedding's range.
    """
    if settings.name == "auto":
        return tuple(e for e in _shaped(settings, blocks, seed) if _is_within(settings, e, blocks))
    return _shaped(settings, blocks, seed)


def beyond_the_budget(settings: EmbeddingSettings, task: Task) -> tuple[str, ...]:
    """A sentence for each embedding that "auto" would try if it were not for a setting that shapes it."""
    if settings.name != "auto":
        return ()
    blocks = _blocks_of(task)
    found = {e.name for e in embeddings_within(settings, blocks, 0)}
    shaped = {e.name: e for e in _shaped(settings, blocks, 0)}
    plain = dataclasses.replace(settings, depth=None, combine="mean", tail_blocks=1)
    sentences = []
    for embedding in embeddings_within(plain, blocks, 0):
        name = embedding.name
        if name in found:
            continue
        if name not in shaped:
            sentences.append(f"Embedding {name} was not tried: it runs through at least one block, and depth=0")
            continue
        given = f"depth={settings.depth}"
        if name == "tail-gradient":
            given = f"tail_blocks={settings.tail_blocks}"
        elif name == "jvp" and settings.combine == "concat":
            several = f"directions={settings.directions} with combine=concat"
            given = several if settings.depth is None else f"{given}, {several}"
        sentences.append(
            f"Embedding {label_of(shaped[name])} was not tried: {given} costs "
            f"{nominal_passes(shaped[name], blocks):.3g} forward passes a row, above "
            f"embedding_budget={settings.budget:g}"
        )
    return tuple(sentences)


def _is_within(settings: EmbeddingSettings, embedding: AnyEmbedding, blocks: int) -> bool:
    return nominal_passes(embedding, blocks) <= settings.budget + 1e-9


def _shaped(settings: EmbeddingSettings, blocks: int, seed: int) -> tuple[AnyEmbedding, ...]:
    """The embedding that is named, or all that "auto" knows, the cheapest first and whatever they cost."""
    sides = {} if settings.side is None else {"side": settings.side}

    def shallow(per_block: float) -> dict[str, Any] | None:
        """The depth as given, else the largest within the budget up to the published one, but one block at least."""
        fitting = blocks if settings.name != "auto" else int(settings.budget * blocks / per_block + 1e-9)
        depth = min(_DEPTH, blocks, max(1, fitting)) if settings.depth is None else min(settings.depth, blocks)
        return {"depth": depth} if depth >= 1 else None

    passes = 1 if settings.combine == "mean" else settings.directions
    jvp = {
        "directions": settings.directions,
        "positions": settings.positions,
        "combine": settings.combine,
        "seed": seed,
    }
    whole: dict[str, Any] = {"depth": None if settings.depth is None else min(settings.depth, blocks)}
    tail = {"blocks": min(settings.tail_blocks, blocks), **sides, "seed": seed}
    named: dict[str, dict[str, Any] | None] = {
        "error-outer": {**whole, **sides, "seed": seed},
        "error": whole,
        "hidden-error": whole,
        "hidden-mean": whole,
        "rds": {},
        "jvp": _joined(shallow(3 * passes), jvp),
        "lens-gradient": _joined(shallow(2), {**sides, "seed": seed}),
        "tail-gradient": tail,
        "gradient": {**sides, "seed": seed},
        "tfidf": {"seed": seed},
        "given": {"path": settings.given or ""},
    }
    if settings.name != "auto":
        fields = named[settings.name]
        if fields is None:
            raise InvalidSettings(
                f"depth={settings.depth}: embedding={settings.name!r} runs through at least one block; raise depth, or "
                "name error-outer, which needs none"
            )
        return (EMBEDDINGS[settings.name](**fields),)
    found: list[tuple[str, dict[str, Any] | None]] = [
        ("tfidf", named["tfidf"]),
        ("given", named["given"] if settings.given else None),
        ("error-outer", {**sides, "seed": seed, "depth": 0}),
        ("error", shallow(1)),
        ("jvp", named["jvp"]),
        ("lens-gradient", named["lens-gradient"]),
        ("hidden-error", {}),
        ("error-outer", {**sides, "seed": seed}),
        ("tail-gradient", tail),
        ("gradient", named["gradient"]),
    ]
    return tuple(EMBEDDINGS[name](**fields) for name, fields in found if fields is not None)


def nominal_passes(embedding: AnyEmbedding, blocks: int) -> float:
    """Passes through all blocks that a row costs: forward and back are one each, a tangent two; the head is left out.

    What a budget is held against: round figures that do not hang on a model's vocabulary. ``forward_passes`` counts.
    """
    if not is_model_embedding(embedding):
        return 0.0
    settings: Any = embedding
    depth = getattr(settings, "depth", None)
    share = 1.0 if depth is None else depth / blocks
    if settings.name == "jvp":
        return 3 * share * (1 if settings.combine == "mean" else settings.directions)
    if settings.name == "tail-gradient":
        return 1 + float(settings.blocks) / blocks
    return 2 * share if settings.name in ("lens-gradient", "gradient") else share


def label_of(embedding: AnyEmbedding) -> str:
    """Its name, and its depth where that tells two of a name apart."""
    depth = getattr(embedding, "depth", None)
    if depth is None:
        return embedding.name
    if isinstance(embedding, ErrorOuter) and depth == 0:
        return "error-outer of no block"
    return f"{embedding.name} of {depth} block{'s' if depth > 1 else ''}"


def _possible(task: Task, candidates: Sequence[AnyEmbedding]) -> tuple[AnyEmbedding, ...]:
    """Those that the task's model allows, each tried on one row; a note says what is left out and why."""
    found = []
    for embedding in candidates:
        why = None if isinstance(embedding, (TfIdf, Given)) else _hindrance(task, embedding)
        if why is None:
            found.append(embedding)
        else:
            task.note(f"Embedding {label_of(embedding)} was not tried: {why}")
    return tuple(found)


def _hindrance(task: Task, embedding: ModelEmbedding) -> str | None:
    """Why the task's model cannot be embedded in this way; None: it can."""
    model, depth = task.loaded.model, getattr(embedding, "depth", None)
    try:
        if embedding.name in _NEED_HEAD:
            head_of(model)
        if depth is not None or embedding.name == "tail-gradient":
            Decoder.of(model)
        if embedding.name in _NEED_FIRST_LAYERS:
            _require_layers_in_first_blocks(task, int(depth or 0))
        # One direction is enough to learn whether the model runs in forward mode.
        tried = dataclasses.replace(embedding, directions=1) if isinstance(embedding, Jvp) else embedding
        tried.start(model)(_shortest_row(task))
    except Unsupported as error:
        return str(error)
    except NonFinite:
        return None  # the pass over all rows names the row by its place in the file
    except RuntimeError as error:
        # Kernels that lack a rule for forward mode each have an error of their own to say so.
        if is_out_of_memory(error):
            return None  # as above; other batches may have more room
        if not isinstance(embedding, Jvp):
            raise
        return f"{type(model).__name__} cannot be run in forward mode ({first_line(error)})"
    return None


def _require_layers_in_first_blocks(task: Task, depth: int) -> None:
    decoder, layers = Decoder.of(task.loaded.model), task.layers()
    inside = {id(module) for block in list(decoder.blocks)[:depth] for module in block.modules()}
    if not any(id(task.loaded.model.get_submodule(layer.name)) in inside for layer in layers):
        raise Unsupported(f"none of the {len(layers)} layers that carry gradients lies in the first {depth} blocks")


def _shortest_row(task: Task) -> Batch:
    row = task.rows[[int(np.argmin(task.pool.lengths[task.rows]))]]
    return collate(row, task.pool.take(row), 0).to(task.loaded.device)


def _joined(first: dict[str, Any] | None, second: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if first is None else {**first, **second}
