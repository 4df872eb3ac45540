"""Which embeddings may carry the landmarks' scores: the one that is named, or all that a budget and a model allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tamis.collect import Task
from tamis.corpus import Corpus
from tamis.embeddings import EMBEDDINGS, ErrorOuter, Given
from tamis.errors import InvalidSettings, Unsupported
from tamis.model.blocks import Decoder
from tamis.model.head import head_of
from tamis.score.row_embeddings import AnyEmbedding, identity_of, is_model_embedding
from tamis.seeds import child_seed

__all__ = [
    "EMBEDDING_NAMES",
    "EmbeddingSettings",
    "blocks_beyond_the_model",
    "candidate_embeddings",
    "embeddings_within",
    "label_of",
    "nominal_passes",
]

EMBEDDING_NAMES = ("auto", *EMBEDDINGS)

_DEPTH = 4  # blocks that shallow embeddings run through, as published
_NEED_HEAD = ("error", "error-outer", "hidden-error", "jvp")


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

    With "auto", a note says which ones the model does not allow, and why.

    Raises:
        InvalidSettings: a setting is out of an embedding's range.
    """
    seed = child_seed(task.seed, "embedding") % 2**31
    found = embeddings_within(settings, _blocks_of(task), seed)
    return _possible(task, found) if settings.name == "auto" else found


def blocks_beyond_the_model(settings: EmbeddingSettings, task: Task) -> tuple[str, ...]:
    """A sentence for each setting that asks for more blocks than the task's model has."""
    blocks = _blocks_of(task)
    tail = settings.tail_blocks if settings.name == "tail-gradient" else None
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
    sides = {} if settings.side is None else {"side": settings.side}

    def shallow(name: str, per_block: float) -> dict[str, Any] | None:
        """The depth as given, else the largest within the budget up to the published one."""
        fitting = blocks if settings.name != "auto" else int(settings.budget * blocks / per_block + 1e-9)
        depth = min(_DEPTH, blocks, fitting) if settings.depth is None else min(settings.depth, blocks)
        return {"depth": depth} if 1 <= depth <= fitting else None

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
        "jvp": _joined(shallow("jvp", 3 * passes), jvp),
        "lens-gradient": _joined(shallow("lens-gradient", 2), {**sides, "seed": seed}),
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
        ("error", shallow("error", 1)),
        ("jvp", named["jvp"]),
        ("lens-gradient", named["lens-gradient"]),
        ("hidden-error", {}),
        ("error-outer", {**sides, "seed": seed}),
        ("tail-gradient", tail),
        ("gradient", named["gradient"]),
    ]
    made: list[AnyEmbedding] = [EMBEDDINGS[name](**fields) for name, fields in found if fields is not None]
    return tuple(e for e in made if nominal_passes(e, blocks) <= settings.budget + 1e-9)


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
    """Those that the model's head and blocks allow; a note says what is left out and why."""
    reasons: dict[str, str] = {}
    try:
        head_of(task.loaded.model)
    except Unsupported as error:
        reasons["head"] = str(error)
    try:
        Decoder.of(task.loaded.model)
    except Unsupported as error:
        reasons["blocks"] = str(error)

    def reason(embedding: AnyEmbedding) -> str | None:
        by_blocks = getattr(embedding, "depth", None) is not None or embedding.name == "tail-gradient"
        if embedding.name in _NEED_HEAD and "head" in reasons:
            return reasons["head"]
        return reasons.get("blocks") if by_blocks else None

    left_out = {label_of(e): why for e in candidates if (why := reason(e)) is not None}
    for label, why in left_out.items():
        task.note(f"Embedding {label} was not tried: {why}")
    return tuple(e for e in candidates if reason(e) is None)


def _joined(first: dict[str, Any] | None, second: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if first is None else {**first, **second}
