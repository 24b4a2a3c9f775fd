"""A bounded set of open files, shared by threads: the least recently used is closed, never one in use."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class _OpenFile:
    __slots__ = ("descriptor", "users")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 0


class DescriptorCache:
    """Read-only file descriptors by path, least recently used last to stay.

    Args:
        limit: files kept open; more are open only while more are in use at once.
        flags: to open them with, besides read-only.
    """

    def __init__(self, limit: int, *, flags: int = 0) -> None:
        self._limit = limit
        self._flags = os.O_RDONLY | os.O_CLOEXEC | flags
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        if limit < 1:
            raise ValueError(f"a limit of {limit} open files is not at least 1")

    def __len__(self) -> int:
        return len(self._files)

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    @contextmanager
    def open(self, path: str) -> Iterator[int]:
        """The descriptor of a file, open for as long as the context lasts.

        Raises:
            OSError: the file cannot be opened.
        """
        file = self._acquire(path)
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1
                self._shrink(self._limit)

    def close(self) -> None:
        """Close every file that is not in use."""
        with self._lock:
            self._shrink(0)

    def after_fork(self) -> None:
        """In a forked child: forget locks and users of threads that do not exist here.

        The descriptors stay: ``preadv`` knows no shared file position.
        """
        self._lock = threading.Lock()
        for file in self._files.values():
            file.users = 0

    def _acquire(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                file.users += 1
                return file
        # opened without the lock: a slow file system must not stop the other threads
        descriptor = os.open(path, self._flags)
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(descriptor)
            else:
                os.close(descriptor)
                self._files.move_to_end(path)
            file.users += 1
            self._shrink(self._limit)
        return file

    def _shrink(self, limit: int) -> None:
        """Close files, the least recently used first, until ``limit`` are open or all are in use."""
        surplus = len(self._files) - limit
        if surplus <= 0:
            return
        for path in [path for path, file in self._files.items() if file.users == 0][:surplus]:
            os.close(self._files.pop(path).descriptor)
