"""What the verbs are called with, as settings that a file could hold; rows in memory are set aside under a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import nn

from tamis.data.rows import Rows, are_rows, checked_rows, held_name
from tamis.errors import InvalidSettings
from tamis.notation import check_target_name
from tamis.progress import choose_progress
from tamis.protocols import Method, Progress
from tamis.values import changed_values

__all__ = [
    "as_module",
    "as_progress",
    "check_method_object",
    "data_values",
    "path_of",
    "paths_of",
    "plain",
    "plain_settings",
    "refuse_out",
    "targets_of",
    "trace_values",
]

Values = dict[str, Any]


def as_progress(progress: Progress | bool | None) -> Progress | None:
    """What speaks for ``progress=True``; anything else as it is.

    Raises:
        InvalidSettings: it cannot open a stage.
    """
    if progress is True:
        return choose_progress(Console(stderr=True), quiet=False)
    if progress is False or progress is None:
        return None
    if not callable(getattr(progress, "stage", None)):
        raise InvalidSettings(
            f"progress={progress!r}: expected True for a bar, None, or an object with stage(name, total, unit)"
        )
    return progress


def data_values(model: Any, pool: Any, target: Any, settings: Mapping[str, Any], held: dict[str, Rows]) -> Values:
    """Of a verb that reads a pool and a target."""
    return {
        "model": path_of(model, "model"),
        "pool": paths_of(pool, "pool", held),
        "target": targets_of(target, "target", held),
        **plain(settings),
    }


def trace_values(
    run: Any, target: Any, out: Any, model: Any, settings: Mapping[str, Any], held: dict[str, Rows]
) -> Values:
    """Of a verb that reads a recorded run; a model that is an object is no setting."""
    return {
        "run": path_of(run, "run"),
        "target": targets_of(target, "target", held),
        "out": path_of(out, "out"),
        **({"model": str(model)} if isinstance(model, str | Path) else {}),
        **plain(settings),
    }


def path_of(value: Any, name: str) -> str:
    """The name or path as text.

    Raises:
        InvalidSettings: it is neither: None, say, would be a folder of that name.
    """
    if not isinstance(value, (str, Path)):
        raise InvalidSettings(f"{name}: expected a text or a path, got {type(value).__name__}")
    return str(value)


def plain(settings: Mapping[str, Any]) -> Values:
    """Settings with paths as text."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def as_module(model: Any) -> nn.Module | None:
    """The model, if it was given as an object."""
    return None if model is None or isinstance(model, str | Path) else model


def check_method_object(method: Any, example: str, *, does: Literal["score", "choose"]) -> None:
    """Refuse a method that is neither a name nor an object that ``does`` what the verb needs.

    Raises:
        InvalidSettings: it is, say, a class, or of the other verb: both have a ``TracIn``.
    """
    if isinstance(method, str):
        return
    if isinstance(method, type) or not dataclasses.is_dataclass(method):
        raise InvalidSettings(
            f"method: expected a name or a method object such as {example}, got {type(method).__name__}"
        )
    if not hasattr(method, does):
        other = "chooses while training, with tamis.train" if does == "score" else "scores a pool, with tamis.select"
        raise InvalidSettings(
            f"method: {type(method).__module__}.{type(method).__name__} {other}; expected one such as {example}"
        )


def refuse_out(verb: str, settings: Mapping[str, Any]) -> None:
    """Refuse a folder for a verb that writes nothing.

    Raises:
        InvalidSettings: there is one.
    """
    if settings.get("out") is not None:
        raise InvalidSettings(f"out: {verb} writes nothing; leave it out, and keep what it returns")


def targets_of(
    given: str | Path | Sequence[str | Path] | Rows | Mapping[str, str | Path | Rows], what: str, held: dict[str, Rows]
) -> list[str]:
    """``NAME=PATH`` or paths; rows go to ``held``."""
    if isinstance(given, Mapping):
        for key in given:
            check_target_name(str(key), what)
        return [f"{key}={path}" for key, one in given.items() for path in paths_of(one, f"{what} {key}", held)]
    return [f"target={text}" if text in held else text for text in paths_of(given, what, held)]


def paths_of(given: str | Path | Sequence[str | Path] | Rows, what: str, held: dict[str, Rows]) -> list[str]:
    """The paths that were given; rows go to ``held``, under the name that is returned in their place."""
    if are_rows(given):
        held[held_name(what)] = checked_rows(given, what)
        return [held_name(what)]
    return [str(given)] if isinstance(given, (str, Path)) else [str(path) for path in given]


def plain_settings(method: Method) -> dict[str, Any]:
    """The settings of a method object that are not its defaults, as ``--set`` would state them."""
    changed = changed_values(method)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
