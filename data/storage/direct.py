"""Reading past the page cache (O_DIRECT), and the question whether a disk is faster that way.

The kernel then wants the offset in the file, the length and the memory aligned, which chunks are not: what is
read begins before the chunk and ends after it, in memory of the thread's own, and the chunk is copied out of
it. The copy is nothing beside a disk, but the page cache remembers nothing: what fits in memory is better
left to it, and is read from the disk once.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ..machine import available_memory
from .descriptors import DescriptorCache
from .local import BufferedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .descriptors import OpenFile

DIRECT_CHOICES = ("auto", "on", "off")

# groups of rows read to decide, half of them either way, and rows of a group: as many as a batch asks for
PROBES = 6
PROBE_ROWS = 16

# blocks of 4 KiB satisfy every disk there is; the kernel tells the exact number only through statx
_BLOCK = 4096

# direct reads must gain this much to give up what the page cache would keep
_GAIN = 1.15


class DirectFiles(BufferedFiles):
    """Shard files read past the page cache.

    Args:
        limit: files kept open.

    Raises:
        OSError: on opening a file, if its file system has no direct reads.
    """

    def __init__(self, limit: int) -> None:
        self._files = DescriptorCache(limit, flags=os.O_DIRECT)
        self._can_try = False  # every direct read waits for the disk
        self._memory = threading.local()

    def read(self, handle: OpenFile, offset: int, chunk: memoryview, checksum: bytearray) -> bool:
        """Read a chunk and the checksum after it. It is False when the file ends before."""
        stop = offset + len(chunk) + len(checksum)
        start = offset & -_BLOCK
        blocks = self._aligned((stop - start + _BLOCK - 1) & -_BLOCK)
        count = 0
        while start + count < stop:
            # a short read inside the file ends on a block; one that does not is the file's end
            more = os.preadv(handle.descriptor, [blocks[count:]], start + count)
            if more == 0 or (more % _BLOCK and start + count + more < stop):
                return False
            count += more
        # NumPy copies without the interpreter's lock, slices of memoryviews do not
        found = np.frombuffer(blocks, dtype=np.uint8)[offset - start : stop - start]
        np.copyto(np.frombuffer(chunk, dtype=np.uint8), found[: len(chunk)])
        checksum[:] = found[len(chunk) :].tobytes()
        return True

    def tail(self, handle: OpenFile, size: int) -> tuple[bytes, int]:
        """Read the last bytes of a file, at most ``size`` of them, and return its length too."""
        length = os.fstat(handle.descriptor).st_size
        data = bytearray(min(size, length))
        # an empty checksum: the whole tail is the chunk
        if not self.read(handle, length - len(data), memoryview(data), bytearray()):
            return b"", length
        return bytes(data), length

    def _aligned(self, size: int) -> memoryview:
        """Return memory of this thread that begins on a page's boundary, cut to that many bytes."""
        memory: mmap.mmap | None = getattr(self._memory, "blocks", None)
        if memory is None or len(memory) < size:
            memory = self._memory.blocks = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(memory)[:size]


def supports_direct(path: str) -> bool:
    """Tell whether the file system of a file has direct reads."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        # EINVAL alone means that there are none; any other error is reported by the first read
        return error.errno != errno.EINVAL
    os.close(descriptor)
    return True


def fits_in_memory(total_bytes: int) -> bool:
    """Tell whether the page cache would keep so many bytes. It may take half of what is available now."""
    available = available_memory()
    return available is not None and total_bytes <= available // 2


def direct_is_faster(read_buffered: Callable[[int], None], read_direct: Callable[[int], None]) -> bool:
    """Read some groups of rows either way, in turn, and compare the medians.

    Args:
        read_buffered: reads group number i; every group is of other rows.
        read_direct: likewise, past the page cache.
    """
    seconds: Sequence[list[float]] = ([], [])
    for number in range(PROBES):
        started = time.perf_counter()
        (read_buffered, read_direct)[number % 2](number)
        seconds[number % 2].append(time.perf_counter() - started)
    return median(seconds[0]) > _GAIN * median(seconds[1])
