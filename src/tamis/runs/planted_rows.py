"""Which of the user's rows become a planted pool: what is held back, what is background, and the files of both."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tamis.comparison.planted import PlantedPool, answer, plant
from tamis.corpora import Sources, leaked_rows
from tamis.data.examples import Examples
from tamis.disk import make_folder, replace_atomically
from tamis.errors import InvalidInput, InvalidSettings
from tamis.model.processes import barrier, is_main
from tamis.report.wording import counted, percent
from tamis.runs.row_shapes import as_messages
from tamis.seeds import child_seed, random_subset
from tamis.settings import CompareSettings
from tamis.types import Example

__all__ = ["planted_rows", "write_planted"]

_FEW_RELEVANT = 16  # below so many, luck with a row or two reads like a difference between methods


def planted_rows(
    settings: CompareSettings, sources: Sources, given: Examples | None
) -> tuple[PlantedPool, list[list[dict[str, Any]]], list[str]]:
    """The pool, the rows that stay target rows (by target), and what to know of both."""
    warnings = []
    relevant: list[tuple[str, Example]] = []
    targets: list[list[dict[str, Any]]] = []
    for index, name in enumerate(sources.target_names):
        own = np.flatnonzero(sources.target_group == index)
        held_back = own[:0]
        if given is None:
            if len(own) < 2:
                raise InvalidInput(
                    f"target '{name}' has {len(own)} row, so none can be held back to be planted; give more, or a file "
                    "of relevant rows by --relevant"
                )
            half = random_subset(child_seed(settings.seed, "held back", name), len(own), len(own) // 2)
            held_back = own[half]
        relevant += [(name, sources.target[int(row)]) for row in held_back]
        kept = [as_messages(sources.target[int(row)]) for row in np.setdiff1d(own, held_back)]
        targets.append([chat for chat in kept if chat is not None])
        if not targets[-1]:
            raise InvalidInput(f"target '{name}' is plain text without turns; planting needs chats or instruction rows")
    if given is not None:
        relevant, said = _distinct(given, beside=sources.target)
        warnings += said
    chats = [(name, chat) for name, example in relevant if (chat := as_messages(example)) and answer(chat).strip()]
    if len(chats) > settings.planted_rows:
        kept_rows = random_subset(child_seed(settings.seed, "planted rows"), len(chats), settings.planted_rows)
        chats = [chats[int(i)] for i in kept_rows]
    if len(chats) < _FEW_RELEVANT:
        warnings.append(
            f"With {len(chats)} relevant rows, one more or less is {percent(1 / max(1, len(chats)))} of precision: "
            "give more by --relevant, or a larger target, before you rank methods by it."
        )
    background, left_out = _background(settings, sources, given)
    if left_out:
        those = counted(left_out, "row")
        warnings.append(f"Not in the background, for want of turns or of an answer: {those} of the pool.")
    if not settings.relevant_sources:
        warnings.append(
            "Rows of your pool that are of the target's kind count as background, so precision may be too low; name "
            "their sources by --relevant-sources to leave them out."
        )
    return plant(chats, background, seed=settings.seed), targets, warnings


def _distinct(given: Examples, *, beside: Examples) -> tuple[list[tuple[str, Example]], list[str]]:
    """The relevant rows, each text once and without those of the target, which any method would find."""
    shown, own, seen, copies = set(beside.digests), [], set[str](), 0
    for row, digest in enumerate(given.digests):
        if digest in shown:
            continue
        if digest in seen:
            copies += 1
            continue
        seen.add(digest)
        own.append(("relevant", given[row]))
    said = []
    if in_target := len(given) - len(own) - copies:
        said.append(f"{counted(in_target, 'relevant row')} left out: the target has the same text, so it is no test.")
    if copies:
        said.append(f"{counted(copies, 'relevant row')} left out: copies of other relevant rows.")
    if not own:
        raise InvalidInput("relevant: every row is a row of the target; give other rows of the same task")
    return own, said


def _background(
    settings: CompareSettings, sources: Sources, given: Examples | None
) -> tuple[list[tuple[str, Mapping[str, Any]]], int]:
    """Rows of the pool that are neither planted nor of the target's sources, and how many have no form as chats."""
    examples = sources.pool
    unknown = sorted({*settings.relevant_sources} - {*examples.source_names})
    if unknown:
        raise InvalidSettings(
            f"relevant_sources: the pool has no source {unknown[0]!r} "
            f"(sources: {', '.join(examples.source_names[:12])})"
        )
    known = set() if given is None else set(given.digests)
    leaked = leaked_rows(sources)
    rows = [
        row
        for row in range(len(examples))
        if not leaked[row]
        and examples.digests[row] not in known
        and examples.source_names[examples.source_index[row]] not in settings.relevant_sources
    ]
    if settings.background_rows and len(rows) > settings.background_rows:
        drawn = random_subset(child_seed(settings.seed, "background"), len(rows), settings.background_rows)
        rows = [rows[int(i)] for i in drawn]
    found: list[tuple[str, Mapping[str, Any]]] = []
    for row in rows:
        example = examples[row]
        chat = as_messages(example)
        if chat is not None and answer(chat).strip():
            found.append((example.source, chat))
    if not found:
        raise InvalidInput("no row of the pool can be background; name fewer --relevant-sources, or give another pool")
    return found, len(rows) - len(found)


def write_planted(
    folder: Path, pool: PlantedPool, targets: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> tuple[Path, tuple[str, ...]]:
    """The pool and the target as files, with the truth beside them; every rank would write the same."""
    files = [folder / f"target-{index}.jsonl" for index in range(len(targets))]
    if is_main():
        make_folder(folder)
        _write_lines(folder / "pool.jsonl", pool.rows)
        for file, rows in zip(files, targets, strict=True):
            _write_lines(file, rows)
        truth = io.StringIO()
        writer = csv.writer(truth, lineterminator="\n")
        writer.writerow(("id", "kind", "relevant_row", "group"))
        writer.writerows(
            (row["id"], kind, "" if of < 0 else of, group)
            for row, kind, of, group in zip(pool.rows, pool.kinds, pool.of, pool.group, strict=True)
        )
        replace_atomically(folder / "truth.csv", (truth.getvalue().encode("utf-8", errors="surrogatepass"),))
    barrier()
    return folder / "pool.jsonl", tuple(f"{name}={file}" for name, file in zip(names, files, strict=True))


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    replace_atomically(path, ((json.dumps(row) + "\n").encode("utf-8") for row in rows))
