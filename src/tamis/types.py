"""The frozen dataclasses that cross rooms. Data only: no methods that compute, no model, no disk.

Axis letters, everywhere: ``B`` batch, ``T`` tokens, ``I`` in-features, ``O`` out-features, ``P`` parameters,
``K`` projected dimension, ``N`` pool rows, ``M`` target rows, ``C`` checkpoints, ``R`` rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # only annotations need it, and `tamis --help` must not wait a second and more for its import
    import torch
    from torch import Tensor

__all__ = [
    "Batch",
    "Budget",
    "Curvature",
    "Example",
    "FloatArray",
    "IntArray",
    "LayerSpec",
    "RowFormat",
    "TargetScores",
    "TokenizedExample",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
RowFormat = Literal["messages", "prompt-completion", "instruction", "text"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of the user's data as read, before any tokenizer has seen it.

    Exactly one of ``messages``, ``prompt``/``completion`` (plain strings) and ``text`` is filled. Instruction rows
    (``instruction``/``input``/``output``) and conversational prompt/completion rows arrive as ``messages``;
    ``prompt_messages`` then says how many leading messages are the prompt (never supervised), 0 for chats.
    """

    index: int  # position over all files of the pool (or target), in reading order
    id: str  # the row's own "id", else "<file name>:<row>"
    file: str  # as the user named it
    row: int  # 0-based within the file
    source: str  # the row's "source" field, else the file's stem
    format: RowFormat
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt_messages: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: tuple[Any, ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # the row's "chat_template_kwargs"
    digest: str = ""  # sha256 of what is trained on: equal digests are exact duplicates, whatever their ids
    raw: Mapping[str, Any] = field(default_factory=dict)  # the user's row, untouched


@dataclass(frozen=True, kw_only=True)
class TokenizedExample:
    """Token ids of one row and which of them carry loss."""

    input_ids: npt.NDArray[np.int32]  # (T,)
    supervised: npt.NDArray[np.bool_]  # (T,) True: this token is a label, predicted from the ones before it
    truncated: int  # tokens cut from the end by max_length
    dropped: bool = False  # the chat template left a part of an assistant turn out, such as its reasoning

    @property
    def num_supervised(self) -> int:
        """Labels that count. The first token has nothing before it, so it is never one."""
        return int(self.supervised[1:].sum())


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded rows. ``supervised`` is aligned with ``input_ids`` (not shifted) and False on padding."""

    rows: Tensor  # (B,) int64, positions in the corpus
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on real tokens
    supervised: Tensor  # (B, T) bool

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            rows=self.rows.to(device),
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            supervised=self.supervised.to(device),
        )

    def split(self, rows: int) -> list[Batch]:
        """In parts of at most ``rows`` rows, each without the padding that it does not need."""
        # A row's last label may stand behind its mask: where padding is the end-of-text token, that is often masked.
        used = (self.attention_mask > 0) | self.supervised
        found = []
        for first in range(0, len(self.rows), rows):
            part = slice(first, first + rows)
            width = int(used[part].any(dim=0).nonzero().max()) + 1
            found.append(
                Batch(
                    rows=self.rows[part],
                    input_ids=self.input_ids[part, :width],
                    attention_mask=self.attention_mask[part, :width],
                    supervised=self.supervised[part, :width],
                )
            )
        return found


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One weight matrix whose per-sample gradient is taken, seen as ``(O, I)`` whatever way the module stores it.

    With a trainable bias the matrix is ``(O, I + 1)``: the bias is the column that multiplies a constant input of 1.
    ``kind`` "embedding" is a lookup table ``(V, H)``; "vector" is all else that a module without children trains (a
    norm's scale, a lone bias), its parameters one after the other as one column ``(P, 1)``.
    """

    name: str  # the module's qualified name
    out_features: int
    in_features: int  # without the bias column
    has_bias: bool
    kind: Literal["linear", "conv1d", "head", "embedding", "vector"]

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``, the bias column included."""
        return self.out_features, self.in_features + int(self.has_bias)

    @property
    def numel(self) -> int:
        """Entries of the gradient matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """How each score column bends as rows are taken together: the second-order term of Influence Distillation.

    For weights w of the ``n`` scored rows that sum to n, column c gains ``values[:, c] @ w - w @ Q w / 2`` with
    ``Q = (eta / n) C products[c] C^T``, where ``products`` are ``<g_i, H_c g_j>`` among ``L`` landmarks and C says
    which mixture of landmarks each row is taken for.
    """

    coefficients: FloatArray  # C (n, L); may be a memmap
    products: FloatArray  # (columns, L, L), symmetric, indefinite as a network's Hessian is
    eta: float
    ratio: FloatArray  # (columns,) |second- over first-order term| of the landmarks, equally weighted


@dataclass(frozen=True, kw_only=True)
class TargetScores:
    """What a method says of every scored pool row: positive means that training on it lowers the target loss.

    ``values[i, j]`` is the score of pool row ``rows[i]`` for target row ``j``; ``group[j]`` is the target (an index
    into ``target_names``) that target row ``j`` belongs to. Methods that know no single target rows give one column
    per target; methods that ignore the target give one column per target with equal values.
    ``weights`` says what the selected rows are to weigh: all 1, or robust weights from their scores (see ``choose``),
    which with "second-order" also decide which rows are selected; then ``curvature`` has as many columns as ``values``.
    ``extra`` holds further per-row columns (``loss``, ``grad_norm``, ...) of the same length as ``rows``.
    ``diagnosis`` says in a few words, by subject, how far the scores may be trusted, for a method that can tell.
    """

    rows: IntArray  # (n,) ascending pool rows
    values: FloatArray  # (n, M)
    group: IntArray  # (M,)
    target_names: tuple[str, ...]
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # sentences the report must show, e.g. which form of a method ran
    weights: Literal["equal", "first-order", "second-order"] = "equal"
    curvature: Curvature | None = None
    diagnosis: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to select: a number of rows, a share of the pool's rows, or supervised-plus-prompt tokens."""

    kind: Literal["rows", "share", "tokens"]
    value: float
