import logging
from pathlib import Path

import pytest
import torch

from tamis.errors import StoreCorrupted
from tamis.model.memory import TokenLimit, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_allocators_say_it_in_several_ways(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_limit_falls_from_the_piece_that_did_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    limit = TokenLimit(1000, None)
    with caplog.at_level(logging.WARNING):
        limit.lower(3, 900)
        limit.lower(5, 400)
    assert [limit.at(piece) for piece in range(7)] == [1000, 1000, 1000, 450, 450, 200, 200]
    assert "out of memory with 900 padded tokens; going on with 450" in caplog.text


def test_a_resume_has_the_limits_of_the_run_before_it_piece_by_piece(tmp_path: Path) -> None:
    first = TokenLimit(1000, tmp_path / "stage")
    first.lower(3, 900)
    first.lower(3, 440)
    again = TokenLimit(1000, tmp_path / "stage")
    assert [again.at(piece) for piece in range(5)] == [first.at(piece) for piece in range(5)] == [1000] * 3 + [220] * 2
    again.lower(1, 800)  # memory is shorter now
    assert [TokenLimit(1000, tmp_path / "stage").at(piece) for piece in range(5)] == [1000, 400, 400, 220, 220]


def test_what_one_rank_learned_holds_for_all_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TokenLimit(1000, tmp_path)
    monkeypatch.setattr("tamis.model.memory.rank", lambda: 1)
    other = TokenLimit(1000, tmp_path)
    own.lower(2, 600)
    other.lower(4, 200)
    assert own.at(9) == 300 and other.at(2) == 1000  # each goes by what happened to itself while they run
    assert [TokenLimit(1000, tmp_path).at(piece) for piece in (1, 2, 4)] == [1000, 300, 100]


@pytest.mark.parametrize("content", ["", "[[1]]", "{}x", '[["a", 3]]'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "limits-0.json").write_text(content)
    with pytest.raises(StoreCorrupted, match=r"limits-0\.json is not what was written; delete the folder"):
        TokenLimit(1000, tmp_path)
