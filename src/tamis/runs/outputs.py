"""What a selection leaves on disk: ``selected.jsonl``, ``scores.parquet``, ``manifest.json`` and the run's identity.

Nothing in the first two depends on time, machine or interruption: the same run writes the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tamis.corpora import Corpora
from tamis.disk import TEMPORARY_SUFFIX, make_folder, replace_atomically
from tamis.errors import InvalidSettings, StoreCorrupted, first_line
from tamis.identity import file_sha256, first_difference
from tamis.runs.row_shapes import as_messages
from tamis.selection.choose import Choice
from tamis.store.manifest import PLAN_FILE
from tamis.types import FloatArray, IntArray

__all__ = [
    "MESSAGES",
    "check_claim",
    "check_files",
    "claim_folder",
    "free_claim",
    "read_written",
    "refuse_strangers",
    "score_table",
    "write_json",
    "write_messages",
    "write_scores",
    "write_selected",
]

IDENTITY, CONFIG = "identity.json", "run.yaml"
MESSAGES = "selected-messages.jsonl"
_RESULTS = ("selected.jsonl", MESSAGES, "scores.parquet", "report.html", "manifest.json")
_TOKENS = "tokens-"  # stages of rendered rows


def claim_folder(out: Path, identity: Mapping[str, Any]) -> None:
    """Make ``out`` the folder of the run that ``identity`` describes, or refuse it.

    A folder whose run failed before it computed anything is free: after ``--device cuda`` on a machine without, the
    corrected command may use it. Rendered tokens do not count; they are cheap, and kept apart by what made them.

    Raises:
        InvalidSettings: the folder belongs to another run (the first field that differs is named), or holds files that
            no run wrote.
        InvalidInput: the folder cannot be written.
    """
    make_folder(out)
    path = out / IDENTITY
    wanted = json.loads(json.dumps(identity, default=str))
    if path.exists():
        stored = _read_identity(out)
        difference = first_difference(stored, wanted)
        if difference and _has_work(out):
            field, was, now = difference
            verb = stored.get("verb")
            if verb != wanted.get("verb"):
                of = "another command" if verb is None else f"`tamis {verb}`"
                raise InvalidSettings(f"--out {out} holds a result of {of}; choose another --out, or delete the folder")
            raise InvalidSettings(
                f"--out {out} holds another run: {field} was {_short(was)} there and is {_short(now)} now; "
                "choose another --out, or delete the folder"
            )
        if difference:
            write_json(path, wanted)
        return
    for leftover in out.glob(f".*{TEMPORARY_SUFFIX}"):  # of a run that was killed while it wrote here
        leftover.unlink(missing_ok=True)
    refuse_strangers(out)
    write_json(path, wanted)


def refuse_strangers(out: Path) -> None:
    """Refuse a folder that no run has claimed and that is not empty, before anything is written there.

    Raises:
        InvalidSettings: naming what it holds.
    """
    if not out.is_dir() or (out / IDENTITY).exists():
        return
    names = (entry.name for entry in out.iterdir() if entry.name != "store")
    strangers = sorted(name for name in names if not (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)))
    if strangers:
        raise InvalidSettings(
            f"--out {out} is not empty and was not written by tamis (it holds {', '.join(strangers[:3])}); "
            "choose a new or an empty folder"
        )


def check_claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to write results into a folder that another run has claimed since this one did.

    Raises:
        InvalidSettings: it has.
    """
    if first_difference(_read_identity(out), json.loads(json.dumps(identity, default=str))):
        raise InvalidSettings(
            f"--out {out} was claimed by another run while this one worked; give this one an --out of its own"
        )


def free_claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Give up the claim of a run that was refused, so that a corrected command may have the folder.

    What lies in ``store`` stays: each of its folders says itself what it is of. A claim of another run stays, too.
    """
    with contextlib.suppress(InvalidSettings):
        if not first_difference(_read_identity(out), json.loads(json.dumps(identity, default=str))):
            for name in (IDENTITY, CONFIG):
                (out / name).unlink(missing_ok=True)


def read_written(path: Path, *, todo: str) -> Any:
    """What a run has written as the JSON file ``path``; ``todo`` is what to do where it is damaged.

    Raises:
        StoreCorrupted: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreCorrupted(f"{path} cannot be read ({first_line(error)}); {todo}") from error


def check_files(folder: Path, digests: Mapping[str, str], *, todo: str) -> None:
    """Compare files of a finished run with their SHA-256 in its manifest.

    Raises:
        StoreCorrupted: one is missing or was changed.
    """
    for name, digest in digests.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise StoreCorrupted(f"{folder / name} is missing or was changed since it was written; {todo}")


