"""The record of a training run that owns a folder: what ``tamis train --record`` adds to ``TrajectoryRecorder``.

What the user calls the rows is written when the record is whole, so that a folder with another run's record, which the
recorder refuses, keeps its own names.
"""

from __future__ import annotations

from pathlib import Path

from tamis.config import read_config
from tamis.corpora import Rendered
from tamis.errors import InvalidInput, InvalidSettings
from tamis.runs.trace_inputs import write_examples
from tamis.settings import TrainRunSettings
from tamis.trajectory.log import LogReader, mark_finished
from tamis.trajectory.recorder import TrajectoryRecorder, refuse_several_processes
from tamis.trajectory.token_rows import TokenRow
from tamis.types import IntArray

__all__ = ["check_record", "finish_record", "recorder_of", "require_begun_record", "require_record"]


def check_record(settings: TrainRunSettings) -> None:
    """Refuse at once a record that the recorder would refuse when the model is there.

    Raises:
        Unsupported: the run has several processes.
    """
    if settings.record is not None:
        refuse_several_processes()


def require_begun_record(settings: TrainRunSettings) -> None:
    """Refuse to go on without the record that a run was begun with: it would end where the run was interrupted.

    Raises:
        InvalidSettings: naming it.
    """
    begun, out = Path(settings.out) / "run.yaml", Path(settings.out)
    if settings.record is not None or not begun.is_file() or (out / "manifest.json").is_file():
        return
    try:
        earlier = read_config(begun).get("record")
    except InvalidInput:  # damaged; it is about to be written again
        return
    if earlier and (Path(earlier) / "manifest.json").is_file():
        raise InvalidSettings(
            f"{out} was begun with --record {earlier}: give it again, or the record would end where the run was "
            f"interrupted; to go on without, remove {earlier}"
        )


def recorder_of(settings: TrainRunSettings, *, owner: str, chat_template: str | None) -> TrajectoryRecorder | None:
    """What records the run, None if it is not asked for; ``owner`` tells the run from all others."""
    if settings.record is None:
        return None
    # Killed before its first checkpoint, the run begins its record anew.
    return TrajectoryRecorder(
        settings.record,
        every=settings.record_every,
        model_name=settings.model,
        chat_template=chat_template,
        owner=owner,
    )


def finish_record(folder: Path, rendered: Rendered, rows: IntArray) -> None:
    """Name the rows of the record in ``folder``, and end it.

    A run killed after its last checkpoint trains no more, and its recorder is not told of the end.

    Args:
        folder: of the record.
        rendered: the pool.
        rows: of the pool, what was trained on, by position in the training data.
    """
    examples = rendered.pool.examples
    write_examples(folder, examples, rows, examples.sources_of(rows))
    if LogReader(folder).is_finished:
        return
    taken = rendered.pool.take(rows)
    digests = [TokenRow(ids=r.input_ids, supervised=r.supervised).trimmed().digest() for r in taken]
    mark_finished(folder, {digest: position for position, digest in reversed(list(enumerate(digests)))})


def require_record(settings: TrainRunSettings) -> None:
    """Refuse to call a finished run recorded that is not.

    Raises:
        InvalidInput: the record that is asked for is not there.
    """
    if settings.record is None:
        return
    try:
        LogReader(Path(settings.record)).require_complete()
    except InvalidInput as error:
        raise InvalidInput(
            f"{settings.out} holds this run already, finished, and its record is not in {settings.record}; training is "
            "not repeated for it: give another --out, or leave --record out"
        ) from error
