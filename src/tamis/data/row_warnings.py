"""What a user should know of rows before relying on them, in sentences: verbs keep these with their other warnings."""

from __future__ import annotations

from collections.abc import Sequence

from tamis.data.examples import Examples
from tamis.data.render import Renderer

__all__ = ["bad_row_warnings", "row_warnings", "tool_warnings"]


def row_warnings(examples: Examples, renderer: Renderer, kind: str) -> list[str]:
    """Of the rows that are used: tools that the model will not see, and ids that do not tell rows apart."""
    found = tool_warnings(examples, renderer, kind)
    if examples.duplicate_ids:
        found.append(f"{kind}: {len(examples.duplicate_ids)} ids occur more than once; rows stay apart.")
    return found


def tool_warnings(examples: Examples, renderer: Renderer, kind: str) -> list[str]:
    """A sentence if rows have tools that the chat template leaves out."""
    rows = examples.with_tools
    if not len(rows) or renderer.writes_tools:
        return []
    first = int(rows[0])
    where = f"{examples.files[examples.file_index[first]]}, row {int(examples.row[first])}"
    return [
        f"{kind}: {len(rows)} of {len(examples)} rows have tools, but the chat template writes none, so the model does "
        f"not see them (the first: {where}, 0-based). --chat-template takes a template that writes them."
    ]


def bad_row_warnings(problems: Sequence[str], kind: str) -> list[str]:
    """A sentence if rows were left out; ``problems`` has one for each, which says where it is and what is wrong."""
    if not problems:
        return []
    return [f"{kind}: {len(problems)} rows cannot be used and were left out; the first: {problems[0]}"]
