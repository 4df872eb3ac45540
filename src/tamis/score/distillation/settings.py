"""Settings of influence distillation: those its paper publishes, by name, and which values can be.

The dataclass itself is ``influence_distillation.InfluenceDistillation``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tamis.errors import InvalidSettings
from tamis.score.distillation.candidates import EMBEDDING_NAMES
from tamis.values import nearest

__all__ = ["PRESETS", "check_distillation", "landmark_count", "preset_values"]

# Sections 4 and 5.1, appendix J. The paper names no bandwidth: ours is twice the median distance. What is done
# otherwise whatever the settings, from landmarks that keep their own scores to the clipping of the warm-up, is listed
# under "As published" in docs/methods/influence-distillation.md.
_PAPER: dict[str, Any] = {
    "landmarks": 4096,
    "landmark_rule": "uniform",
    "embedding": "jvp",
    "depth": 4,
    "directions": 2,
    "positions": "last",
    "combine": "mean",
    "kernel": "rbf",
    "scale": 2.0,
    "damping": 0.01,
    "centred": False,
    "residual": False,
    "form": "adam",
    "warmup": "full",
    "warmup_rows": 10_000,
    "warmup_epochs": 2,
    "warmup_update_rows": 128,
    "warmup_learning_rate": 2e-5,
    "projection": "hadamard",
    "projection_dim": 131_072,
    "weights": "none",
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    # The "Grad" row of table 2: the true gradient of every row, which leaves nothing to be carried. Up to the warm-up
    # and Adam's momentum it is LESS at one checkpoint.
    "true-gradients": {**_PAPER, "landmarks": "all"},
}

_FEWEST = 256  # landmarks by "auto", where they are not all rows

# Which embeddings read a setting that shapes them; "auto" reads them all.
_READ_BY: dict[str, tuple[str, ...]] = {
    "embedding_budget": (),
    "depth": ("error-outer", "error", "hidden-error", "hidden-mean", "jvp", "lens-gradient"),
    "directions": ("jvp",),
    "positions": ("jvp",),
    "combine": ("jvp",),
    "side": ("error-outer", "lens-gradient", "tail-gradient", "gradient"),
    "tail_blocks": ("tail-gradient",),
}

_OF_WARM_UP = ("warmup_pool_share", "warmup_rows", "warmup_epochs", "warmup_update_rows", "warmup_learning_rate")
_OF_ADAPTER = ("lora_rank", "lora_alpha")  # of the warm-up
_OF_TRANSFER = (
    *("landmark_rule", "embedding", "given", "keep_embeddings", *_READ_BY),
    *("kernel", "scale", "damping", "centred", "half_whitening", "residual"),
)


def preset_values(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        InvalidSettings: there is none of that name.
    """
    if name not in PRESETS:
        raise InvalidSettings(f"preset={name!r} is unknown; there is {', '.join(PRESETS)}")
    return PRESETS[name]


