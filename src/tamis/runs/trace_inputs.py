"""What attribution and verification start with: a recorded run opened with its model, and the target as token rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from tamis.corpus import tokenize
from tamis.data.examples import Examples, read_examples
from tamis.data.render import Renderer
from tamis.data.row_warnings import tool_warnings
from tamis.data.rows import Rows
from tamis.disk import make_folder
from tamis.errors import InvalidInput, InvalidSettings, StoreCorrupted, Unsupported
from tamis.identity import canonical_json, file_sha256, text_sha256
from tamis.model.load import ModelSettings, load_tokenizer, template_sha256
from tamis.model.processes import world_size
from tamis.notation import target_parts
from tamis.protocols import Progress
from tamis.runs.manifest import base_identity
from tamis.runs.outputs import write_scores
from tamis.settings import AttributeSettings, VerifySettings
from tamis.trajectory.causal import RecordedRun
from tamis.trajectory.log import EXAMPLES, LogReader
from tamis.trajectory.open_run import model_of_run, open_run, run_model_settings
from tamis.trajectory.token_rows import TOKEN_INPUTS, TokenMicro, TokenRow, rows_of_inputs
from tamis.types import IntArray
from tamis.values import to_dict

__all__ = [
    "OpenedRun",
    "TargetRows",
    "announce_rows",
    "open_inputs",
    "read_target",
    "recorded_rows",
    "refuse_several",
    "run_digest",
    "run_identity",
    "write_examples",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """Rows of the task, as tokens up to the last supervised one."""

    rows: tuple[TokenRow, ...]
    ids: tuple[str, ...]
    names: tuple[str, ...]  # of the target that each row is of
    left_out: tuple[str, ...]  # rows without an answer that counts
    digest: str


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run and a target, on the model's device."""

    trajectory: RecordedRun
    micros: tuple[TokenMicro, ...]  # of the target
    target: TargetRows
    trained_on: tuple[str, ...]  # ids of target rows that the run was trained on, token for token


def open_inputs(
    settings: AttributeSettings | VerifySettings,
    target: TargetRows,
    *,
    model: nn.Module | None = None,
) -> OpenedRun:
    """Open the run, with the model that it names or the one given.

    Raises:
        InvalidInput: there is no whole run, its model cannot be read, or the target is not made for it.
        StoreMismatch: the model is not the run's.
    """
    folder = Path(settings.run)
    if model is None:
        model = model_of_run(folder, _model_settings(settings)).model
    trajectory = open_run(folder, model)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    limit = int(embeddings.num_embeddings)
    for name, row in zip(target.ids, target.rows, strict=True):
        if not 0 <= int(row.ids.min()) <= int(row.ids.max()) < limit:
            raise InvalidInput(
                f"target row {name} holds token ids from {row.ids.min()} to {row.ids.max()}, and the model has {limit} "
                "of them; make the rows with the tokenizer of the run's model"
            )
    micros = trajectory.micros_of(target.rows, most=settings.batch_rows)
    trained = {row.digest() for row in trajectory.rows}
    known = tuple(name for name, row in zip(target.ids, target.rows, strict=True) if row.digest() in trained)
    if known:
        logger.warning(
            "%d of %d target rows were trained on in this run (%s): what their own scores say is mostly how well they "
            "were memorised; measure by rows that were not trained on",
            len(known), len(target.rows), _some(known),
        )  # fmt: skip
    return OpenedRun(trajectory=trajectory, micros=micros, target=target, trained_on=known)


def refuse_several(verb: str, instead: str = "") -> None:
    """Refuse to work in one folder from several processes, which would write the same files.

    Raises:
        InvalidSettings: a launcher started several.
    """
    if world_size() > 1:
        raise InvalidSettings(
            f"`tamis {verb}` works in one process, and {world_size()} were started; run it without a launcher{instead}"
        )


