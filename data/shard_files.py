"""Where the bytes of shard files come from, for the reader: a few open files, and reads at any place of them.

`BufferedFiles` are local files by way of the page cache, `direct.DirectFiles` past it, `remote.RemoteFiles`
objects of a bucket. Threads share them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from .descriptors import DescriptorCache

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class ShardFiles(Protocol):
    """Files that can be read at any place; what `open` gives is known to `read` and `tail` alone."""

    def open(self, path: str) -> AbstractContextManager[Any]:
        """A file, open for as long as the context lasts.

        Raises:
            OSError: it cannot be opened.
        """
        ...

    def read(self, handle: Any, offset: int, chunk: memoryview, checksum: memoryview) -> bool:
        """Read a chunk and the checksum after it; False when the file ends before.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def tail(self, handle: Any, size: int) -> tuple[bytes, int]:
        """The last bytes of a file, at most ``size`` of them, and its length.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def close(self) -> None:
        """Close every file that is not in use; reading opens them again."""
        ...

    def after_fork(self) -> None:
        """In a forked child: forget what belonged to threads that do not exist here."""
        ...


class BufferedFiles:
    """Local files through the page cache, straight into the caller's memory.

    Args:
        limit: files kept open; more are open only while more are in use at once.
    """

    def __init__(self, limit: int) -> None:
        self._files = DescriptorCache(limit)

    def __len__(self) -> int:
        return len(self._files)

    def open(self, path: str) -> AbstractContextManager[int]:
        """The file's descriptor, open for as long as the context lasts."""
        return self._files.open(path)

    def read(self, handle: int, offset: int, chunk: memoryview, checksum: memoryview) -> bool:
        """Read a chunk and the checksum after it; False when the file ends before."""
        total = len(chunk) + len(checksum)
        count = os.preadv(handle, [chunk, checksum], offset)
        while count < total:
            # rare: a signal or a network file system cut the read short
            rest = [chunk[count:], checksum] if count < len(chunk) else [checksum[count - len(chunk) :]]
            more = os.preadv(handle, rest, offset + count)
            if more == 0:
                return False
            count += more
        return True

    def tail(self, handle: int, size: int) -> tuple[bytes, int]:
        """The last bytes of a file, at most ``size`` of them, and its length."""
        length = os.fstat(handle).st_size
        return os.pread(handle, size, max(length - size, 0)), length

    def close(self) -> None:
        """Close every file that is not in use; reading opens them again."""
        self._files.close()

    def after_fork(self) -> None:
        """In a forked child: forget what belonged to threads that do not exist here."""
        self._files.after_fork()