def _read_identity(out: Path) -> Any:
    try:
        return json.loads((out / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSettings(
            f"--out {out}: {IDENTITY} cannot be read ({error}); choose another --out, or delete the folder"
        ) from error


def _has_work(out: Path) -> bool:
    """Whether a run left results in ``out``, or anything in its store that a model was needed for."""
    if any((out / name).exists() for name in _RESULTS) or any((out / "checkpoints").glob("checkpoint-*")):
        return True
    if any((out / "records").glob("*.json")) or any((out / "selections").glob("*")):  # of a comparison
        return True
    return any(
        file.is_file() and file.name != PLAN_FILE and not file.name.endswith(TEMPORARY_SUFFIX)
        for stage in (out / "store").glob("*")
        if stage.is_dir() and not stage.name.startswith(_TOKENS)
        for file in stage.rglob("*")
    )


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is either the old one or the whole new one.

    Raises:
        InvalidInput: the disk is full or the folder read-only.
    """
    replace_atomically(path, ((json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode(),))


def score_table(
    corpora: Corpora,
    choice: Choice,
    *,
    losses: FloatArray | None,
    flagged: np.ndarray[Any, np.dtype[np.bool_]],
    landmarks: IntArray | None = None,
) -> pa.Table:
    """One row per pool row, in pool order. Rows that were not scored have null scores and ranks.

    ``landmarks`` are the rows that have a gradient of their own, where others have carried scores.
    """
    pool, examples = corpora.pool, corpora.pool.examples
    n = len(pool)
    scored = np.zeros(n, dtype=np.bool_)
    scored[choice.rows] = True

    def scatter(values: Any, kind: pa.DataType) -> pa.Array:
        full = np.zeros(n, dtype=np.asarray(values).dtype)
        full[choice.rows] = values
        return pa.array(full, type=kind, mask=~scored)

    selected = np.zeros(n, dtype=np.bool_)
    selected[choice.order] = True
    weight = np.zeros(n, dtype=np.float32)
    weight[choice.rows] = choice.example_weights
    picked_for = np.full(n, -1, dtype=np.int64)
    picked_for[choice.order] = choice.picked_for
    columns: dict[str, pa.Array] = {
        "id": pa.array(examples.ids, type=pa.string()),
        "file": _strings(examples.file_index, examples.files),
        "row": pa.array(np.asarray(examples.row), type=pa.int64()),
        "source": _strings(examples.source_index, examples.source_names),
        "tokens": pa.array(pool.lengths, type=pa.int32()),
        "supervised_tokens": pa.array(pool.supervised, type=pa.int32()),
        "truncated": pa.array(pool.truncated, type=pa.int32()),
        "score": scatter(choice.score, pa.float32()),
    }
    if len(choice.target_names) > 1:
        for index, name in enumerate(choice.target_names):
            columns[f"score:{name}"] = scatter(choice.target_scores[:, index], pa.float32())
    columns |= {
        "rank": scatter(choice.rank, pa.int64()),
        "selected": pa.array(selected),
        "weight": pa.array(weight, type=pa.float32()),
        "loss": pa.array(
            np.zeros(n, np.float32) if losses is None else np.nan_to_num(losses),
            type=pa.float32(),
            mask=np.ones(n, np.bool_) if losses is None else np.isnan(losses),
        ),
        "duplicate_of": pa.array(_copy_of(corpora.first_copy), type=pa.int64()),
        "near_duplicate_of": pa.array(_copy_of(corpora.first_near_copy), type=pa.int64()),
        "flagged": pa.array(flagged),
        "leaked": pa.array(corpora.leaked),
        "picked_for": pa.array([choice.target_names[i] if i >= 0 else None for i in picked_for], type=pa.string()),
    }
    if landmarks is not None:
        is_landmark = np.zeros(n, dtype=np.bool_)
        is_landmark[landmarks] = True
        columns["landmark"] = pa.array(is_landmark)
    return pa.table(columns)


def write_scores(path: Path, table: pa.Table) -> None:
    """The table as Parquet, zstd-compressed."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    replace_atomically(path, (sink.getvalue().to_pybytes(),))


def write_selected(path: Path, corpora: Corpora, choice: Choice) -> None:
    """The user's selected rows, best first, untouched but for the added key ``_tamis``."""
    examples, marks = corpora.pool.examples, _marks(corpora, choice)

    def line(row: int) -> str:
        mark = marks[row]
        text, own = examples.raw_json(row).rstrip(), json.dumps(mark)
        if '"_tamis"' in text:
            raw = json.loads(text)
            if "_tamis" in raw:  # chosen before: the new mark replaces the old one
                return json.dumps({**raw, "_tamis": mark}) + "\n"
        # Spliced into the row's own text, so that not a digit or an escape of it changes.
        return f'{text[:-1].rstrip()}, "_tamis": {own}}}\n'

    replace_atomically(path, (line(row).encode("utf-8") for row in choice.order.tolist()))


def write_messages(path: Path, corpora: Corpora, choice: Choice) -> None:
    """The selected rows as chats, best first, for trainers that read one format only; rows of plain text are left out.

    No file where no row has a form as a chat.
    """
    marks = _marks(corpora, choice)
    converted = ((row, as_messages(corpora.pool.examples[row])) for row in choice.order.tolist())
    chats = [{**chat, "_tamis": marks[row]} for row, chat in converted if chat is not None]
    if any("chat_template_kwargs" in chat for chat in chats):  # null in some rows, TRL could not unpack them
        chats = [{"chat_template_kwargs": {}, **chat} for chat in chats]
    if chats:
        lines = (json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
        replace_atomically(path, (line.encode("utf-8") for line in lines))


def _marks(corpora: Corpora, choice: Choice) -> dict[int, dict[str, Any]]:
    """What ``_tamis`` says of each selected row."""
    position = {int(row): i for i, row in enumerate(choice.rows)}
    return {
        row: {
            "id": corpora.pool.examples.ids[row],
            "rank": rank,
            "score": float(choice.score[position[row]]),
            "weight": float(choice.example_weights[position[row]]),
        }
        for rank, row in enumerate(choice.order.tolist(), start=1)
    }


def _copy_of(first: IntArray) -> IntArray:
    """-1 for rows that are the first of their kind."""
    return np.where(first == np.arange(len(first)), -1, first).astype(np.int64)


def _strings(index: Any, names: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.asarray(index), type=pa.int32()), pa.array(names)).cast(
        pa.string()
    )


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]  # of a SHA-256, enough to see that it is another
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
