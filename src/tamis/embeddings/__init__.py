"""Cheap vectors of rows that stand in for their gradients, by the name a user types."""

from __future__ import annotations

from tamis.embeddings.cost import forward_passes
from tamis.embeddings.errors import ErrorMean, ErrorOuter, HiddenError
from tamis.embeddings.given import Given, save_embeddings
from tamis.embeddings.gradients import Gradient, LensGradient, TailGradient
from tamis.embeddings.jvp import Jvp
from tamis.embeddings.kinds import ModelEmbedding, RowFunction, TextEmbedder, TextEmbedding
from tamis.embeddings.states import HiddenMean, Rds
from tamis.embeddings.text import TfIdf

__all__ = [
    "EMBEDDINGS",
    "ErrorMean",
    "ErrorOuter",
    "Given",
    "Gradient",
    "HiddenError",
    "HiddenMean",
    "Jvp",
    "LensGradient",
    "ModelEmbedding",
    "Rds",
    "RowFunction",
    "TailGradient",
    "TextEmbedder",
    "TextEmbedding",
    "TfIdf",
    "forward_passes",
    "save_embeddings",
]

# `given` has `rows(ids)`, `tfidf` has `fit(texts)`; all others have `start(model)` and `operations(...)`.
EMBEDDINGS = {
    "error-outer": ErrorOuter,
    "error": ErrorMean,
    "hidden-error": HiddenError,
    "hidden-mean": HiddenMean,
    "rds": Rds,
    "jvp": Jvp,
    "lens-gradient": LensGradient,
    "tail-gradient": TailGradient,
    "gradient": Gradient,
    "tfidf": TfIdf,
    "given": Given,
}
