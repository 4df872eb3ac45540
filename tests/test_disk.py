import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tamis.disk import check_writable, create_atomically, disk_errors, replace_atomically
from tamis.errors import InvalidInput


def test_a_replaced_file_is_whole_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    replace_atomically(path, [b"new", memoryview(b" and longer")])
    assert path.read_bytes() == b"new and longer"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_a_file_that_a_killed_run_left_half_written_goes_when_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, path = int(killed.stdout), tmp_path / "file.json"
    left = tmp_path / f".file.json.1-{dead}.tmp"
    others = [  # of another rank, of a run that goes on, of another file, and of no run
        *(f".file.json.0-{dead}.tmp", f".file.json.1-{os.getppid()}.tmp", f".other.json.1-{dead}.tmp"),
        ".file.json.1-mine.tmp",
    ]
    for name in (left.name, *others):
        (tmp_path / name).write_bytes(b"half")
    replace_atomically(path, [b"whole"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, *others])


def test_the_first_of_several_creators_wins(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    assert create_atomically(path, [b"first"])
    assert not create_atomically(path, [b"second"])
    assert path.read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


def test_creating_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "plan"
    assert create_atomically(path, [b"first"])
    assert not create_atomically(path, [b"second"])
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "free some space and run the same command again; everything written before is kept"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "make the folder writable or choose another one"),
        (errno.EROFS, "make the folder writable or choose another one"),
        (errno.ENOTDIR, "a file is in the way of a folder"),
        (errno.ENOENT, "another run may be working in the same folder"),
        (errno.EIO, "run the same command again"),
    ],
)
def test_every_error_of_the_disk_becomes_one_line_with_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, sentence: str
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InvalidInput, match=sentence) as caught:
        replace_atomically(path, [b"new"])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_a_really_full_device_is_reported_as_full() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(InvalidInput, match="No space left on device; free some space"), disk_errors(full):
        full.write_bytes(b"x")


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(InvalidInput, match="a file is in the way of a folder"):
        replace_atomically(tmp_path / "store" / "file.bin", [b"x"])


def test_trying_a_folder_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / "there")
    check_writable(tmp_path / "there" / "deep" / "deeper")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match="a file is in the way of a folder"):
            check_writable(folder)
