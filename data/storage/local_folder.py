"""A folder of a disk that is written to."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .files import (
    create_file,
    locked,
    make_folder,
    open_lock,
    partial_path,
    publish,
    refuse_links,
    sync_folders,
    write_file,
)
from .folder import LOCK_NAME, Seen, TakenError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from .folder import Held

# POSIX locks do not exclude writers of one process, and closing one descriptor drops the locks of all others
_claimed: set[str] = set()
_claiming = threading.Lock()

# bytes of a file after which the disk is set to work on them, so that the last sync has little left to do
_FLUSH_BYTES = 8 << 20
_CAN_FLUSH = hasattr(os, "posix_fadvise")

_NOT_LOOKED = Seen(None)


class LocalFolder:
    """A folder of a disk, see `folder.Folder`.

    Args:
        root: its path. Names below it are durable up to it, and no link below it is followed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def exists(self, path: Path) -> bool:
        """Tell whether there is a file."""
        return path.exists()

    def names(self, path: Path) -> list[str]:
        """List what lies directly in a folder, ascending."""
        return sorted(each.name for each in path.iterdir()) if path.is_dir() else []

    def put(self, path: Path, data: bytes) -> None:
        """Write a small file whole or not at all."""
        write_file(path, data, self._root)

    def seen(self, path: Path) -> Seen:
        """Look at nothing, as whoever writes holds a lock that ends with the process alone."""
        return _NOT_LOOKED

    def look(self, path: Path) -> tuple[bytes | None, Seen]:
        """Read a small file, None where there is none."""
        try:
            return path.read_bytes(), _NOT_LOOKED
        except FileNotFoundError:
            return None, _NOT_LOOKED

    def put_if(self, path: Path, data: bytes, seen: Seen) -> Seen:
        """Write a small file whole or not at all."""
        write_file(path, data, self._root)
        return _NOT_LOOKED

    def withdraw(self, path: Path, seen: Seen) -> Seen:
        """Remove a file, if it is there."""
        self.remove([path])
        return _NOT_LOOKED

    def require_inside(self, paths: Iterable[Path]) -> None:
        """Require files to lie behind no link."""
        for path in paths:
            refuse_links(path.parent, self._root)

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files, as far as they are there."""
        folders: dict[Path, None] = {}
        for path in paths:
            refuse_links(path.parent, self._root)
            with suppress(FileNotFoundError):
                path.unlink()
                folders[path.parent] = None
        for folder in folders:
            sync_folders(folder, self._root)

    def remove_all(self, path: Path, held: Held) -> None:
        """Remove a folder and all that is in it, if it is there. A link stays."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            sync_folders(path.parent, self._root)

    def remove_if_empty(self, path: Path) -> None:
        """Remove a folder that nothing is in."""
        with suppress(OSError):
            path.rmdir()

    def settle(self) -> None:
        """Have the root's own name survive a power cut."""
        sync_folders(self._root.parent, self._root.parent)

    def begin(self, path: Path, most_bytes: int) -> _LocalFile:
        """Begin a file beside its final path."""
        return _LocalFile(path, self._root)

    @contextmanager
    def locked(self, path: Path, part: int | None = None) -> Iterator[Held]:
        """Hold a lock file, all of it."""
        make_folder(path.parent, self._root)
        with locked(path):
            yield _HELD

    def claim(self, path: Path, numbers: Sequence[int]) -> _LocalClaim:
        """Hold one byte of the folder's lock file for each number."""
        return _LocalClaim(path, self._root, numbers)


class _Held:
    """A lock that ends with its process alone."""

    def check(self) -> None:
        """Find it held."""


_HELD = _Held()


class _LocalClaim(_Held):
    """Bytes of a lock file, which other processes find locked."""

    def __init__(self, folder: Path, root: Path, numbers: Sequence[int]) -> None:
        self._key = str(folder.resolve())
        self._descriptor: int | None = None
        with _claiming:
            if self._key in _claimed:
                raise TakenError(None)
            _claimed.add(self._key)
        try:
            make_folder(folder, root)
            self._descriptor = open_lock(folder / LOCK_NAME)
            # all or none: a writer that gets one and not another lets go of both
            for number in numbers:
                _lock(self._descriptor, number)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        if self._descriptor is not None:
            # closing the file lets go of its locks
            os.close(self._descriptor)
            self._descriptor = None
        with _claiming:
            _claimed.discard(self._key)


def _lock(descriptor: int, number: int) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise TakenError(number) from error


class _LocalFile:
    """A file in the making, beside its final path."""

    def __init__(self, path: Path, root: Path) -> None:
        self._path = path
        self._root = root
        self._partial = partial_path(path)
        self._length = 0
        self._flushed = 0
        make_folder(path.parent, root)
        self._descriptor: int | None = create_file(self._partial)

    def append(self, pieces: Sequence[memoryview | bytes]) -> None:
        """Append to the file without a buffer of our own, which would copy every row once more."""
        descriptor = self._write(pieces)
        self._length += sum(map(len, pieces))
        if _CAN_FLUSH and self._length - self._flushed >= _FLUSH_BYTES:
            # Linux begins to write dirty pages that are said not to be needed, and keeps them
            length = self._length - self._flushed
            os.posix_fadvise(descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
            self._flushed = self._length

    def finish(self) -> None:
        os.fsync(self._open())
        self._close()

    def publish(self) -> None:
        publish(self._partial, self._path, self._root)

    def abandon(self) -> None:
        # what cannot be removed now is removed by the next writer of the file
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def _open(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"{self._path} has been finished, or a write to it has failed")
        return self._descriptor

    def _write(self, pieces: Sequence[memoryview | bytes]) -> int:
        descriptor = self._open()
        try:
            written = os.writev(descriptor, pieces)
            if written < sum(map(len, pieces)):
                # a disk that fills up takes some of it before it refuses the rest
                rest = memoryview(b"".join(pieces))[written:]
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
        except OSError:
            # half a row may be there, and a row after it would stand at another offset than the index says
            self._close()
            raise
        return descriptor

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
