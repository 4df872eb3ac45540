"""The candidates' log: complete parts or nothing, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tamis.errors import InvalidInput, StoreCorrupted
from tamis.online.fate import CandidateLog, read_candidates
from tamis.online.methods.choice import Choice
from tamis.online.proposal import Proposal


def proposal() -> Proposal:
    """Three candidates: the last kept with weight 1, the first never computed, the second not finite."""
    return Proposal(
        gradient={}, divisor=1.0, choice=Choice(rows=np.array([2]), weights=np.array([1.0])),
        losses=np.array([np.nan, np.inf, 0.5]), tokens=np.array([3, 4, 5]),
        alignments=np.array([np.nan, np.nan, 2.0]), dropped=np.array([1]), target_loss=1.0, target_gradient=None,
        cold=False,
    )  # fmt: skip


def write(folder: Path, steps: range, *, first_step: int, flush_every: int = 1) -> CandidateLog:
    log = CandidateLog(folder, first_step=first_step)
    for step in steps:
        log.add(proposal(), step=step, choice=step - 1, rows=np.array([7, 8, 9]), sources=["a", None, "b"])
        if step % flush_every == 0:
            log.flush()
    return log


def test_every_candidate_has_its_row(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), first_step=1)
    first, second, third = read_candidates(tmp_path).to_pylist()
    assert (first["row"], first["source"], first["kept"], first["loss"], first["alignment"]) == (
        7,
        "a",
        False,
        None,
        None,
    )
    assert (second["dropped"], second["weight"], second["source"]) == (True, 0.0, None)
    assert (third["kept"], third["weight"], third["loss"], third["alignment"]) == (True, 1.0, 0.5, 2.0)


def test_what_was_not_flushed_is_not_there_and_a_broken_part_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), first_step=1, flush_every=2)
    (tmp_path / "part-00000005-00000006.partial").write_bytes(b"half a file")
    assert set(read_candidates(tmp_path)["step"].to_pylist()) == {1, 2, 3, 4}


def test_a_part_that_is_damaged_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), first_step=1)
    part = sorted(tmp_path.iterdir())[1]
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(StoreCorrupted, match=f"{part.name} cannot be read .*; only a run from the start"):
        read_candidates(tmp_path)


@pytest.mark.parametrize("place", [0, 1])
def test_a_part_that_is_missing_before_others_is_named(tmp_path: Path, place: int) -> None:
    write(tmp_path, range(1, 7), first_step=1, flush_every=2)
    sorted(tmp_path.iterdir())[place].unlink()
    with pytest.raises(StoreCorrupted, match=f"has nothing of update {1 + 2 * place}, but of later ones; only a run"):
        read_candidates(tmp_path)


def test_a_resumed_run_takes_back_what_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, range(1, 7), first_step=1)
    write(tmp_path, range(4, 6), first_step=4)
    assert read_candidates(tmp_path)["step"].to_pylist() == [step for step in range(1, 6) for _ in range(3)]
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_without_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no candidates"):
        read_candidates(tmp_path)