def read_target(
    settings: AttributeSettings | VerifySettings, *, store: Path, held: Mapping[str, Rows], progress: Progress
) -> TargetRows:
    """Render the target with the tokenizer of the run's model, in the run's chat template if it recorded one.

    Rows with ``input_ids`` and ``labels`` are as they are.

    Raises:
        InvalidInput: no row has a supervised token; a row of tokens is none that a causal model is trained on; or text
            was given and nothing says by which tokenizer to read it.
        BadRow: a row cannot be used and ``on_bad_row`` is "fail".
    """
    given, paths = zip(*map(target_parts, settings.target), strict=True)
    if all(path in held and "input_ids" in held[path][0] for path in paths):
        found = [
            (of, f"{path}:{n}", _of_tokens(row, f"{path}:{n}"))
            for of, path in zip(given, paths, strict=True)
            for n, row in enumerate(held[path])
        ]
        rows = [row for _, _, row in found if row is not None]
        names = [of for of, _, row in found if row is not None]
        ids = [name for _, name, row in found if row is not None]
        left_out, within = [name for _, name, row in found if row is None], ""  # tokens are never cut
    else:
        if not (settings.model or LogReader(Path(settings.run)).manifest["model"]["name"]):
            raise InvalidInput(
                f"{settings.run} does not say what opens its model, so that the target's text cannot be made tokens: "
                "pass the model as a name or folder (--model), or target rows with input_ids and labels"
            )
        examples = read_examples(paths, row_format=settings.row_format, on_bad_row=settings.on_bad_row, held=held)
        renderer = Renderer(load_tokenizer(_model_settings(settings)), max_length=settings.max_length)
        corpus = tokenize("target", examples, renderer, root=store, on_bad_row=settings.on_bad_row, progress=progress)
        for sentence in (*renderer.notes, *tool_warnings(examples, renderer, "target")):
            logger.warning("%s", sentence)
        usable = np.flatnonzero(corpus.usable).astype(np.int64)
        rows = [TokenRow(ids=t.input_ids, supervised=t.supervised).trimmed() for t in corpus.take(usable)]
        ids = [examples.ids[int(row)] for row in usable]
        names = [given[examples.named_by[int(examples.file_index[row])]] for row in usable]
        left_out = [f"{bad.file}, row {bad.row} ({bad.problem})" for bad in examples.skipped]
        left_out += [examples.ids[int(row)] for row in np.flatnonzero(~corpus.usable)]
        within = f" among its first {settings.max_length} (--max-length)"
    if not rows:
        raise InvalidInput(
            f"no row of the target ({', '.join(paths)}) carries a supervised token{within}; give it usable rows"
        )
    if left_out:
        logger.warning(
            "left out of the target (%d), for want of a supervised token%s: %s", len(left_out), within, _some(left_out)
        )
    digests = [row.digest() for row in rows]
    repeated = len(rows) - len(set(digests))
    if repeated:
        logger.warning("%d of %d target rows repeat another one; each counts", repeated, len(rows))
    return TargetRows(
        rows=tuple(rows),
        ids=tuple(ids),
        names=tuple(names),
        left_out=tuple(left_out),
        digest=text_sha256("".join(digest.hex() for digest in digests)),
    )


def run_digest(folder: Path) -> str:
    """Of a whole record: what it says of itself, and the bytes of its last segment, which every earlier one led to.

    Raises:
        InvalidInput: there is no whole run.
        StoreCorrupted: its end cannot be read.
    """
    reader = LogReader(folder)
    reader.require_complete()
    last = folder / "segments" / f"{reader.bounds[-2]:08d}-{reader.bounds[-1]:08d}.safetensors"
    state = folder / "states" / f"{reader.bounds[-1]:08d}.safetensors"
    try:
        digests = file_sha256(last), file_sha256(state)
    except OSError as error:
        raise StoreCorrupted(f"{error.filename} cannot be read ({error.strerror}); record the run again") from error
    return text_sha256(canonical_json([reader.manifest, reader.end, *digests]))