def landmark_count(landmarks: int | str, rows: int) -> int:
    """How many of ``rows`` rows are to get gradients of their own; a number is taken as it was given.

    "auto" is a tenth, so that landmarks stay a small part of the cost of gradients for all, but at least 256, below
    which leave-one-out says little of what to expect, and at most the 4,096 of the paper. Up to 768 rows it is all of
    them: at the default budget, 256 gradients, as many rows embedded in every way to be compared, and an embedding of
    all rows cost about as much as 768 gradients, and these are exact.
    """
    if landmarks == "all" or (landmarks == "auto" and rows <= 3 * _FEWEST):
        return rows
    if landmarks == "auto":
        return max(_FEWEST, min(4096, rows // 10))
    return int(landmarks)


def check_distillation(chosen: Any) -> None:
    """Refuse values out of range and values that do not go together.

    Args:
        chosen: an ``InfluenceDistillation``, presets filled in and types checked.

    Raises:
        InvalidSettings: naming the setting.
    """
    if chosen.embedding not in EMBEDDING_NAMES:
        near = nearest(chosen.embedding, EMBEDDING_NAMES)
        raise InvalidSettings(f"embedding={chosen.embedding!r}: expected one of {', '.join(EMBEDDING_NAMES)}{near}")
    numbers = {"landmarks": 2, "hessian_landmarks": 2, "directions": 1, "tail_blocks": 1, "lora_rank": 1}
    for field, least in numbers.items():
        if not isinstance(getattr(chosen, field), str) and getattr(chosen, field) < least:
            raise InvalidSettings(f"{field} must be at least {least}, got {getattr(chosen, field)}")
    for field in ("depth", "side", "warmup_rows"):
        value = getattr(chosen, field)
        if value is not None and value < (0 if field == "depth" else 1):
            raise InvalidSettings(f"{field} must be at least {0 if field == 'depth' else 1}, got {value}")
    for field in ("scale", "damping", "lora_alpha", "eta", "memory_gb"):
        value = getattr(chosen, field)
        if value is not None and not value > 0:
            raise InvalidSettings(f"{field} must be positive, got {value}")
    if chosen.eta is not None and not _is_second_order(chosen):
        raise InvalidSettings(
            "eta is read by the second-order term only; set weights=second-order or hessian_ratio=true, or drop eta "
            "(the warm-up's learning rate is warmup_learning_rate)"
        )
    if chosen.eta is None and _is_second_order(chosen) and (chosen.warmup == "none" or chosen.moments is not None):
        without = "moments, there is no warm-up" if chosen.moments is not None else "warmup=none, there is none"
        raise InvalidSettings(
            "eta, the learning rate of the second-order term, is the warm-up's unless it is given, and with "
            f"{without}: set eta to the learning rate that you will train with"
        )
    if chosen.embedding_budget < 0:
        raise InvalidSettings(f"embedding_budget must be at least 0, got {chosen.embedding_budget}")
    if not 0 < chosen.warmup_pool_share <= 1:
        raise InvalidSettings(f"warmup_pool_share must be above 0 and at most 1, got {chosen.warmup_pool_share}")
    if chosen.embedding == "given" and not chosen.given:
        raise InvalidSettings("embedding=given needs given, the folder of the embeddings")
    if chosen.given and chosen.embedding not in ("given", "auto"):
        raise InvalidSettings(f"given names a folder of embeddings, which embedding={chosen.embedding!r} does not use")
    if chosen.landmark_rule != "uniform" and chosen.embedding == "auto":
        raise InvalidSettings(
            f"landmark_rule={chosen.landmark_rule!r} looks at embeddings of all rows before any is chosen; name an "
            "embedding, or take uniform landmarks"
        )
    if chosen.moments is not None and chosen.form != "adam":
        raise InvalidSettings(
            f"moments are read for form=adam only, and form={chosen.form!r}; set form=adam, or drop moments and set "
            "warmup=none to take the model as it is"
        )
    if chosen.form == "adam" and chosen.warmup == "none" and chosen.moments is None:
        raise InvalidSettings("form=adam needs Adam's moments: warm up, or give a checkpoint folder as moments")
    _check_read(chosen)


def _is_second_order(chosen: Any) -> bool:
    """Whether Hessian products are taken."""
    return bool(chosen.weights == "second-order" or chosen.hessian_ratio)


def _check_read(chosen: Any) -> None:
    """Refuse a value that is not its default where nothing reads it: whoever set it expects it to do something.

    A preset's own value may stand beside settings that leave it unread.
    """
    second = _is_second_order(chosen)
    warms_up = chosen.warmup != "none" and chosen.moments is None
    no_warm_up = f"of no use with {'moments' if chosen.moments is not None else 'warmup=none'}: there is no warm-up"
    carries = chosen.landmarks != "all" or chosen.weights == "second-order"
    rules: list[tuple[tuple[str, ...], bool, str]] = [  # settings, whether anything reads them, and why not
        (("scale",), chosen.kernel != "linear", "of no use with kernel=linear, which has none"),
        (("half_whitening",), chosen.kernel != "linear", "of no use with kernel=linear, which is not tried on it"),
        ((*_OF_WARM_UP, *_OF_ADAPTER), warms_up, no_warm_up),
        (("warmup",), chosen.moments is None, "of no use with moments, which take its place"),
        (_OF_ADAPTER, chosen.warmup != "full", "of no use with warmup=full, which trains no adapter"),
        (("warmup_pool_share",), chosen.warmup_rows is None, "of no use with warmup_rows, which say how many"),
        (_OF_TRANSFER, carries, "of no use with landmarks=all, which leave no row to be carried to"),
        (
            ("hessian_landmarks", "memory_gb"),
            second,
            "read by the second-order term only (weights=second-order or hessian_ratio=true)",
        ),
        (
            ("momentum",),
            chosen.weights == "second-order" and chosen.form == "adam",
            "read with form=adam and weights=second-order only",
        ),
    ]
    rules += [
        ((name,), chosen.embedding in ("auto", *readers), f"read by embedding {' or '.join(readers) or 'auto'} only")
        for name, readers in _READ_BY.items()
    ]
    unread = {name: why for names, is_read, why in reversed(rules) if not is_read for name in names}
    preset = {} if chosen.preset is None else preset_values(chosen.preset)
    for field in dataclasses.fields(chosen):
        value = getattr(chosen, field.name)
        is_asked_for = value != field.default and value != preset.get(field.name, field.default)
        if is_asked_for and field.name in unread:
            raise InvalidSettings(
                f"{field.name}={value!r} would change nothing: it is {unread[field.name]}; leave it out"
            )
