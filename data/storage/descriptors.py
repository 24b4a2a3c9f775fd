"""A bounded set of open files for threads, which closes the one opened first and never one in use."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class OpenFile:
    """A file open for reading, until nobody refers to it any more.

    Attributes:
        descriptor: for ``os.preadv``, as long as this object lives.

    Raises:
        OSError: the file cannot be opened.
    """

    __slots__ = ("descriptor",)

    def __init__(self, path: str, flags: int = 0) -> None:
        self.descriptor = -1
        # where a FIFO lies in place of a file, it is not waited for: reading in places then fails
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)

    # bound here, because at the end of the interpreter this module's names may be gone before its objects
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)


class DescriptorCache:
    """Open files by path.

    Rows come in random order, where the file opened first is as likely to be asked for again as the one used
    last. A forked child may go on with the parent's descriptors: ``preadv`` knows no shared position.

    Args:
        limit: files kept open; more are open only while more are in use at once.
        flags: to open them with, besides read-only.
    """

    def __init__(self, limit: int, *, flags: int = 0) -> None:
        if limit < 1:
            raise ValueError(f"a limit of {limit} open files is not at least 1")
        self._limit = limit
        self._flags = flags
        self._files: dict[str, OpenFile] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def open(self, path: str) -> OpenFile:
        """Open the file, which stays open as long as the caller keeps what is returned.

        Raises:
            OSError: the file cannot be opened.
        """
        file = self._files.get(path)
        if file is not None:
            return file
        # opened without the lock: a slow file system must not stop the other threads
        file = OpenFile(path, self._flags)
        with self._lock:
            file = self._files.setdefault(path, file)
            while len(self._files) > self._limit:
                del self._files[next(iter(self._files))]
        return file

    def open_all(self, paths: Sequence[str]) -> list[OpenFile]:
        """Call `open` for each file.

        Raises:
            OSError: one of them, its ``filename``, cannot be opened.
        """
        try:
            # a call for each would take as long as reading a few kilobytes
            return list(map(self._files.__getitem__, paths))
        except KeyError:
            return [self.open(path) for path in paths]

    def close(self) -> None:
        """Close every file that is not in use."""
        with self._lock:
            self._files.clear()

    def after_fork(self) -> None:
        """Forget, in a forked child, a lock held by a thread that does not exist here."""
        self._lock = threading.Lock()
