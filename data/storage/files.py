"""Files that are there whole or not at all, folders that survive a power cut, one-line errors of the system.

Everything a cache holds reaches its name by the same four steps: write beside it, fsync, rename, fsync the
folders.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RepaError
from .regular import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .bucket import CachePath

_REMEDIES = {
    errno.ENOENT: "look at its name, or have it put there",
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: "choose a folder you have the rights to, or have them granted",
    errno.EPERM: "choose a folder you have the rights to, or have them granted",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; name a file",
    errno.EFBIG: "restore it, or delete it",
    errno.EMFILE: "raise the limit of open files, `ulimit -n`",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk or its connection fails; choose another",
    errno.ECONNABORTED: "look at the connection, the endpoint and the credentials",
    errno.ENOLCK: "the file system cannot lock files; choose a folder on another",
}

_ANY_REMEDY = "mend that, then run the same command again"

# POSIX locks exclude other processes, not other threads of this one
_THREADS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def os_errors(doing: str, path: CachePath) -> Iterator[None]:
    """Turn the operating system's errors into one line that names the path.

    Args:
        doing: verb for the message, for example ``write``.
        path: named when the error itself names no file.

    Raises:
        RepaError: in place of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        remedy = remedy_of(error)
        reason = error.strerror or error
        raise RepaError(f"cannot {doing} {error.filename or path}: {reason}", f"{remedy}") from error


def remedy_of(error: OSError) -> str:
    """Say what to do about an error of the operating system."""
    return _REMEDIES.get(error.errno or 0, _ANY_REMEDY)


def read_file(path: CachePath, most_bytes: int) -> bytes:
    """Return the bytes of a file that others may have put there.

    Args:
        path: of the file, or of an object of a bucket.
        most_bytes: largest file that is read.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, is no file, or is larger than any of its kind.
    """
    if not isinstance(path, Path):
        return path.read_bytes()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"its {size:,} bytes are more than any such file has", str(path))
        return file.read()


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed to its place: ``.<name>.partial`` beside it."""
    return path.with_name(f".{path.name}.partial")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; `sync_folders` makes their names durable.

    Raises:
        NotADirectoryError: a file stands in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def sync_folders(folder: Path, root: Path) -> None:
    """Fsync a folder and the folders above it up to ``root``, so that a rename in it survives a power cut.

    All of them every time, not only the new ones: one that a killed process made may never have been synced.

    Raises:
        OSError: the operating system refuses.
        ValueError: ``root`` is not above the folder.
    """
    for each in (folder, *folder.parents):
        descriptor = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if each == root:
            return
    raise ValueError(f"{root} is not above {folder}")


def publish(partial: Path, path: Path, root: Path) -> None:
    """Rename a finished, synced file to its place, durably up to the folder ``root``."""
    os.replace(partial, path)
    sync_folders(path.parent, root)


def write_file(path: Path, data: bytes, root: Path) -> None:
    """Write a small file whole or not at all, making the folders it needs.

    Args:
        path: its place; a file that is there is replaced.
        data: all of its bytes.
        root: the folder above it whose entries must be durable too, usually the cache.
    """
    make_folder(path.parent)
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # a full disk needs the room; what cannot be removed is overwritten by the next writer
        with suppress(OSError):
            partial.unlink()
        raise
    publish(partial, path, root)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file exclusively, waiting for other processes and threads; the file stays, empty."""
    with _THREADS[str(path.resolve())]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
