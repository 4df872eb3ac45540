"""Files that are either whole or absent, whatever kills the process, and errors of the disk as sentences."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from tamis.errors import InvalidInput

__all__ = [
    "TEMPORARY_SUFFIX",
    "check_writable",
    "create_atomically",
    "disk_errors",
    "make_folder",
    "replace_atomically",
    "temporary_path",
]

TEMPORARY_SUFFIX = ".tmp"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

# What `os.link` says on file systems that know no hard links.
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

# How the safetensors package, whose writer is no Python, spells an error of the operating system; 0.4 the second way.
_OS_CODE = re.compile(r"os error (\d+)|Os \{ code: (\d+)")

_OTHER_RUN = "another run may be working in the same folder; let it end, then run the same command again"
_NO_FOLDERS = "no folder can be made there; choose another one"

Buffer = bytes | bytearray | memoryview


def temporary_path(path: Path) -> Path:
    """Name under which this process writes ``path`` before it moves it into place: same folder, hidden.

    The process id and the rank keep apart the processes of one machine and of several that share a disk.
    """
    rank = os.environ.get("RANK", "0")
    return path.with_name(f".{path.name}.{rank}-{os.getpid()}{TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def disk_errors(path: Path, *, doing: str = "write", missing: str = _OTHER_RUN) -> Iterator[None]:
    """Turn an error of the operating system into one line that names the file and says what to do.

    One that the safetensors package met counts; what else that package refuses is no matter of the disk and passes.
    ``missing`` is what to do where a file or folder is not there that should be.

    Raises:
        InvalidInput: the disk is full, the folder may not be written, or anything else went wrong below us.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        met = error if isinstance(error, OSError) else _met_by_safetensors(error)
        if met is None:
            raise
        reason = met.strerror or str(met)
        if met.errno in _FULL:
            todo = "free some space and run the same command again; everything written before is kept"
        elif met.errno in _FORBIDDEN:
            todo = "make the folder writable or choose another one, then run the same command again"
        elif met.errno in (errno.EEXIST, errno.ENOTDIR):
            todo = "a file is in the way of a folder; remove it or choose another folder"
        elif met.errno == errno.ENOENT:
            todo = missing
        else:
            todo = "fix that and run the same command again; everything written before is kept"
        raise InvalidInput(f"cannot {doing} {path}: {reason}; {todo}") from error


def _met_by_safetensors(error: SafetensorError) -> OSError | None:
    found = _OS_CODE.search(str(error))
    if found is None:
        return None
    code = int(found[1] or found[2])
    return OSError(code, os.strerror(code))


def make_folder(folder: Path) -> None:
    """Make the folder and those above it; one that is there already is left alone.

    Raises:
        InvalidInput: see ``disk_errors``.
    """
    with disk_errors(folder, doing="create folder", missing=_NO_FOLDERS):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path) -> None:
    """Try whether ``folder`` can be made and written to, and leave no trace of the trial.

    Raises:
        InvalidInput: see ``disk_errors``.
    """
    made: list[Path] = []
    with disk_errors(folder, doing="write to the folder", missing=_NO_FOLDERS):
        made += [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for place in made:  # the deepest first
                with contextlib.suppress(OSError):
                    place.rmdir()


def replace_atomically(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write ``chunks`` one after the other as the file ``path``, replacing an older one in a single step.

    The bytes are on the disk (fsync of file and folder) before the call returns. A process killed meanwhile leaves
    at most a hidden temporary file, which the next one that writes ``path`` removes.

    Raises:
        InvalidInput: see ``disk_errors``.
    """
    with disk_errors(path), _whole_file(path, chunks) as temporary:
        temporary.replace(path)
        _sync_folder(path.parent)
    _remove_leftovers(path)


def create_atomically(path: Path, chunks: Iterable[Buffer]) -> bool:
    """Like ``replace_atomically``, but the first of several writers wins; False if ``path`` was there already.

    On a file system without hard links the last writer wins instead, which is harmless where all write the same.

    Raises:
        InvalidInput: see ``disk_errors``.
    """
    with disk_errors(path), _whole_file(path, chunks) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if path.exists():
                return False
            temporary.replace(path)
        _sync_folder(path.parent)
        return True


def _remove_leftovers(path: Path) -> None:
    """Temporary files of ``path`` whose writers were killed. Those of other ranks may be of another machine."""
    own = temporary_path(path).name
    start = own.removesuffix(f"{os.getpid()}{TEMPORARY_SUFFIX}")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if entry.name.startswith(start) and entry.name.endswith(TEMPORARY_SUFFIX):
                number = entry.name.removeprefix(start).removesuffix(TEMPORARY_SUFFIX)
                if number.isdecimal() and not _is_running(int(number)):
                    Path(entry.path).unlink()


def _is_running(process: int) -> bool:
    """Whether there is such a process; True where that cannot be asked without sending it a signal."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


@contextlib.contextmanager
def _whole_file(path: Path, chunks: Iterable[Buffer]) -> Iterator[Path]:
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Without it a power cut can lose the new name although the file's bytes are safe. Windows cannot open a folder.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
