"""The shard files of a folder as the reader needs them, a few open at a time and read at any offset.

`BufferedFiles` are local files by way of the page cache, `direct.DirectFiles` past it, and
`remote_files.RemoteFiles` objects of a bucket. Threads share them.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import TYPE_CHECKING, Any, Protocol

from .descriptors import DescriptorCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .descriptors import OpenFile

# of a file system, of a kernel without the flag
_CANNOT_TRY = (errno.EOPNOTSUPP, errno.EINVAL)

CHECKSUM_BYTES = 4
"""Of the crc32c after every chunk and every index."""

# ImageNet's shards of five columns are 6,255 files
_MOST_OPEN = 8192


def open_files_limit() -> int:
    """Choose how many files to hold open. It is half of what this process may, at least 8."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else max(8, min(_MOST_OPEN, soft // 2))


class ShardFiles(Protocol):
    """Files that can be read at any offset. What `open` gives is known to the other methods alone."""

    def open(self, paths: Sequence[str]) -> Sequence[Any]:
        """Open files, each as often as it is named, for as long as what is returned is kept.

        Raises:
            OSError: one of them, its ``filename``, cannot be opened.
        """
        ...

    def read_ready(
        self,
        handles: Sequence[Any],
        offsets: Sequence[int],
        chunks: Sequence[memoryview],
        checksum: bytearray,
    ) -> Iterator[int]:
        """Read chunks, and the checksum after each, as far as that means no waiting.

        Yields:
            Which was read; ``checksum`` is its own until the next one is asked for. The others are for
            `read`, which says what is wrong with them if anything is; their way into memory has begun where
            the kernel can do that.
        """
        ...

    def read(self, handle: Any, offset: int, chunk: memoryview, checksum: bytearray) -> bool:
        """Read a chunk and the checksum after it. It is False when the file ends before.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def tail(self, handle: Any, size: int) -> tuple[bytes, int]:
        """Read the last bytes of a file, at most ``size`` of them, and return its length too.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def close(self) -> None:
        """Close every file that is not in use. Reading opens them again."""
        ...

    def after_fork(self) -> None:
        """Forget, in a forked child, what belonged to threads that do not exist here."""
        ...


class BufferedFiles:
    """Local files through the page cache, straight into the caller's memory.

    A row that is not in the page cache is not waited for while others can be asked for: one thread keeps a
    disk busy.

    Args:
        limit: files kept open; more are open only while more are in use at once.
    """

    def __init__(self, limit: int) -> None:
        self._files = DescriptorCache(limit)
        self._can_try = hasattr(os, "RWF_NOWAIT")

    def __len__(self) -> int:
        return len(self._files)

    def open(self, paths: Sequence[str]) -> list[OpenFile]:
        """Open the files, each for as long as it is kept."""
        return self._files.open_all(paths)

    def read_ready(
        self,
        handles: Sequence[OpenFile],
        offsets: Sequence[int],
        chunks: Sequence[memoryview],
        checksum: bytearray,
    ) -> Iterator[int]:
        """Read the chunks that are in the page cache and ask the kernel for the bytes of the others."""
        if not self._can_try:
            return
        for at, (handle, offset, chunk) in enumerate(zip(handles, offsets, chunks, strict=True)):
            total = len(chunk) + CHECKSUM_BYTES
            try:
                if os.preadv(handle.descriptor, (chunk, checksum), offset, os.RWF_NOWAIT) == total:
                    yield at
                    continue
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in _CANNOT_TRY:
                    self._can_try = False
                    return
            os.posix_fadvise(handle.descriptor, offset, total, os.POSIX_FADV_WILLNEED)

    def read(self, handle: OpenFile, offset: int, chunk: memoryview, checksum: bytearray) -> bool:
        """Read a chunk and the checksum after it. It is False when the file ends before."""
        total = len(chunk) + len(checksum)
        count = os.preadv(handle.descriptor, (chunk, checksum), offset)
        while count < total:
            # rare: a signal or a network file system cut the read short
            tail = memoryview(checksum)[max(count - len(chunk), 0) :]
            more = os.preadv(handle.descriptor, (chunk[count:], tail), offset + count)
            if more == 0:
                return False
            count += more
        return True

    def tail(self, handle: OpenFile, size: int) -> tuple[bytes, int]:
        """Read the last bytes of a file, at most ``size`` of them, and return its length too."""
        length = os.fstat(handle.descriptor).st_size
        return os.pread(handle.descriptor, size, max(length - size, 0)), length

    def close(self) -> None:
        """Close every file that is not in use. Reading opens them again."""
        self._files.close()

    def after_fork(self) -> None:
        """Forget, in a forked child, what belonged to threads that do not exist here."""
        self._files.after_fork()
