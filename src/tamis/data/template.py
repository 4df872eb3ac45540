"""A chat template that tells where in its output each message went.

The template's own loops are marked in its syntax tree: a loop over messages announces the start and the end of each
pass, and ``{% generation %}`` blocks announce themselves. The marks are private-use characters, taken out of the text
again. Nothing is searched for, so no content can be mistaken for structure. Which part of a turn is supervised is
decided in ``render.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

__all__ = ["MarkedTemplate", "MarkedText", "Span"]

Span = tuple[int, int]  # characters, end excluded

_MARK = re.compile("\U0010fb10([a-z])([0-9]+)(?:,([0-9]+))?\U0010fb11")
_OPEN, _CLOSE = "\U0010fb10", "\U0010fb11"
_ENTER, _LEAVE = "tamis_enter_pass", "tamis_leave_pass"


@dataclass
class MarkedText:
    """What a template wrote, and where."""

    text: str = ""
    turns: dict[int, list[Span]] = field(default_factory=dict)  # message -> non-empty passes of loops that wrote it
    generated: list[Span] = field(default_factory=list)  # insides of {% generation %} blocks


class MarkedTemplate:
    """A chat template, compiled once in a sandbox like the one that Transformers uses."""

    def __init__(self, source: str) -> None:
        self.source = source
        environment = _environment()
        tree = environment.parse(source)
        self.names: frozenset[str] = frozenset(name.name for name in tree.find_all(nodes.Name))
        self.has_generation_marks: bool = any(_is_mark(node) for node in tree.find_all(nodes.TemplateData))
        _mark_loops(tree)
        code = environment.compile(tree)
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> MarkedText:
        """The text for ``messages`` and the parts of it that each message wrote.

        Raises:
            jinja2.TemplateError and whatever the template's expressions raise on data they do not expect.
        """
        numbers = {id(message): index for index, message in enumerate(messages)}

        def enter(loop: int, target: Any) -> str:
            index = numbers.get(id(target))
            return _mark("c", loop) if index is None else f"{_OPEN}t{loop},{index}{_CLOSE}"

        def leave(loop: int) -> str:
            return _mark("c", loop)

        return _unmark(self._template.render({**variables, "messages": list(messages), _ENTER: enter, _LEAVE: leave}))


def _mark(kind: str, number: int) -> str:
    return f"{_OPEN}{kind}{number}{_CLOSE}"


def _is_mark(node: nodes.TemplateData) -> bool:
    return node.data.startswith(_OPEN)


class _GenerationBlocks(jinja2.ext.Extension):
    """``{% generation %}`` as Transformers defines it: its body, here between two marks."""

    tags = {"generation"}  # noqa: RUF012 - the attribute as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opened = nodes.Output([nodes.TemplateData(_mark("g", 1))])
        closed = nodes.Output([nodes.TemplateData(_mark("g", 0))])
        return nodes.Scope([opened, *body, closed]).set_lineno(line)


def _mark_loops(tree: nodes.Template) -> None:
    """Announce each pass of each loop over single names: ``{% for message in ... %}``."""
    for number, loop in enumerate(list(tree.find_all(nodes.For))):
        if not isinstance(loop.target, nodes.Name):
            continue
        target = nodes.Name(loop.target.name, "load")
        entered = nodes.Call(nodes.Name(_ENTER, "load"), [nodes.Const(number), target], [], None, None)
        left = nodes.Call(nodes.Name(_LEAVE, "load"), [nodes.Const(number)], [], None, None)
        # The next pass closes the one before it too, since {% continue %} and {% break %} jump over the last mark.
        loop.body = [nodes.Output([entered]), *loop.body, nodes.Output([left])]
        for node in loop.body:
            node.set_lineno(loop.lineno, override=False)


def _unmark(marked: str) -> MarkedText:
    """Split the marks off and turn them into spans."""
    result = MarkedText()
    pieces: list[str] = []
    position, last = 0, 0
    open_passes: dict[int, tuple[int, int]] = {}  # loop -> (message, where its pass began)
    open_blocks: list[int] = []
    for match in _MARK.finditer(marked):
        pieces.append(marked[last : match.start()])
        position += match.start() - last
        last = match.end()
        kind, number = match[1], int(match[2])
        if kind == "g":
            if number:
                open_blocks.append(position)
            elif open_blocks:
                result.generated.append((open_blocks.pop(), position))
            continue
        _close_pass(result, open_passes, number, position)
        if kind == "t":
            open_passes[number] = (int(match[3]), position)
    pieces.append(marked[last:])
    result.text = "".join(pieces)
    for number in list(open_passes):
        _close_pass(result, open_passes, number, len(result.text))
    return result


def _close_pass(result: MarkedText, open_passes: dict[int, tuple[int, int]], loop: int, position: int) -> None:
    if loop in open_passes:
        message, start = open_passes.pop(loop)
        if position > start:  # loops that only look ahead write nothing
            result.turns.setdefault(message, []).append((start, position))


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What Transformers gives chat templates: trimmed blocks, loop controls, plain JSON and two helpers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
