"""Writing files so that a kill leaves the old content or the new, never half of it; holding a file for one process."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = "the disk is full"
_OWN = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.(\w+)")  # a temporary name: machine, process, purpose
_open: set[str] = set()  # temporary names that this process uses
_held: set[int] = set()  # handles of the files that this process holds


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one piece: under a temporary name, fsynced, renamed, the folder fsynced.

    Raises:
        OSError: the disk refused; what was there before is untouched.
    """
    with beside(path, "tmp") as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def beside(target: Path, purpose: str) -> Iterator[Path]:
    """Yield a hidden path beside a target that nobody else uses, and remove what is there afterwards.

    What processes that died have left of the same purpose in that folder is removed first.

    Args:
        target: what the content will be called; its folder exists.
        purpose: a word that the path ends in.
    """
    path = target.with_name(f".{target.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.{purpose}")
    _open.add(path.name)
    try:
        _sweep(target.parent, purpose)
        yield path
    finally:
        _remove(path)
        _open.discard(path.name)


def _sweep(folder: Path, purpose: str) -> None:
    """Remove the temporary files and folders of processes of this machine that are no more."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".") and entry.name.endswith(purpose)]
    for name in names:
        found = _OWN.fullmatch(name)
        if found and found[3] == purpose and found[1] == _machine() and name not in _open and not _runs(int(found[2])):
            _remove(folder / name)


def _machine() -> str:
    """Return a mark of this machine: folders may be shared with others, whose processes cannot be asked for."""
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}"


def _runs(process: int) -> bool:
    """Return whether a process of this machine is another one that lives."""
    if process == os.getpid():  # in a container each process may have the number of the one before
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or folder that may be gone, or may be another user's, who sweeps it himself."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(FileNotFoundError, PermissionError):
        path.unlink()


NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what a file system that knows no locks answers


def hold(path: Path) -> int | None:
    """Return a handle that holds a file for this process alone, None when another one holds it.

    Meanwhile the file says who does. The operating system lets go of it when this process ends, however it ends;
    processes that this one forks do not hold it.

    Args:
        path: the file, which is made; its folder exists.

    Raises:
        OSError: the disk refused, or its file system knows no locks.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()} on {os.uname().nodename}".encode())
                _held.add(handle)
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # whoever held it has removed it with its folder


def let_go(handle: int) -> None:
    """Let go of a held file, which is empty then; in a forked process, nothing is held.

    Args:
        handle: as `hold` returned it.
    """
    if handle in _held:
        _held.remove(handle)
        os.ftruncate(handle, 0)
        os.close(handle)


def _forget() -> None:
    """Close what the process that forked this one holds: a worker that outlives it would go on holding it."""
    for handle in _held:
        os.close(handle)
    _held.clear()
    _open.clear()


os.register_at_fork(after_in_child=_forget)


def reason(error: Exception, path: Path) -> str:
    """Return in words why the disk refused to write at a path, with the space that is left."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**20
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return f"{FULL}: {free:,.1f} MiB are left" if full else f"the disk refused: {error}"