def run_identity(
    verb: str, settings: AttributeSettings | VerifySettings, target: TargetRows, *, free: tuple[str, ...]
) -> dict[str, Any]:
    """What determines the numbers of a verb; settings in ``free`` do not."""
    known = ("run", "target", "out", "model", "revision", "chat_template", "store", "on_bad_row", *free)
    template = template_sha256(settings.chat_template)
    return {
        **base_identity(verb=verb, run=run_digest(Path(settings.run)), target=target.digest, chat_template=template),
        "settings": {key: value for key, value in to_dict(settings).items() if key not in known},
    }


def announce_rows(settings: AttributeSettings | VerifySettings, target: TargetRows) -> None:
    """Say what a score for every target row costs, before it is paid."""
    if settings.per_row and len(target.rows) > 1:
        logger.info(
            "a score for each of %d target rows: the way back through the run takes about %d times that of their mean",
            len(target.rows), len(target.rows),
        )  # fmt: skip


def recorded_rows(folder: Path) -> pa.Table:
    """One line per recorded row: its number, where it stands in the training data, and what the user calls it.

    ``position`` is null where it is not known. ``id``, ``file``, ``file_row`` and ``source`` are there if the run was
    one of ``tamis train``.
    """
    position = LogReader(folder).positions()
    known = position >= 0
    table = pa.table(
        {
            "row": pa.array(np.arange(len(position)), type=pa.int64()),
            "position": pa.array(position, type=pa.int64(), mask=~known),
        }
    )
    path = folder / EXAMPLES
    if not path.is_file():
        return table
    examples = pq.read_table(path)
    at = pa.array(np.where(known, position, 0), type=pa.int64(), mask=~known)
    for name in examples.column_names:
        table = table.append_column(name, examples[name].combine_chunks().take(at))
    return table


def write_examples(folder: Path, examples: Examples, rows: IntArray, sources: Sequence[str]) -> None:
    """What the user calls the training data of a run, by position, into the folder of its record.

    Raises:
        InvalidInput: the folder cannot be written.
    """
    make_folder(folder)
    table = pa.table(
        {
            "id": pa.array([examples.ids[int(row)] for row in rows], type=pa.string()),
            "file": pa.array([examples.files[int(examples.file_index[row])] for row in rows], type=pa.string()),
            "file_row": pa.array([int(examples.row[row]) for row in rows], type=pa.int64()),
            "source": pa.array(list(sources), type=pa.string()),
        }
    )
    write_scores(folder / EXAMPLES, table)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _of_tokens(row: Mapping[str, Any], name: str) -> TokenRow | None:
    """None if it carries no loss."""
    columns = {column: row[column] for column in TOKEN_INPUTS if row.get(column) is not None}
    missing = sorted({"input_ids", "labels"} - columns.keys())
    if missing:
        raise InvalidInput(f"{name}: no {missing[0]}; rows of tokens need both input_ids and labels")
    try:
        tensors = {column: torch.as_tensor(values)[None] for column, values in columns.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name}: expected lists of token ids: {error}") from None
    shapes = {column: tuple(tensor.shape[1:]) for column, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or len(shapes["labels"]) != 1 or any(map(_is_fraction, tensors.values())):
        told = ", ".join(f"{column} {list(shape)} of {tensors[column].dtype}" for column, shape in shapes.items())
        raise InvalidInput(f"{name}: expected lists of token ids that are equally long, got {told}")
    try:
        return rows_of_inputs(tensors)[0]
    except Unsupported as error:
        raise InvalidInput(f"{name}: {error}") from None


def _is_fraction(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _model_settings(settings: AttributeSettings | VerifySettings) -> ModelSettings:
    manifest = LogReader(Path(settings.run)).manifest
    named = manifest["model"]["name"]
    base = ModelSettings(
        name=settings.model or named or "(unnamed)",
        revision=settings.revision,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template or manifest.get("chat_template"),
    )
    return run_model_settings(Path(settings.run), base if settings.model or named else None)
