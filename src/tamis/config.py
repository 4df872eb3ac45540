"""Settings as a YAML file, written beside each result and read back by ``--config``.

YAML here is YAML 1.1 with one repair: ``1e-5`` is a number, as everyone who types it means it to be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tamis import __version__
from tamis.errors import InvalidInput, first_line
from tamis.values import to_dict

__all__ = ["config_text", "config_verb", "read_config", "read_value", "write_config"]


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses a key written twice, instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is written twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Safe dumping whose idea of what needs quotes is the loader's."""


# PyYAML wants a dot in every float, so that it reads 1e-5 as a text. The rest of the pattern is YAML 1.2's.
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked.

    Raises:
        InvalidInput: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInput(f"{path}: {reason}; expected a YAML file of settings") from error
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path}: {_yaml_problem(error)}; expected YAML, one 'name: value' a line") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidInput(f"{path}: expected a mapping of settings ('name: value'), got {_kind(values)}")
    return values


def config_verb(path: str | Path) -> str | None:
    """The verb whose settings a file written by this library holds; None for a file of anyone else's."""
    with Path(path).open(encoding="utf-8") as file:
        found = re.match(r"# Settings of `tamis (\w+)`", file.readline())
    return None if found is None else found.group(1)


def read_value(text: str) -> Any:
    """A YAML scalar or flow list, as in ``name=value``; an empty text is an empty text.

    Raises:
        InvalidInput: the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader) if text.strip() else ""
    except yaml.YAMLError as error:
        raise InvalidInput(_yaml_problem(error)) from error


def config_text(verb: str, settings: Any, *, held: Sequence[str] = ()) -> str:
    """The resolved settings as YAML, in the order in which they are declared, readable by ``--config``.

    ``held`` names rows in memory, which no file of settings can bring back.
    """
    header = f"# Settings of `tamis {verb}`, all of them, written by tamis {__version__}.\n"
    if held:
        header += (
            f"# This file cannot repeat the run, some of whose rows a Python program held: {', '.join(held)}.\n"
            f"# Call tamis.{verb} with the same rows, or write them to .jsonl files and name those here.\n"
        )
    else:
        header += (
            f"# Repeat with `tamis {verb} --config THIS_FILE` from the folder in which it was first run:\n"
            "# relative paths are relative to the current directory, as they were when they were typed.\n"
        )
    body = yaml.dump(to_dict(settings), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)
    return header + body


def write_config(verb: str, settings: Any, path: Path, *, held: Sequence[str] = ()) -> None:
    """Write ``config_text`` to ``path``.

    Raises:
        InvalidInput: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_text(verb, settings, held=held), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}; pass an --out folder that can be written") from error


def _yaml_problem(error: yaml.YAMLError) -> str:
    """PyYAML's complaint on one line, with the line number a person counts from 1."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return first_line(error)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "a text" if isinstance(value, str) else type(value).__name__
