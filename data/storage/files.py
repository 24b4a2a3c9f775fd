"""Files that are there whole or not at all, folders that survive a power cut, one-line errors of the system.

Everything a cache holds reaches its name by the same four steps: write beside it, fsync, rename, fsync the
folders. Nothing is written through a link: a cache or a run may have come from anybody, with links in it that
point at files of the user's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

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
    errno.EFBIG: "restore it or delete it, or raise the limit under which it is written, `ulimit -f`",
    errno.ELOOP: "a link stands there, and nothing is written through one; delete it",
    errno.EMFILE: "raise the limit of open files, `ulimit -n`",
    errno.ENFILE: "close programs that hold many files open, or have the system's limit raised",
    errno.ENOMEM: "give fewer --workers or a smaller --batch-size, or raise the limit of memory, `ulimit -v`",
    errno.EAGAIN: "give fewer --workers or --devices, or raise the limit of processes, `ulimit -u`",
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
        if doing == "write" and error.errno == errno.ECONNABORTED:
            remedy += ", then run the same command again: what is committed stays"
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
    """Return where a file is written before it is renamed, ``.<name>.partial`` beside its final path."""
    return path.with_name(partial_name(path.name))


def partial_name(name: str) -> str:
    """Return the name under which a file is written before it is renamed."""
    return f".{name}.partial"


def make_folder(folder: Path, root: Path | None = None) -> None:
    """Make a folder and its parents. `sync_folders` makes their names durable.

    Args:
        folder: the folder.
        root: folder above it that the user has named, below which no link is followed.

    Raises:
        NotADirectoryError: a file stands in the way.
        OSError: a link does, below the root.
    """
    if root is not None:
        refuse_links(folder, root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def refuse_links(folder: Path, root: Path) -> None:
    """Check that a folder lies where its path says, no folder below the root being a link.

    Raises:
        OSError: one is.
    """
    for each in (folder, *folder.parents):
        if each == root:
            return
        if each.is_symlink():
            raise OSError(errno.ELOOP, "it is a link", str(each))


def create_file(path: Path, access: int = os.O_WRONLY) -> int:
    """Open a file that was not there, exclusively. What was there goes, a link and not what it points to.

    Args:
        path: the file, usually a `partial_path` that a killed process may have left.
        access: ``os.O_WRONLY`` or ``os.O_RDWR``.

    Returns:
        Its descriptor.

    Raises:
        OSError: the operating system refuses, or a folder stands there.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, access | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def open_lock(path: Path) -> int:
    """Open a lock file, made if it is not there.

    Returns:
        Its descriptor.

    Raises:
        OSError: the operating system refuses, or a link stands there.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def open_to_append(path: Path) -> TextIO:
    """Open a text file to write at its end, made if it is not there.

    Raises:
        OSError: the operating system refuses, or a link stands there.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8", newline="")


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
    """Rename a finished, synced file to its final path, durably up to the folder ``root``."""
    os.replace(partial, path)
    sync_folders(path.parent, root)


def write_file(path: Path, data: bytes, root: Path) -> None:
    """Write a small file whole or not at all, making the folders it needs.

    Args:
        path: its final one; a file that is there is replaced.
        data: all of its bytes.
        root: the folder above it whose entries must be durable too, usually the cache.
    """
    make_folder(path.parent, root)
    partial = partial_path(path)
    try:
        with open(create_file(partial), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # a full disk needs the room; what cannot be removed the next writer removes
        with suppress(OSError):
            partial.unlink()
        raise
    publish(partial, path, root)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file exclusively, after waiting for other processes and threads. The file stays, empty."""
    with _THREADS[str(path.resolve())]:
        descriptor = open_lock(path)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def nearest_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    for each in (path.absolute(), *path.absolute().parents):
        if each.is_dir():
            return each
    return Path("/")
